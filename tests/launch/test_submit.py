"""launch/submit.py refuses what cannot run, fills the template in, and hands it to sbatch."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_slurm import REPOSITORY, FakeSlurm


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", REPOSITORY / "launch" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", slurm.environment()["PATH"])
    return slurm


TINY = ["runtime.device=cpu", "--gpus-per-node", "0"]

BAD = [
    (["train.stepz=3"], "unknown key train.stepz"),
    (["parallel.expert=3"], "parallel.expert=3 does not divide shard x tensor = 8"),
    (["parallel.shard=3", "parallel.replicate=1"], "do not multiply to 8 ranks"),
    ([], "train.global_batch_size must be a multiple of train.micro_batch_size=4 times 8 data-parallel ranks, not 4"),
    (
        ["--gpus-per-node", "2", "train.global_batch_size=8", "train.batch_ramp=[[5,4]]"],
        "train.batch_ramp must be a multiple",
    ),
    (["--nodes", "0"], "--nodes must be at least 1, not 0"),
    (["--gpus-per-node", "-1"], "--gpus-per-node must be at least 0, not -1"),
    (["--time", "1 day"], "--time must be minutes, H:M:S, D-H:M:S or another of the queue's formats, not 1 day"),
    (["--time", "0:02:00"], "--grace must be below the 120 seconds of --time=0:02:00, not 180"),
    (["--time", "3"], "--grace must be below the 180 seconds of --time=3, not 180"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_what_cannot_run_is_not_queued(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert submit.main(arguments) == 78
    output = capsys.readouterr()
    assert expected in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert slurm.read("sbatch.arguments") == ""


LIMITS = {"90": 5400, "90:30": 5430, "1:00:00": 3600, "2-3": 183_600, "2-3:4": 183_840, "1-0:0:1": 86_401}
NO_LIMITS = {
    "UNLIMITED": math.inf,
    "-1": math.inf,
    "0": math.inf,
    "": None,
    "1:2:3:4": None,
    "-3": None,
    "1d": None,
    "1.5": None,
}


@pytest.mark.parametrize(("limit", "seconds"), (LIMITS | NO_LIMITS).items())
def test_limits_are_read_as_slurm_reads_them(submit: ModuleType, limit: str, seconds: float | None) -> None:
    assert submit.seconds_of(limit) == seconds


def test_a_dry_run_prints_a_script_with_every_option_and_writes_nothing(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(slurm.folder.rglob("*"))
    options = ["--nodes", "4", "--time", "24:00:00", "--partition", "gpu", "--grace", "300", "--sbatch=--mem=0"]
    paths = ["data=prepared", "data.prepared=my corpus"]
    assert submit.main(["+experiment=moe_16b", *options, "parallel.expert=8", *paths, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for option in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "time=24:00:00", "partition=gpu", "mem=0"):
        assert f"#SBATCH --{option}" in lines
    for option in ("job-name=moe_16b", "requeue", "open-mode=append", "signal=B:USR1@300"):
        assert f"#SBATCH --{option}" in lines
    assert "set -- +experiment=moe_16b parallel.expert=8 data=prepared 'data.prepared=my corpus'" in lines
    assert lines[0] == "#!/usr/bin/env bash"
    assert len([line for line in lines if line.startswith("#SBATCH --nodes")]) == 1
    assert sorted(slurm.folder.rglob("*")) == before


def test_the_facts_of_a_job(submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = ["data=prepared", "data.prepared=corpus"]
    submit.main(["+experiment=moe_16b", "parallel.expert=16", *corpus, "--nodes", "4", "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == {"replicate": 1, "shard": 32, "tensor": 1, "expert": 16}
    assert facts["num_params"] == 16_375_728_128
    assert facts["tokens_per_step"] == 4608 * 4096
    assert facts["micro_batches_per_step"] == 4608 // (8 * 32)
    assert facts["job"] is None
    assert facts["warnings"] == [
        "parallel.expert=16 does not divide the 8 ranks of a node: the tokens of every MoE layer cross the network "
        "between nodes"
    ]


def test_groups_inside_a_node_are_no_reason_to_warn(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["data=prepared", "data.prepared=corpus"]
    submit.main(["+experiment=moe_16b", "parallel.expert=8", "parallel.tensor=4", *corpus, "--nodes", "4", "--dry-run"])
    assert "warning" not in capsys.readouterr().err


def test_what_is_queued_runs_a_copy_of_the_code(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*TINY, "train.steps=50", "optim.schedule.warmup_steps=5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    folder = Path(facts["folder"])
    assert facts["job"] == "4711"
    assert facts["log"] == str(folder / "slurm-4711.log")
    assert slurm.read("sbatch.arguments").split() == ["--parsable", str(folder / "job.sbatch")]
    assert (folder / "code" / "train.py").read_bytes() == (REPOSITORY / "train.py").read_bytes()
    assert (folder / "code" / "conf" / "config.yaml").is_file()
    assert not list(folder.rglob("__pycache__"))
    composed = subprocess.run(
        [sys.executable, str(folder / "code" / "train.py"), "--cfg", "job", "train.steps=50"],
        capture_output=True,
        text=True,
        check=True,
        cwd=slurm.folder,
    )
    assert "steps: 50" in composed.stdout


def test_the_filled_script_starts_training(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the fake srun: the arguments arrive, and the code of train.py is the job's."""
    submit.main([*TINY, "run=a run", "--no-snapshot", "--dry-run"])
    filled = re.sub(r"(?m)^export CODE=.*", f"export CODE='{slurm.folder}'", capsys.readouterr().out)
    script = slurm.write("job.sbatch", filled)
    environment = slurm.environment(EXIT_CODE="77")
    result = subprocess.run(["bash", str(script)], cwd=slurm.folder, env=environment, check=False, capture_output=True)
    assert result.returncode == 77
    assert slurm.read("arguments") == "runtime.device=cpu run=a run"
    assert slurm.read("srun.arguments").splitlines()[-4] == sys.executable


def test_no_sbatch_is_one_line(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(slurm.folder / "nothing"))
    assert submit.main(TINY) == 1
    assert capsys.readouterr().err.startswith("error: sbatch is not on the PATH: run this on a login node")
    assert not (slurm.folder / "outputs").exists()


def test_a_refusal_by_sbatch_is_passed_on(
    submit: ModuleType, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_COMPLAINT", "sbatch: error: invalid partition specified: gpux")
    assert submit.main([*TINY, "--partition", "gpux", "--no-snapshot"]) == 1
    assert capsys.readouterr().err == "error: sbatch: error: invalid partition specified: gpux\n"
