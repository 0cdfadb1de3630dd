"""Check expert backends and routing on this GPU: python -m benchmarks.kernels [--tokens 4096] [--json FILE].

In bfloat16, on unit-variance inputs, against the fp64 reference: the error of the output and of every gradient, over
the error of the plain bfloat16 loop on the same inputs (`loop`; at most 1.1 is allowed). Cases: skewed routing with
empty experts, one expert that gets everything, padding tokens that hold NaN in every tensor, odd numbers of tokens and
experts, rows without a token. Also: two passes equal to the bit, none waits for the device. Fused backends a second
time with sums that the weights' gradients are added to. Of routing: the router's product on tensor cores against fp64,
over the norms, and the order of choices equal to the CPU's. Ends with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.arguments import new_file, parse_on_gpu, positive
from benchmarks.timing import waits_for_device
from moe.kernels.experts import FUSED, available_backends, routed_experts
from moe.kernels.permute import sort_by_expert
from moe.kernels.reference import moe_reference
from moe.kernels.router_product import router_product

ALLOWED = 1.1
ROUTER_ALLOWED = {"logits": 3e-6, "x": 2e-3, "weight": 1e-4}
"""Of the norms: what a float32's third part adds, a rounding to bfloat16, and sums over tokens on tensor cores."""
TENSORS = ("output", "x", "weights", "gate_up_proj", "down_proj")


class Case(NamedTuple):
    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    skew: float = 1.0
    """By how many standard deviations the scores fall from the first expert to the last."""
    padding: float = 0.0


def cases(tokens: int) -> list[Case]:
    return [
        Case("2B", tokens, 1280, 848, 63, 7),
        Case("16B", tokens, 2048, 1408, 64, 6),
        Case("fine", tokens, 1280, 424, 128, 16),
        Case("empty experts", tokens, 512, 256, 64, 4, skew=30.0),
        Case("one hot expert", tokens, 512, 256, 8, 1, skew=1000.0),
        Case("padding of NaN", tokens, 512, 256, 16, 4, padding=0.4),
        Case("nothing but padding", 256, 512, 256, 16, 4, padding=1.0),
        Case("odd sizes", 1001, 520, 264, 37, 5, padding=0.1),
        Case("one token", 1, 512, 256, 5, 3),
    ]


class Inputs(NamedTuple):
    x: Tensor
    experts: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor
    valid: Tensor


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cuda")

    scores = normal(case.tokens, case.experts) - torch.linspace(0, case.skew, case.experts, device="cuda")
    weights, experts = scores.softmax(1).topk(case.top_k)
    gate_up = normal(case.experts, 2, case.width, case.hidden) * case.hidden**-0.5
    down = normal(case.experts, case.hidden, case.width) * case.width**-0.5
    x, grad = normal(case.tokens, case.hidden), normal(case.tokens, case.hidden)
    valid = torch.rand(case.tokens, generator=generator, device="cuda") >= case.padding
    rounded = (t.bfloat16() for t in (gate_up, down, grad))
    return Inputs(x.bfloat16(), experts, weights * case.top_k, *rounded, valid)


def passes(inputs: Inputs, backend: str, sums: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    """Output and gradients; tokens of padding hold NaN. With `sums` the weights must have none, and these come out."""
    padding = ~inputs.valid[:, None]
    x, weights, grad = (t.masked_fill(padding, torch.nan) for t in (inputs.x, inputs.weights, inputs.grad))
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights, inputs.gate_up, inputs.down)]
    out = routed_experts(leaves[0], inputs.experts, *leaves[1:], backend, inputs.valid, sums)
    of_x, of_weights, *others = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    if sums is not None:
        assert others == [None, None], "gradients that are in the sums already"
    return [out.detach(), of_x, of_weights, *(sums or others)]


def added_passes(inputs: Inputs, backend: str) -> list[Tensor]:
    """The same, the weights' gradients by how much they raise sums."""
    generator = torch.Generator("cuda").manual_seed(1)
    before = [torch.randn(w.shape, generator=generator, device="cuda") for w in (inputs.gate_up, inputs.down)]
    *found, gate_up, down = passes(inputs, backend, (before[0].clone(), before[1].clone()))
    return [*found, gate_up.double() - before[0], down.double() - before[1]]


def exact_passes(inputs: Inputs) -> list[Tensor]:
    tensors = (inputs.x, inputs.weights, inputs.gate_up, inputs.down)
    leaves = [t.double().requires_grad_() for t in tensors]
    experts = torch.where(inputs.valid[:, None], inputs.experts, -1)
    out = moe_reference(leaves[0], experts, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.double())]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Each tensor's error over its norm; infinite where a zero is not one."""
    found64 = [t.double() for t in found]
    return [
        float((f - e).norm() / e.norm()) if e.any() else (float("inf") if f.ne(0).any() else 0.0)
        for f, e in zip(found64, exact, strict=True)
    ]


def check(case: Case, backends: list[str]) -> list[dict[str, object]]:
    """One row a backend."""
    inputs = make_inputs(case)
    exact = exact_passes(inputs)
    allowed = [ALLOWED * error for error in errors(passes(inputs, "loop"), exact)]
    rows = []
    for backend in backends:
        kinds = {backend: passes}
        if backend in FUSED:
            kinds[f"{backend}, sums"] = added_passes
        for name, take in kinds.items():
            found = errors(take(inputs, backend), exact)
            ratios = [
                ALLOWED * f / a if a else (0.0 if f == 0 else float("inf")) for f, a in zip(found, allowed, strict=True)
            ]
            first, second = take(inputs, backend), take(inputs, backend)
            repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            waits = waits_for_device(partial(take, inputs, backend))
            rows.append(
                {
                    "case": case.name,
                    "backend": name,
                    "error": dict(zip(TENSORS, found, strict=True)),
                    "of_plain": dict(zip(TENSORS, ratios, strict=True)),
                    "repeats": repeats,
                    "waits": waits,
                    "good": max(ratios) <= ALLOWED and repeats and not waits,
                }
            )
    return rows


def check_routing(case: Case) -> dict[str, object]:
    """One row."""
    inputs = make_inputs(case)
    here = sort_by_expert(inputs.experts, case.experts, inputs.valid)
    on_cpu = sort_by_expert(inputs.experts.cpu(), case.experts, inputs.valid.cpu())
    is_sorted = all(torch.equal(a.cpu(), b) for a, b in zip(here[:4], on_cpu[:4], strict=True))
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(case.experts, case.hidden, generator=generator, device="cuda") * case.hidden**-0.5
    grad = torch.randn(case.tokens, case.experts, generator=generator, device="cuda")
    leaves = [inputs.x.requires_grad_(), weight.requires_grad_()]
    logits = router_product(*leaves)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = exact_leaves[0] @ exact_leaves[1].T
    found = errors(
        [logits.detach(), *torch.autograd.grad(logits, leaves, grad)],
        [exact.detach(), *torch.autograd.grad(exact, exact_leaves, grad.double())],
    )
    error = dict(zip(ROUTER_ALLOWED, found, strict=True))
    good = is_sorted and all(error[name] <= allowed for name, allowed in ROUTER_ALLOWED.items())
    return {"case": case.name, "router_error": error, "sorted": is_sorted, "good": good}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=4096)
    parser.add_argument("--json", type=new_file, metavar="FILE")
    args = parse_on_gpu(parser)
    backends = [name for name in available_backends() if name != "loop"]
    print(f"{'case':20} {'backend':13}" + "".join(f"{name:>14}" for name in TENSORS) + "   repeats  waits")
    rows = []
    for case in cases(args.tokens):
        for row in check(case, backends):
            ratios = "".join(f"{ratio:14.3f}" for ratio in row["of_plain"].values())  # type: ignore[attr-defined]
            passed = f"{row['repeats']!s:7}  {row['waits']!s:5}{'' if row['good'] else '  FAILED'}"
            print(f"{case.name:20} {row['backend']:13}{ratios}   {passed}", flush=True)
            rows.append(row)
    print(f"{'case':20} {'router':13}" + "".join(f"{name:>14}" for name in ROUTER_ALLOWED) + "   sorted")
    for case in cases(args.tokens):
        row = check_routing(case)
        found = "".join(f"{error:14.1e}" for error in row["router_error"].values())  # type: ignore[attr-defined]
        print(f"{case.name:20} {'':13}{found}   {row['sorted']!s:6}{'' if row['good'] else '  FAILED'}", flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
