"""Training in several processes, here on the CPU. What they compute is what one does with the same global batch."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from tests.tiny_dump import make_consistent, make_tiny_dump
from tools.checkpoint import load_checkpoint
from tools.cli import InputError
from tools.distributed import launch
from tools.locks import locked
from tools.records import read_record, write_record
from training.config import DEFAULTS
from training.trainer import build

REPOSITORY = Path(__file__).parent.parent
SMALL = {"layers": 4, "max_keypoints": 48, "min_inliers": 16, "max_inliers": 24, "batch_size": 4, "epochs": 1,
         "its_per_epoch": 4, "workers": 0, "gpu": [-1], "n_min_tokens": 16}
TWO = ("--gpu", "-1", "-1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def count_threads(job):
    return torch.get_num_threads()


def test_processes_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    for n in (2, 3):
        assert launch(count_threads, [-1] * n) <= max(1, cores // n)


def fail_in_one(job, error):
    def wait():  # under NCCL, for processes that never come
        raise AssertionError("destroyed the process group after an error")

    torch.distributed.destroy_process_group = wait
    if job.rank == 1:
        raise error
    torch.distributed.barrier()


@pytest.mark.parametrize("error", [InputError("a mistake"), KeyError("a bug")])
def test_an_error_in_one_process_ends_the_job_with_it(error):
    with pytest.raises(type(error)) as raised:
        launch(fail_in_one, [-1, -1], error)
    assert str(raised.value) == str(error)
    if isinstance(error, KeyError):  # --debug shows where
        assert "in fail_in_one" in raised.value.__notes__[0]


@pytest.fixture
def setup(tmp_path):
    """The path of a small config; what it trains goes to tmp_path / "run"."""
    make_consistent(make_tiny_dump(tmp_path / "dump"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SMALL, "base_path": str(tmp_path / "dump"), "save_path": str(tmp_path / "run")}))
    return path


def start(setup, *arguments, launcher=(), script="train.py"):
    return subprocess.Popen([sys.executable, *launcher, str(script), "--config", str(setup), *map(str, arguments)],
                            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
                            start_new_session=True)


def finish(process, seconds=240) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Training processes that a launcher has started."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_text()
        if "train.py" in command or "spawn_main" in command:
            found.append(int(child))
    return found


def weights(path) -> dict:
    # Adam moves a bias whose gradient is zero but for rounding by a full step of either sign
    return {name: value for name, value in load_checkpoint(path)["model"].items() if name.endswith("weight")}


def distance(one: dict, other: dict) -> float:
    return sum((one[name] - other[name]).square().sum() for name in one).sqrt().item()


def scalars(folder) -> dict[str, list[float]]:
    """What was logged: tag -> value at each step."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [scalar.value for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("network, with_pose", [("imp", 0), ("imp", 1), ("eimp", 1)])
def test_two_processes_train_as_one(setup, tmp_path, network, with_pose):
    options = ("--network", network, "--with_pose", with_pose, "--pose_start", 0, "--init", "warm")
    process = start(setup, *options, *TWO, "--save_path", tmp_path / "two")
    output = finish(process)
    assert process.returncode == 0, output
    assert train.main(["--config", str(setup), *map(str, options)]) == 0
    one, two = (weights(tmp_path / name / "latest.pth") for name in ("run", "two"))
    begin = build({**DEFAULTS, **SMALL, "network": network, "init": "warm"}).state_dict()
    moved = distance(one, begin)
    assert distance(one, two) < 0.01 * moved
    logged = [scalars(tmp_path / name) for name in ("run", "two")]
    names = ["loss", "precision", "grad_norm"] + with_pose * ["pose_loss"]
    assert [logged[1][f"train/{name}"][0] for name in names] == pytest.approx(
        [logged[0][f"train/{name}"][0] for name in names], rel=1e-3)
    if with_pose:
        train.main(["--config", str(setup), *map(str, options), "--with_pose", "0", "--save_path",
                    str(tmp_path / "plain")])
        assert distance(one, weights(tmp_path / "plain" / "latest.pth")) > 0.05 * moved


def test_torchrun_goes_on_after_a_rank_was_killed(setup, tmp_path):
    length = ("--its_per_epoch", 3, "--epochs", 6)
    whole = start(setup, *length, *TWO, "--save_path", tmp_path / "whole")
    process = start(setup, *length, "--resume_path", tmp_path / "run", launcher=(*TORCHRUN, "--max-restarts", "1"))
    wait_for(tmp_path / "run" / "epoch_00001.pth", process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert "exitcode: -9" in output
    assert finish(whole) and whole.returncode == 0
    results = [load_checkpoint(tmp_path / name / "latest.pth") for name in ("run", "whole")]
    assert [result["step"] for result in results] == [18, 18]
    assert all(torch.equal(value, results[1]["model"][name]) for name, value in results[0]["model"].items())


def test_a_rank_that_dies_ends_the_job(setup, tmp_path):
    process = start(setup, *TWO, "--epochs", 10000)
    wait_for(tmp_path / "run" / "epoch_00001.pth", process)
    ranks = [pid for pid in children(process.pid) if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(ranks[1], signal.SIGKILL)
    output = finish(process, 60)
    assert process.returncode != 0
    assert "process 1" in output or "Connection" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] >= 8


def test_a_signal_to_the_launching_process_alone_saves(setup, tmp_path):
    process = start(setup, *TWO, "--epochs", 10000)
    wait_for(tmp_path / "run" / "epoch_00000.pth", process)
    os.kill(process.pid, signal.SIGTERM)
    output = finish(process, 60)
    assert process.returncode == 0, output
    assert "stopped: checkpoints are in" in output
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] >= 4


FAILS_IN_ONE = """
import time
import torch, train
from tools.cli import InputError, run
from tools.distributed import leave
from training.trainer import Trainer

def wait():
    while True:
        time.sleep(1)

def fail_in_one(trainer, batch, step=Trainer._step):
    if trainer.step == 5:
        if trainer.job.rank == 1:
            raise {error}
        {other}
    return step(trainer, batch)

Trainer._step = fail_in_one
torch.distributed.destroy_process_group = wait  # under NCCL, for processes that never come
if __name__ == "__main__":
    leave(run(train.main))
"""


@pytest.mark.parametrize("launcher, error, other, said", [
    ((), "KeyError('a bug')", "wait()", "KeyError: 'a bug'"),  # under NCCL the other does not see that one has gone
    (TORCHRUN, "InputError('a mistake')", "pass", "error: a mistake")], ids=["spawned", "torchrun"])
def test_the_job_ends_with_the_message_of_the_process_that_fails(setup, tmp_path, launcher, error, other, said):
    script = tmp_path / "command.py"
    script.write_text(FAILS_IN_ONE.format(error=error, other=other))
    arguments = ("--epochs", 100, *(() if launcher else TWO))
    output = finish(start(setup, *arguments, launcher=launcher, script=script), 90)
    assert said in output, output
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == 4
    assert not list((tmp_path / "run").glob("*.tmp*"))
    with locked(tmp_path / "run" / ".lock", "held"):  # nobody holds it any more
        pass


@pytest.mark.parametrize("arguments, message", [
    (("--norm_fn", "bn"), "norm_fn bn with several processes needs GPUs"),
    (("--batch_size", "3"), "batch_size 3 does not divide over 2 processes"),
])
def test_a_mistake_is_told_once(setup, arguments, message):
    process = start(setup, *TWO, *arguments)
    output = finish(process)
    assert process.returncode == 2
    assert output.splitlines() == [output.strip()] and message in output


def test_losses_that_are_not_finite_are_skipped_by_all_together_and_their_pairs_named(setup, tmp_path):
    path = sorted((tmp_path / "dump" / "keypoints" / "0000").glob("*.npy"))[0]
    record = read_record(path)
    write_record(path, {**record, "descriptors": np.full_like(record["descriptors"], np.nan)})
    process = start(setup, *TWO, "--its_per_epoch", 100)
    output = finish(process)
    assert process.returncode == 2, output
    message = output.splitlines()[-1]
    assert "not finite in 10 steps" in message
    named = message.split("pairs: ")[1].split(", ")
    assert all(record["image_path"] in (pair["image_path0"], pair["image_path1"]) for pair in map(read_record, named))
    logged = scalars(tmp_path / "run")
    losses, skipped = logged["train/loss"], logged["train/skipped_steps"]
    # had one process taken the step, nothing would have been finite after it
    assert skipped == np.cumsum(~np.isfinite(losses)).tolist()
    assert skipped[-1] == 9 < len(losses)
