"""What launch/train.sbatch does with signals, exit codes and restarts."""

from __future__ import annotations

import re
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def environment_of_srun(slurm: FakeSlurm) -> dict[str, str]:
    return dict(line.split("=", 1) for line in slurm.read("srun.environment").splitlines() if "=" in line)


def listen_in(ports: range) -> socket.socket:
    for port in ports:
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    raise AssertionError("every port is taken")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_passed_on_and_75_requeues_once(slurm: FakeSlurm, number: signal.Signals) -> None:
    assert slurm.interrupt(number, EXIT_CODE="75") == 75
    assert slurm.read("signals") == "SIGUSR1"
    assert slurm.requeued == ["7"]


def test_of_two_signals_training_gets_one(slurm: FakeSlurm) -> None:
    """A second one would end it before it has saved."""
    assert slurm.interrupt(signal.SIGUSR1, signal.SIGTERM, EXIT_CODE="75") == 75
    assert slurm.read("signals") == "SIGUSR1"
    assert slurm.requeued == ["7"]


@pytest.mark.parametrize("code", [0, 1, 76, 77, 78, 137])
def test_any_other_code_is_passed_on_and_ends_the_job(slurm: FakeSlurm, code: int) -> None:
    assert slurm.finish(EXIT_CODE=str(code)) == code
    assert slurm.requeued == []


def test_a_run_that_completes_after_a_signal_is_not_requeued(slurm: FakeSlurm) -> None:
    assert slurm.interrupt(signal.SIGUSR1, EXIT_CODE="0") == 0
    assert slurm.requeued == []


def test_a_job_that_slurm_is_ending_is_left_to_it(slurm: FakeSlurm) -> None:
    """scancel would otherwise bring the job back."""
    assert slurm.interrupt(signal.SIGTERM, EXIT_CODE="75", JOB_STATE="COMPLETING") == 75
    assert slurm.requeued == []
    assert "not requeued: SLURM is ending job 7" in slurm.log.read_text()


def test_a_task_of_an_array_requeues_itself_alone(slurm: FakeSlurm) -> None:
    slurm.finish(EXIT_CODE="75", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert slurm.requeued == ["5_2"]


@pytest.mark.parametrize("step", [None, 40])
def test_three_restarts_without_progress_end_it(slurm: FakeSlurm, step: int | None) -> None:
    if step is not None:
        slurm.save_checkpoint(step)
    for _ in range(3):
        assert slurm.finish(EXIT_CODE="75") == 75
    assert len(slurm.requeued) == 3
    assert slurm.finish(EXIT_CODE="75") == 75
    assert len(slurm.requeued) == 3
    assert "not requeued: 3 restarts in a row have not come further than" in slurm.log.read_text()


def test_restarts_that_get_on_are_not_counted(slurm: FakeSlurm) -> None:
    for step in (9, 9, 9, 10, 10, 10, 100_000_000):
        slurm.save_checkpoint(step)
        slurm.finish(EXIT_CODE="75")
    assert len(slurm.requeued) == 7


def test_every_process_gets_the_same_meeting_place_and_the_overrides(slurm: FakeSlurm) -> None:
    slurm.finish("+experiment=moe_2b", "run=two words")
    environment = environment_of_srun(slurm)
    assert environment["MASTER_ADDR"] == "node1"
    assert 10_000 <= int(environment["MASTER_PORT"]) < 30_100
    assert environment["SRUN_CPUS_PER_TASK"] == environment["OMP_NUM_THREADS"] == "3"
    assert slurm.read("arguments") == "+experiment=moe_2b run=two words"
    assert "--distribution=block" in slurm.read("srun.arguments").splitlines()


def test_two_jobs_on_a_node_meet_at_different_ports(slurm: FakeSlurm) -> None:
    ports = set()
    for job in ("7", "8"):
        slurm.finish(SLURM_JOB_ID=job, HOSTS="node1")
        ports.add(environment_of_srun(slurm)["MASTER_PORT"])
    assert environment_of_srun(slurm)["MASTER_ADDR"] == "127.0.0.1"
    assert len(ports) == 2


def test_a_port_that_somebody_listens_on_is_passed_over(slurm: FakeSlurm) -> None:
    with listen_in(range(10_000, 30_000)) as listener:
        taken = listener.getsockname()[1]
        slurm.finish(SLURM_JOB_ID=str(taken - 10_000))
    assert int(environment_of_srun(slurm)["MASTER_PORT"]) > taken


def test_what_the_caller_sets_wins(slurm: FakeSlurm) -> None:
    slurm.finish(NCCL_DEBUG="INFO", OMP_NUM_THREADS="1")
    environment = environment_of_srun(slurm)
    assert (environment["NCCL_DEBUG"], environment["OMP_NUM_THREADS"]) == ("INFO", "1")


def test_pyxis_runs_the_container(slurm: FakeSlurm) -> None:
    slurm.finish("a=1", CONTAINER="image.sqsh", MOUNTS="/corpus:/corpus", SRUN_HELP="... --container-image=IMAGE ...")
    options = slurm.read("srun.arguments").splitlines()
    assert "--container-image=image.sqsh" in options
    assert f"--container-mounts={slurm.folder}:{slurm.folder},{slurm.folder}:{slurm.folder},/corpus:/corpus" in options
    assert options[-3:] == ["python", f"{slurm.folder}/train.py", "a=1"]


def test_apptainer_runs_the_container_where_there_is_no_pyxis(slurm: FakeSlurm) -> None:
    slurm.write("bin/apptainer", '#!/usr/bin/env bash\necho "$@" > apptainer.arguments\n').chmod(0o755)
    slurm.finish("a=1", CONTAINER="image.sif")
    assert re.search(r"^exec --nv --bind .* image.sif python .*/train.py a=1$", slurm.read("apptainer.arguments"))


def test_a_container_that_nothing_can_run_is_refused(slurm: FakeSlurm) -> None:
    assert slurm.finish(CONTAINER="image.sif") == 78
    assert "error: CONTAINER=image.sif: this SLURM has no --container-image" in slurm.log.read_text()


def test_a_folder_without_code_is_refused(slurm: FakeSlurm) -> None:
    assert slurm.finish(CODE="/nowhere") == 78
    assert "error: /nowhere/train.py does not exist" in slurm.log.read_text()
