"""`python -m moe.plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moe import plan
from moe.config import ConfigError, compose


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert plan.main([*arguments, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


@pytest.fixture(scope="module")
def facts_of_145b() -> dict[str, Any]:
    return plan.plan(["+experiment=moe_145b", "gpus=512"])


def test_plans_the_145b_run(facts_of_145b: dict[str, Any]) -> None:
    facts, best = facts_of_145b, facts_of_145b["best"]
    assert facts["num_params"] == 144_612_773_888
    assert facts["flops_per_sequence"] == pytest.approx(585.6e12, rel=1e-3)
    assert facts["tokens"] == 13_000 * 4608 * 4096
    assert best["fits"]
    assert best["peak_bytes"] < 0.92 * 79.1 * 2**30
    assert 0.05 < best["mfu"] < 0.6
    state, passing, workspace = (best["memory_bytes"][part] for part in ("state", "pass", "workspace"))
    assert best["peak_bytes"] == sum(state.values()) + sum(passing.values()) + max(workspace.values())
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert facts["days"] == pytest.approx(13_000 * best["step_seconds"] / 86_400)


def test_ranks_layouts_that_fit_by_speed(facts_of_145b: dict[str, Any]) -> None:
    ranking = facts_of_145b["ranking"]
    fitting = [entry["step_seconds"] for entry in ranking if entry["fits"]]
    assert fitting == sorted(fitting)
    assert [entry["fits"] for entry in ranking] == sorted((entry["fits"] for entry in ranking), reverse=True)
    assert len({entry["layout"] for entry in ranking}) == len(ranking)
    assert {**ranking[0]}.items() <= facts_of_145b["best"].items()


def test_what_it_proposes_is_what_train_py_takes(facts_of_145b: dict[str, Any]) -> None:
    """And planned again with nothing left open, it is the same."""
    overrides = ["+experiment=moe_145b", *facts_of_145b["best"]["overrides"]]
    config = compose(overrides)
    again = plan.plan([*overrides, "gpus=512"])
    assert len(again["ranking"]) == 1
    assert again["best"] == facts_of_145b["best"]
    assert config.train.global_batch_size % config.train.micro_batch_size == 0


def test_what_the_command_line_says_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan_json(
        capsys,
        "+experiment=moe_2b",
        "gpus=8",
        "gpu=h200",
        "parallel.expert=8",
        "train.micro_batch_size=4",
        "runtime.activation_checkpointing=full",
    )
    assert len(facts["ranking"]) > 1
    for entry in facts["ranking"]:
        assert {
            "parallel.expert=8",
            "train.micro_batch_size=4",
            "runtime.activation_checkpointing=full",
        } <= set(entry["overrides"])
    assert facts["gpu"]["device_name"] == "H200"


def test_a_slower_gpu_and_a_slower_network_take_longer(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("+experiment=moe_2b", "gpus=8", "parallel.expert=8", "parallel.shard=8", "train.micro_batch_size=8")
    h200, a100 = (plan_json(capsys, *common, f"gpu={gpu}")["best"]["seconds"] for gpu in ("h200", "a100"))
    apart = plan_json(capsys, *common, "gpu=h200", "gpus_per_node=1")["best"]["seconds"]
    assert all(a100[part] > h200[part] for part in ("dense products", "expert products", "between products"))
    assert apart["rows"] > 2 * h200["rows"]
    assert apart["dense products"] == h200["dense products"]


def test_says_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["+experiment=moe_145b", "gpus=8", "gpu=rtx_4090"]) == plan.EXIT_NOTHING_FITS
    output = capsys.readouterr().out
    assert "does not fit" in output
    assert "run it with" not in output
    assert ", 0 fit; the leanest" in output


def test_prints_a_table_that_adds_up_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    assert plan.main(["gpus=2", "gpu=h100", "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("memory"))
    end = next(number for number, line in enumerate(lines) if line.lstrip().startswith("peak"))
    figures = [float(line[26:35]) for line in lines[start + 1 : end + 1]]
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.01)
    drawn = ElementTree.parse(picture).getroot()
    assert drawn.tag.endswith("svg")
    assert "Memory" in drawn.attrib["aria-label"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["model.hiden_size=3"], "unknown key model.hiden_size: did you mean model.hidden_size?"),
        (["+experiment=nope"], "experiment/nope"),
        (["train.micro_batch_size=5"], "train.micro_batch_size must be a divisor"),
        (["gpus=0"], "gpus must be a number between 1 and 8192, not 0"),
        (["gpus=many"], "gpus must be a number"),
        (["gpus_per_node=-8"], "gpus_per_node must be a number"),
        (["gpu=tpu"], "gpu must be one of a100"),
        (
            ["gpus=8", "parallel.expert=9"],
            "parallel.expert=9 does not divide shard x tensor = 8; with batches that divide, on 8 ranks these",
        ),
        (["gpus=8", "parallel.shard=3"], "do not multiply to 8 ranks"),
        (["gpus=8", "parallel.shard=8"], "train.global_batch_size=4 does not divide by the data-parallel"),
        (["--picture", "/nowhere/at/all.svg"], "--picture /nowhere/at/all.svg: No such file"),
    ],
)
def test_errors_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 78
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert complaint in output.err
    assert output.err.count("\n") == 1


def test_compose_is_checked() -> None:
    assert compose(["train.steps=7", "optim.schedule.warmup_steps=2"]).train.steps == 7
    with pytest.raises(ConfigError, match=r"data\.seq_len must be at least 2"):
        compose(["data.seq_len=1"])


def test_of_equal_times_the_largest_micro_batch() -> None:
    asked = ["+experiment=moe_2b", "gpus=8", "parallel.shard=8", "parallel.reshard=false"]
    best = plan.plan(asked)["best"]
    smallest = plan.plan([*asked, "train.micro_batch_size=1"])["best"]
    assert smallest["fits"]
    assert best["step"]["sequences"] > 1


def test_the_line_for_train_py_plans_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["+experiment=moe_2b", "train.global_batch_size=64", "train.micro_batch_size=4"]
    assert plan.main([*asked, "gpus=2"]) == 0
    start = "run it with: torchrun --nproc_per_node=2 train.py "
    line = capsys.readouterr().out.splitlines()[-1].removeprefix(start).split()
    assert {*asked} <= {*line}
    assert len(line) == len({text.partition("=")[0] for text in line}), "each key once"
    assert plan.plan([*line, "gpus=2"])["best"] == plan.plan([*asked, "gpus=2"])["best"]


@pytest.mark.parametrize(
    ("gpus", "start"),
    [
        ("gpus=1", "python train.py "),
        ("gpus=8", "torchrun --nproc_per_node=8 train.py "),
        ("gpus=16", "NODES=2 HOST=... launch/torchrun.sh "),
    ],
)
def test_the_last_line_says_how_ranks_start(capsys: pytest.CaptureFixture[str], gpus: str, start: str) -> None:
    assert plan.main(["+experiment=moe_2b", gpus, "gpu=h200"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"run it with: {start}+experiment=moe_2b ")
