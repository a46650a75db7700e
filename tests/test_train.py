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
from nets import build_matcher
from tests.tiny_dump import make_tiny_dump
from tools.checkpoint import load_checkpoint
from tools.cli import InputError, run
from training.config import DEFAULTS
from training.trainer import build, learning_rate, warm_start

REPOSITORY = Path(__file__).parent.parent
SMALL = {"layers": 4, "max_keypoints": 48, "min_inliers": 8, "max_inliers": 24, "batch_size": 2, "epochs": 1,
         "its_per_epoch": 2, "workers": 0, "gpu": [-1]}


@pytest.fixture
def setup(tmp_path):
    """The path of a small config; what it trains goes to tmp_path / "run"."""
    make_tiny_dump(tmp_path / "dump", scenes=("0000", "0001", "0002"))
    config = {**SMALL, "base_path": str(tmp_path / "dump"), "save_path": str(tmp_path / "run")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def train_with(config, *arguments) -> int:
    return train.main(["--config", str(config), *map(str, arguments)])


def parameters(path) -> dict:
    return load_checkpoint(path)["model"]


def assert_same(one: dict, other: dict):
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_learning_rate_schedule():
    config = {**DEFAULTS, "lr": 1e-4, "decay_iter": 100, "decay_rate": 0.9, "min_lr": 1e-6}
    assert [learning_rate({**config, "warmup_its": 4}, step) for step in (0, 1, 3, 4)] == pytest.approx(
        [2.5e-5, 5e-5, 1e-4, 1e-4])
    assert learning_rate(config, 0) == learning_rate(config, 100) == 1e-4
    assert learning_rate(config, 101) == pytest.approx(0.9e-4)
    assert learning_rate(config, 110) == pytest.approx(0.9 ** 10 * 1e-4)
    assert learning_rate(config, 10 ** 6) == 1e-6


@pytest.mark.parametrize("network", ["imp", "eimp"])
def test_loss_falls_and_a_run_leaves_what_it_should(setup, tmp_path, network):
    (tmp_path / "train.txt").write_text("0000\n0001\n")
    (tmp_path / "val.txt").write_text("0002\n")
    arguments = ("--network", network, "--n_min_tokens", 16, "--batch_size", 4,
                 "--scene_list_fn", tmp_path / "train.txt", "--val_scene_list_fn", tmp_path / "val.txt",
                 "--val_pairs", 8, "--epochs", 4, "--its_per_epoch", 5, "--keep_checkpoints", 2)
    assert train_with(setup, *arguments) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.glob("*.pth")} == {"latest.pth", "best.pth", "epoch_00002.pth", "epoch_00003.pth"}
    assert (run / "loss.png").stat().st_size > 2000
    assert json.loads((run / "config.json").read_text())["network"] == network
    assert load_checkpoint(run / "latest.pth")["scenes"] == ["0000", "0001"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [scalar.value for scalar in events.Scalars("train/loss")]
    assert len(losses) == 20
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    validation = [scalar.value for scalar in events.Scalars("val/loss")]
    assert load_checkpoint(run / "best.pth")["best"] == pytest.approx(min(validation), rel=1e-6)


@pytest.mark.parametrize("network, norm", [("imp", "in"), ("eimp", "bn")])
def test_resumed_equals_never_stopped(setup, tmp_path, network, norm):
    options = ("--network", network, "--norm_fn", norm, "--n_min_tokens", 16, "--its_per_epoch", 2)
    train_with(setup, *options, "--epochs", 3, "--save_path", tmp_path / "whole")
    train_with(setup, *options, "--epochs", 1)
    train_with(setup, *options, "--epochs", 3, "--resume_path", tmp_path / "run")
    whole, resumed = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "run"))
    assert_same(whole["model"], resumed["model"])
    assert whole["step"] == resumed["step"] == 6
    for one, other in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert_same(one, other)


def test_a_run_is_not_overwritten(setup, tmp_path, capsys):
    train_with(setup)
    before = (tmp_path / "run" / "latest.pth").read_bytes()
    assert run(train.main, ["--config", str(setup)]) == 2
    assert "--resume_path" in capsys.readouterr().err
    assert (tmp_path / "run" / "latest.pth").read_bytes() == before


@pytest.mark.parametrize("arguments, message", [
    (("--layers", "3"), "was trained with layers 4, now it is 3"),
    (("--lr", "0.5"), "was trained with lr 0.0001"),
])
def test_going_on_with_other_settings_is_refused(setup, tmp_path, arguments, message):
    train_with(setup)
    with pytest.raises(InputError, match=message):
        train_with(setup, "--resume_path", tmp_path / "run", *arguments)


def test_going_on_with_other_scenes_is_refused(setup, tmp_path):
    train_with(setup)
    (tmp_path / "train.txt").write_text("0001\n")
    with pytest.raises(InputError, match="other scenes"):
        train_with(setup, "--resume_path", tmp_path / "run", "--scene_list_fn", tmp_path / "train.txt")


def test_weights_alone_start_a_run_but_do_not_resume_one(setup, tmp_path):
    train_with(setup)
    state = parameters(tmp_path / "run" / "latest.pth")
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="weight_path"):
        train_with(setup, "--resume_path", tmp_path / "weights.pth")
    train_with(setup, "--weight_path", tmp_path / "weights.pth", "--save_path", tmp_path / "more", "--lr", 0.0,
               "--min_lr", 0.0)
    assert_same(parameters(tmp_path / "more" / "latest.pth"), state)


@pytest.mark.parametrize("arguments, message", [
    (("--base_path", "nowhere"), "nowhere is no dump"),
    (("--feature", "spp"), "holds sift features"),
    (("--weight_path", "nowhere.pth"), "no checkpoint at nowhere.pth"),
    (("--resume_path", "nowhere.pth"), "no checkpoint at nowhere.pth"),
    (("--layer", "3"), "did you mean 'layers'"),
    (("--gpu", "99"), "gpu"),
])
def test_mistakes_end_with_one_line(setup, capsys, monkeypatch, arguments, message):
    if arguments[0] == "--gpu":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run(train.main, ["--config", str(setup), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_scenes_in_both_lists_are_refused(setup, tmp_path):
    (tmp_path / "list.txt").write_text("0001\n")
    with pytest.raises(InputError, match="scene 0001 is in both"):
        train_with(setup, "--val_scene_list_fn", tmp_path / "list.txt")


def test_losses_that_are_not_finite_end_the_run(setup, tmp_path):
    matcher = build_matcher("imp", descriptor_dim=128, n_layers=4)
    torch.nn.init.constant_(matcher.bin_score, float("nan"))
    torch.save({"model": matcher.state_dict()}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="not finite in 10 steps"):
        train_with(setup, "--weight_path", tmp_path / "nan.pth", "--its_per_epoch", 20)


def test_a_few_losses_that_are_not_finite_are_skipped(setup, tmp_path):
    matcher = build_matcher("imp", descriptor_dim=128, n_layers=4)
    torch.nn.init.constant_(matcher.kenc.encoder[0].bias, float("nan"))
    torch.save({"model": matcher.state_dict()}, tmp_path / "nan.pth")
    assert train_with(setup, "--weight_path", tmp_path / "nan.pth", "--its_per_epoch", 3) == 0
    saved = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert saved["step"] == 3
    assert torch.equal(saved["model"]["bin_score"], torch.tensor(1.0))


def test_time_budget_stops_with_a_checkpoint(setup, tmp_path):
    assert train_with(setup, "--epochs", 10000, "--max_minutes", 0.02) == 0
    assert 0 < load_checkpoint(tmp_path / "run" / "latest.pth")["step"] < 20000


def test_warm_start_is_a_nearest_neighbour_matcher():
    rng = torch.Generator().manual_seed(0)
    descriptors0 = torch.nn.functional.normalize(torch.randn(1, 80, 128, generator=rng).abs(), dim=-1)
    noise = torch.randn(1, 80, 128, generator=rng) * 0.03
    descriptors1 = torch.nn.functional.normalize(descriptors0 + noise, dim=-1).flip(1)
    data = {"descriptors0": descriptors0, "descriptors1": descriptors1}
    for v in "01":
        data[f"norm_keypoints{v}"] = torch.rand(1, 80, 2, generator=rng) - 0.5
        data[f"scores{v}"] = torch.rand(1, 80, generator=rng)
    config = {**DEFAULTS, "layers": 9}
    right = {}
    for init in ("published", "warm"):
        matcher = build({**config, "init": init}).eval()
        with torch.no_grad():
            matches0 = matcher(data)["matches0"]
        right[init] = (matches0 == torch.arange(79, -1, -1)).float().mean().item()
    assert right["warm"] > 0.95
    assert right["published"] < 0.5


def test_warm_start_gain():
    for dim in (128, 256):
        matcher = build_matcher("imp", descriptor_dim=dim, n_layers=1)
        warm_start(matcher)
        gain = matcher.final_proj[0].weight[0, 0, 0].item()
        assert gain ** 2 / dim ** 0.5 == pytest.approx(39, rel=1e-5)
    assert matcher.bin_score.item() == 30


def start(setup, *arguments):
    return subprocess.Popen([sys.executable, "train.py", "--config", str(setup), *map(str, arguments)], cwd=REPOSITORY,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_the_run_goes_on(setup, tmp_path, number):
    process = start(setup, "--epochs", 100000, "--workers", 1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "epoch_00001.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped" in output
    step = load_checkpoint(tmp_path / "run" / "latest.pth")["step"]
    assert step >= 4
    # what it saved is what a run of as many steps that nobody stopped has
    whole = start(setup, "--its_per_epoch", step, "--save_path", tmp_path / "whole")
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    assert_same(parameters(tmp_path / "whole" / "latest.pth"), parameters(tmp_path / "run" / "latest.pth"))


def torchrun(setup, *arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           "train.py", "--config", str(setup), *map(str, arguments)], cwd=REPOSITORY, text=True,
                          capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("network", ["imp", "eimp"])
def test_two_processes_train_as_one(setup, tmp_path, network):
    options = ("--network", network, "--n_min_tokens", 16, "--batch_size", 4, "--its_per_epoch", 4)
    result = torchrun(setup, *options, "--save_path", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-2000:]
    train_with(setup, *options)
    one, two = parameters(tmp_path / "run" / "latest.pth"), parameters(tmp_path / "two" / "latest.pth")
    begin = build({**DEFAULTS, **SMALL, "network": network, "n_min_tokens": 16}).state_dict()
    # Weights alone: Adam moves a bias whose gradient is zero but for rounding by a full step of either sign.
    weights = [name for name in one if name.endswith("weight")]
    moved = sum((one[name] - begin[name]).square().sum() for name in weights).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in weights).sqrt()
    assert apart < 0.01 * moved


def test_batch_norm_in_several_processes_on_the_cpu_is_refused(setup):
    result = torchrun(setup, "--norm_fn", "bn")
    assert result.returncode != 0
    assert "norm_fn bn with several processes needs GPUs" in result.stderr
