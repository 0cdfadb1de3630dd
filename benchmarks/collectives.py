"""How fast the collectives of training are between the GPUs of one job.

    torchrun --nproc_per_node=8 -m benchmarks.collectives

Bandwidth is what one rank sends to the others in a second, in GB (10^9 bytes): the wire bytes of `moe.planning.traffic`
over the median time of 20 calls after 5. Transfers to oneself do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.arguments import new_file, parse_on_gpu, positive

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mib", type=positive, nargs="+", default=[1, 16, 128, 512], help="bytes a rank holds of the whole"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parse_on_gpu(parser)
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun, a process for each GPU")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    results = [row for mib in options.mib for row in measure(mib * MIB)]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} x {torch.cuda.get_device_name()}")
        print(f"{'collective':16} {'MiB':>6} {'ms':>8} {'GB/s':>8}")
        for row in results:
            print(f"{row['collective']:16} {row['mib']:6.0f} {row['ms']:8.3f} {row['gb_per_second']:8.1f}")
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def measure(size: int) -> list[dict[str, float | str]]:
    """Every collective on `size` bytes of bfloat16 a rank: before it is gathered, after it is scattered."""
    ranks = dist.get_world_size()
    part = torch.ones(size // 2 // ranks * ranks, dtype=torch.bfloat16, device="cuda")
    whole = torch.ones(len(part) * ranks, dtype=torch.bfloat16, device="cuda")
    received = torch.empty_like(part)
    calls: dict[str, tuple[Callable[[], object], Tensor, float]] = {
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), part, ranks - 1),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), part, ranks - 1),
        "all_reduce": (lambda: dist.all_reduce(part), part, 2 * (ranks - 1) / ranks),
        "all_to_all": (lambda: dist.all_to_all_single(received, part), part, (ranks - 1) / ranks),
    }
    rows: list[dict[str, float | str]] = []
    for name, (call, tensor, factor) in calls.items():
        seconds = timed(call)
        sent = tensor.nbytes * factor
        rows.append({"collective": name, "mib": size / MIB, "ms": seconds * 1e3, "gb_per_second": sent / seconds / 1e9})
    return rows


def timed(call: Callable[[], object]) -> float:
    """Seconds, the slowest rank's."""
    times = []
    for index in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 5:
            times.append(start.elapsed_time(end) / 1e3)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


if __name__ == "__main__":
    main()
