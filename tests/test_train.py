import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from nets import build_matcher
from tests.tiny_dump import make_consistent, make_tiny_dump
from tools.checkpoint import load_checkpoint, load_weights, save_checkpoint
from tools.cli import InputError, run
from tools.distributed import Job
from tools.files import write_image
from tools.locks import locked
from tools.manifest import match_path
from tools.records import read_record, write_record
from tools.visualize import VIEW_BRIGHTNESS
from training import curves, trainer
from training.config import DEFAULTS, load_train_config
from training.data import Choice, DumpSource, Samples
from training.state import load_optimizer, optimizer_state, read_state
from training.trainer import build, learning_rate
from training.validation import match_pictures

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


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """A folder with a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("once")
    make_tiny_dump(folder / "dump")
    (folder / "config.json").write_text(json.dumps({**SMALL, "base_path": str(folder / "dump")}))
    train_with(folder / "config.json", "--save_path", folder / "run")
    return folder


def train_with(config, *arguments) -> int:
    return train.main(["--config", str(config), *map(str, arguments)])


def damage(dump) -> Path:
    """Cut a record of a dump short; returns its path."""
    path = sorted((dump / "keypoints").rglob("*.npy"))[0]
    path.write_bytes(path.read_bytes()[:1000])
    return path


def spoil(dump) -> None:
    """Make the descriptors of an image not finite, and with them the loss of every batch that it is in."""
    path = sorted((dump / "keypoints").rglob("*.npy"))[0]
    record = read_record(path)
    write_record(path, {**record, "descriptors": np.full_like(record["descriptors"], np.nan)})


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


def test_last_layers_of_branches_learn_at_their_share(setup):
    """Adam's first step has the size of the learning rate, whatever the gradient is."""
    train_with(setup, "--its_per_epoch", 1, "--lr", 1e-3, "--branch_lr", 0.25)
    before = build(load_train_config(setup, [])).state_dict()
    after = parameters(setup.parent / "run" / "latest.pth")
    sizes = {name: (after[name] - before[name]).abs().max().item() for name in after}
    last = [name for name in sizes if name.startswith("kenc.encoder.12.") or ".mlp.3." in name]
    assert len(last) == 2 + 2 * 8
    assert max(sizes[name] for name in last) == pytest.approx(0.25e-3, rel=1e-3)
    assert max(size for name, size in sizes.items() if name not in last) == pytest.approx(1e-3, rel=1e-3)
    # and when gone on with
    train_with(setup, "--its_per_epoch", 1, "--lr", 1e-3, "--branch_lr", 0.25, "--epochs", 2,
               "--resume_path", setup.parent / "run")
    assert run(train.main, ["--config", str(setup), "--its_per_epoch", "1", "--lr", "1e-3", "--epochs", "3",
                            "--resume_path", str(setup.parent / "run")]) == 2


def test_gradient_is_clipped(setup, tmp_path):
    def mean_gradient(name: str, *arguments) -> float:
        """Norm of Adam's running mean after one step: a tenth of the gradient that it was given."""
        train_with(setup, "--its_per_epoch", 1, "--save_path", tmp_path / name, *arguments)
        state = load_checkpoint(tmp_path / name / "latest.pth")["optimizer"]["state"]
        return torch.cat([values["exp_avg"].flatten() for values in state.values()]).norm().item()

    own = mean_gradient("own")
    assert mean_gradient("clipped", "--clip_grad", own) == pytest.approx(0.1 * own, rel=1e-3)  # own is a tenth of it
    assert mean_gradient("below", "--clip_grad", 20 * own) == own


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


def test_stopped_in_mid_epoch_again_and_again_equals_never_stopped(setup, tmp_path, capsys):
    damage(tmp_path / "dump")
    options = ("--its_per_epoch", 4, "--epochs", 2)
    assert train_with(setup, *options, "--save_path", tmp_path / "whole") == 1
    listed = capsys.readouterr().err
    for step in range(1, 9):  # each time the minutes are over after one step
        train_with(setup, *options, "--max_minutes", 1e-9, "--resume_path", tmp_path / "run")
        assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == step
        errors = capsys.readouterr().err
    whole, resumed = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "run"))
    assert_same(whole["model"], resumed["model"])
    for one, other in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert_same(one, other)
    assert scalars(tmp_path / "run")["train/loss"] == scalars(tmp_path / "whole")["train/loss"]
    # what could not be read is counted from the start
    assert "1 pairs skipped" in listed and errors == listed


def test_checkpoints_of_earlier_versions_are_gone_on_with(setup, tmp_path):
    train_with(setup)
    path = tmp_path / "run" / "latest.pth"
    content = load_checkpoint(path)
    for name in ("bad", "draw_size", "skipped", "validation_due"):
        del content[name]
    torch.save({**content, "version": 1}, path)
    assert train_with(setup, "--resume_path", tmp_path / "run", "--epochs", 2) == 0
    assert load_checkpoint(path)["step"] == 4


def random_batch(k):
    rng = np.random.default_rng(k)
    data = {f"{name}{v}": torch.from_numpy(rng.normal(size=(2, 12, *shape)).astype(np.float32))
            for v in "01" for name, shape in (("descriptors", (8,)), ("norm_keypoints", (2,)), ("scores", ()))}
    target = torch.where(torch.arange(12) < 8, torch.arange(12), 12).expand(2, -1)
    return {**data, "target0": target, "target1": target}


def test_a_run_from_before_the_layout_changed_takes_the_same_steps():
    """resume_6fc8d3a.pth: after two steps on random_batch, with the losses of four and the norms of the weights then,
    made by a version whose parameters had the published layout, with Adam's moments alike."""
    path = Path(__file__).parent / "golden/resume_6fc8d3a.pth"
    content = read_state(path)
    matcher = build_matcher("imp", descriptor_dim=8, n_layers=4)
    optimizer = torch.optim.Adam(matcher.parameters(), lr=1e-3)
    load_weights(matcher, content["model"], path)
    load_optimizer(matcher, optimizer, content["optimizer"], path)
    assert_same(matcher.state_dict(), content["model"])
    for i, moments in optimizer_state(matcher, optimizer)["state"].items():
        assert_same(moments, content["optimizer"]["state"][i])
    moved = set()
    for k in (2, 3):
        optimizer.zero_grad()
        loss = matcher(random_batch(k))["loss"]
        loss.backward()
        optimizer.step()
        moved |= {name for name, value in matcher.named_parameters() if value.grad.abs().max() > 1e-6}
        assert loss.item() == pytest.approx(content["losses"][k], rel=1e-5)
    # biases before a norm, and of keys, change nothing: their gradient is rounding, of which Adam makes whole steps
    state = matcher.state_dict()
    assert len(moved) > 60 and all(name.endswith(".bias") for name in set(state) - moved)
    for name in moved:
        assert state[name].norm().item() == pytest.approx(content["norms"][name], rel=1e-3, abs=1e-4), name


def in_moments(change):
    return lambda content: change(content["optimizer"]["state"][3])


@pytest.mark.parametrize("spoil, message", [
    (lambda content: content.update(optimizer=[1]), "its optimizer has not the 1 groups"),
    (lambda content: content["optimizer"]["param_groups"].append({}), "its optimizer has not the 1 groups"),
    (lambda content: content["optimizer"]["param_groups"][0].update(betas=0.9), r"betas 0.9, not \(0.9, 0.999\)"),
    (lambda content: content["optimizer"]["param_groups"][0].update(params=[0]), r"params \[0\], not"),
    (lambda content: content["optimizer"]["param_groups"][0].update(lr="fast"), "lacks a learning rate"),
    (lambda content: content["optimizer"]["state"].update(x={}), "moments of 108 parameters that are not the 107"),
    (lambda content: content["optimizer"]["state"].pop(7), "moments of 106 parameters that are not the 107"),
    (in_moments(lambda values: values.pop("exp_avg")), "else than exp_avg, exp_avg_sq, step of parameter 3"),
    (in_moments(lambda values: values.update(exp_avg=torch.zeros(7))), "a exp_avg of parameter 3 that cannot be"),
    (in_moments(lambda values: values["exp_avg_sq"].fill_(-1)), "a exp_avg_sq of parameter 3 that cannot be"),
    (in_moments(lambda values: values["exp_avg"].fill_(torch.nan)), "a exp_avg of parameter 3 that cannot be"),
    (in_moments(lambda values: values.update(step="many")), "a step of parameter 3 that cannot be"),
    (lambda content: content.update(step=1.5), "its step is 1.5"),
    (lambda content: content.update(best="low"), "its best is 'low'"),
    (lambda content: content.update(bad=[[1, [2]]]), r"its bad is \[\[1, \[2\]\]\]"),
    (lambda content: content.update(skipped=[["a", "b"]]), "its skipped is"),
    (lambda content: content.update(scenes=None), "its scenes is None"),
    (lambda content: content.update(config={"lr": torch.zeros(2)}), "its config is"),
])
def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path, run_once, spoil, message):
    path = tmp_path / "latest.pth"
    content = load_checkpoint(run_once / "run" / "latest.pth")
    spoil(content)
    torch.save(content, path)
    matcher = build({**DEFAULTS, **SMALL})
    optimizer = torch.optim.Adam(matcher.parameters())
    with pytest.raises(InputError, match=message) as raised:
        load_optimizer(matcher, optimizer, read_state(path)["optimizer"], path)
    assert str(path) in str(raised.value) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("spoil, message", [
    (lambda content: content.update(optimizer=[1]), "its optimizer has not the 1 groups"),
    (lambda content: content["config"].update(online_sources=np.float64(1)), "trained with online_sources 1.0"),
    (lambda content: content["config"].update(online_sources=[5]), r"trained with online_sources \[5\]"),
])
def test_training_does_not_resume_from_a_damaged_checkpoint(tmp_path, run_once, spoil, message):
    content = load_checkpoint(run_once / "run" / "latest.pth")
    spoil(content)
    torch.save(content, tmp_path / "latest.pth")
    with pytest.raises(InputError, match=message):
        train_with(run_once / "config.json", "--save_path", tmp_path, "--resume_path", tmp_path / "latest.pth")


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


def test_a_run_goes_on_without_the_weights_that_it_started_from(setup, tmp_path):
    torch.save({"model": build({**DEFAULTS, **SMALL}).state_dict()}, tmp_path / "weights.pth")
    options = ("--weight_path", tmp_path / "weights.pth", "--resume_path", tmp_path / "run")
    train_with(setup, *options)
    (tmp_path / "weights.pth").unlink()
    assert train_with(setup, *options, "--epochs", 2) == 0
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == 4


@pytest.mark.parametrize("arguments, message", [
    (("--base_path", "nowhere"), "nowhere is not a dump"),
    (("--feature", "spp"), "holds sift features"),
    (("--max_keypoints", "128"), "dump with --min_keypoints 128"),
    (("--weight_path", "nowhere.pth"), "no checkpoint at nowhere.pth"),
    (("--resume_path", "nowhere.pth"), "no checkpoint at nowhere.pth"),
    (("--layer", "3"), "did you mean 'layers'"),
    (("--gpu", "99"), "gpu names 99"),
    (("--gpu", "a"), "gpu ['a']: expected numbers"),
    (("--lr", "-1"), "lr -1.0: expected at least 0"),
    (("--lr", "NaN"), "lr nan: expected a finite number"),
    (("--save_path", "config.json"), "config.json is a file, not a folder"),
    (("--save_path", "config.json/run"), "config.json is a file, not a folder"),
])
def test_mistakes_end_with_one_line(setup, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(setup.parent)
    if arguments == ("--gpu", "99"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run(train.main, ["--config", str(setup), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_scenes_in_both_lists_are_refused(setup, tmp_path):
    (tmp_path / "list.txt").write_text("0001\n")
    with pytest.raises(InputError, match="scene 0001 is in both"):
        train_with(setup, "--val_scene_list_fn", tmp_path / "list.txt")


def test_going_on_where_nothing_is_yet_begins_a_run(setup, tmp_path):
    """What torchrun starts again, or a job queue, has one command for both."""
    same = ("--resume_path", tmp_path / "run")
    assert train_with(setup, *same) == 0
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == 2
    train_with(setup, *same, "--epochs", 2)
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == 4


def test_losses_that_are_not_finite_end_the_run(setup, tmp_path):
    matcher = build_matcher("imp", descriptor_dim=128, n_layers=4)
    torch.nn.init.constant_(matcher.bin_score, float("nan"))
    torch.save({"model": matcher.state_dict()}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="not finite in 10 steps"):
        train_with(setup, "--weight_path", tmp_path / "nan.pth", "--its_per_epoch", 20)


def test_a_few_losses_that_are_not_finite_are_skipped(setup, tmp_path, capsys):
    matcher = build_matcher("imp", descriptor_dim=128, n_layers=4)
    torch.nn.init.constant_(matcher.kenc.encoder[0].bias, float("nan"))
    torch.save({"model": matcher.state_dict()}, tmp_path / "nan.pth")
    assert train_with(setup, "--weight_path", tmp_path / "nan.pth", "--its_per_epoch", 3) == 0
    saved = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert saved["step"] == 3
    assert torch.equal(saved["model"]["bin_score"], torch.tensor(1.0))
    assert "epoch 0: step 3, no loss was finite" in capsys.readouterr().out


def test_a_step_left_out_leaves_no_trace(setup, tmp_path, capsys):
    spoil(tmp_path / "dump")
    assert train_with(setup, "--its_per_epoch", 12, "--norm_fn", "bn") == 0
    losses = np.array(scalars(tmp_path / "run")["train/loss"])
    finite = np.isfinite(losses[:, 1])
    assert 0 < finite.sum() < 12
    # in running statistics, in the line of the epoch, in the picture
    assert all(value.isfinite().all() for value in parameters(tmp_path / "run" / "latest.pth").values())
    assert f"step 12, loss {losses[finite, 1].mean():.4f}, precision" in capsys.readouterr().out
    drawn = curves.read_curves(tmp_path / "run", {"training": "train/loss"}, 120)
    np.testing.assert_array_equal(np.transpose(drawn["training"]), losses[finite])


def test_what_a_killed_process_left_half_written_is_removed(setup, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    folder = tmp_path / "run"
    folder.mkdir()
    names = [f".epoch_00009.{number}.tmp.pth" for number in (process.pid, os.getpid(), os.getppid())]
    for name in (*names, ".hidden", ".tmp"):
        (folder / name).touch()
    train_with(setup)
    assert {path.name for path in folder.glob(".*")} == {names[2], ".hidden", ".tmp"}  # its process still runs


def test_time_budget_stops_with_a_checkpoint(setup, tmp_path):
    assert train_with(setup, "--epochs", 10000, "--max_minutes", 0.02) == 0
    assert 0 < load_checkpoint(tmp_path / "run" / "latest.pth")["step"] < 20000


def start(setup, *arguments):
    return subprocess.Popen([sys.executable, "train.py", "--config", str(setup), *map(str, arguments)], cwd=REPOSITORY,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_the_run_goes_on(setup, tmp_path, number):
    process = start(setup, "--epochs", 100000, "--workers", 1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "epoch_00001.pth").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
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


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Everything logged: tag -> (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_runs_are_compared(setup, tmp_path, capsys):
    runs = [tmp_path / init for init in ("warm", "published")]
    for folder in runs:
        train_with(setup, "--init", folder.name, "--its_per_epoch", 90, "--layers", 1, "--save_path", folder)
        logged = scalars(folder)
        for name, (x, y) in curves.read_curves(folder, curves.COMPARED, curves.COMPARED_POINTS).items():
            values = np.array(logged[curves.COMPARED[name]])[:, 1]
            assert len(x) == 40 and (x[0], x[-1]) == (2, 89.5)
            assert (y[0], y[-1]) == pytest.approx((values[:3].mean(), values[-2:].mean()))
    path = tmp_path / "both.png"
    assert run(curves.main, [*map(str, runs), "--save_path", str(path)]) == 0
    assert path.stat().st_size > 10000
    for arguments, message in (([runs[0], tmp_path, "--save_path", path], f"{tmp_path} holds no log of a run"),
                               ([runs[0], "--save_path", tmp_path], "name of a .png file")):
        assert run(curves.main, list(map(str, arguments))) == 2
        assert message in capsys.readouterr().err


def test_shipped_configs_are_read():
    paths = sorted((REPOSITORY / "configs").glob("config_train_*.json"))
    assert len(paths) >= 6
    for path in paths:
        assert load_train_config(path, [])["online"] == ("online" in path.stem or "open" in path.stem)


def test_what_is_logged(setup, tmp_path, capsys):
    train_with(setup, "--its_per_epoch", 20, "--init", "warm", "--warmup_its", 10)
    logged = scalars(tmp_path / "run")
    for name in ("loss", "matching_loss_corr", "matching_loss_incorr", "precision", "recall", "lr", "grad_norm",
                 "skipped_steps"):
        assert [step for step, _ in logged[f"train/{name}"]] == list(range(1, 21)), name
    assert dict(logged["train/lr"])[3] == pytest.approx(0.3e-4)
    assert all(value > 0 for _, value in logged["train/grad_norm"])
    assert all(value == 0 for _, value in logged["train/skipped_steps"])
    # per iteration, every tenth step, and their mean is what the step has
    for step in (10, 20):
        values = [dict(logged[f"iteration_loss/{t:02d}"])[step] for t in range(4)]
        assert np.mean(values) == pytest.approx(dict(logged["train/loss"])[step], rel=1e-4)
        assert len(set(values)) == 4
        assert all(0 < dict(logged[f"iteration_{name}/{t:02d}"])[step] <= 1
                   for name in ("precision", "recall") for t in range(4))
    assert [step for step, _ in logged["speed/samples_per_second"]] == [10, 20]
    assert all(0 <= share <= 1 for _, share in logged["speed/data_wait_share"])
    assert "epoch 0: step 20, loss" in capsys.readouterr().out


def test_precision_and_recall_count_matches(setup, tmp_path):
    """A warm start finds nearly all matches, and an assignment without dustbins matches the rest wrongly."""
    content = {"model": build({**DEFAULTS, **SMALL, "init": "warm"}).state_dict()}
    content["model"]["bin_score"].fill_(-50)
    torch.save(content, tmp_path / "greedy.pth")
    train_with(setup, "--weight_path", tmp_path / "greedy.pth", "--lr", 0.0, "--min_lr", 0.0, "--match_threshold", 0.0)
    logged = scalars(tmp_path / "run")
    for step, recall in logged["train/recall"]:
        assert recall > 0.9
        matches = dict(logged["train/acc_corr"])[step] / dict(logged["train/precision"])[step]
        assert matches == pytest.approx(dict(logged["train/total_matches"])[step], rel=1e-5)
        assert matches > dict(logged["train/total_acc_corr"])[step] + 1


def write_images(dump, folder):
    """Images under the names that a dump's records have."""
    for path in (dump / "keypoints").rglob("*.npy"):
        write_image(folder / read_record(path)["image_path"], np.full((480, 640), 128, np.uint8))


def test_poses_and_pictures_of_validation_pairs(setup, tmp_path):
    make_consistent(tmp_path / "dump")
    (tmp_path / "train.txt").write_text("0000\n")
    (tmp_path / "val.txt").write_text("0002\n")
    write_images(tmp_path / "dump", tmp_path / "images")
    arguments = ("--scene_list_fn", tmp_path / "train.txt", "--val_scene_list_fn", tmp_path / "val.txt",
                 "--val_pairs", 6, "--do_eval", 1, "--eval_epochs", 2, "--epochs", 4, "--its_per_epoch", 1,
                 "--init", "warm", "--lr", 0.0, "--min_lr", 0.0, "--min_inliers", 24)
    train_with(setup, *arguments, "--val_images", tmp_path / "images")
    logged = scalars(tmp_path / "run")
    assert [step for step, _ in logged["val/loss"]] == [1, 2, 3, 4]
    for name in ("auc5", "auc10", "auc20"):
        assert [step for step, _ in logged[f"val/{name}"]] == [2, 4]
        assert all(value > 0.9 for _, value in logged[f"val/{name}"])  # keypoints without noise, warm start
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == [f"step_000000{step}_{i}.jpg" for step in (2, 4) for i in range(4)]
    assert cv2.imread(str(tmp_path / "run" / "pictures" / pictures[0])).std() > 5
    # without the images it goes on, and says so
    process = start(setup, *arguments, "--val_images", tmp_path, "--save_path", tmp_path / "blind")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "no pictures of matches: image not found" in output


def test_pictures_are_of_the_pairs_that_samples_are_made_of(setup, tmp_path):
    dump, grays = tmp_path / "dump", {}
    for gray, path in enumerate(sorted((dump / "keypoints").rglob("*.npy"))):
        grays[read_record(path)["image_path"]] = 20 * gray
        write_image(tmp_path / read_record(path)["image_path"], np.full((480, 640), 20 * gray, np.uint8))
    samples = Samples([DumpSource(dump)], Choice(48, 8, 24))
    match_path(dump, *samples.sources[0].draws.draw(0)).write_bytes(b"")  # so another pair takes its place
    model = build({**DEFAULTS, **SMALL, "init": "warm"}).eval()
    picture = match_pictures(model, samples, tmp_path, torch.device("cpu"))[0][-480:]
    assert [np.median(view) for view in (picture[:, :640], picture[:, -640:])] == [
        VIEW_BRIGHTNESS * grays[path] for path in samples[0]["image_paths"]]


def test_pose_errors_of_unmatched_pairs_count_as_infinite(setup, tmp_path):
    (tmp_path / "val.txt").write_text("0002\n")
    (tmp_path / "train.txt").write_text("0000\n")
    train_with(setup, "--val_scene_list_fn", tmp_path / "val.txt", "--scene_list_fn", tmp_path / "train.txt",
               "--do_eval", 1, "--eval_epochs", 1, "--match_threshold", 1.0)
    assert scalars(tmp_path / "run")["val/auc20"][0][1] == 0


@pytest.fixture
def with_validation(setup, tmp_path):
    """Options that make a run validate on a dump at tmp_path / "val"."""
    make_tiny_dump(tmp_path / "val", scenes=("0009",), seed=1)
    return ("--val_path", tmp_path / "val", "--val_pairs", 4, "--epochs", 2)


def test_a_validation_that_cannot_be_read_loses_nothing(setup, with_validation, tmp_path, capsys):
    assert train_with(setup, *with_validation, "--save_path", tmp_path / "whole") == 0
    for path in (tmp_path / "val" / "matches").rglob("*.npy"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert run(train.main, ["--config", str(setup), *map(str, with_validation)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: validation: 20 pairs in a row make no sample") and error.count("\n") == 1
    folder = tmp_path / "run"
    assert load_checkpoint(folder / "latest.pth")["step"] == 2 and not (folder / "best.pth").exists()
    # mended, it goes on with the validation that was due
    make_tiny_dump(tmp_path / "val", scenes=("0009",), seed=1)
    assert train_with(setup, *with_validation, "--resume_path", folder) == 0
    assert scalars(folder)["val/loss"] == scalars(tmp_path / "whole")["val/loss"]
    whole, resumed = (load_checkpoint(tmp_path / name / "latest.pth") for name in ("whole", "run"))
    assert_same(whole["model"], resumed["model"])
    assert whole["best"] == resumed["best"] and not resumed["validation_due"]


def test_what_validation_cannot_read_is_counted_and_listed(setup, with_validation, tmp_path, capsys):
    path = damage(tmp_path / "val")
    assert train_with(setup, *with_validation) == 1
    error = capsys.readouterr().err
    assert "1 pairs skipped:" in error and path.name in error
    times = int(error.split("(")[-1].split(" ")[0])
    assert times >= 2 and times % 2 == 0  # the same in both epochs


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("n_written", range(1, 8))
def test_killed_between_files_no_checkpoint_speaks_of_a_best_that_is_not_there(setup, with_validation, tmp_path,
                                                                               monkeypatch, n_written):
    written = []

    def write(path, content):
        if len(written) == n_written:
            raise Killed
        save_checkpoint(path, content)
        written.append(path.name)

    options = (*with_validation, "--its_per_epoch", 1, "--lr", 0.01)
    monkeypatch.setattr(trainer, "save_checkpoint", write)
    with pytest.raises(Killed):
        train_with(setup, *options)
    folder = tmp_path / "run"
    told = [load_checkpoint(path)["best"] for path in folder.glob("*.pth")]
    assert all(best is None or load_checkpoint(folder / "best.pth")["best"] <= best for best in told)
    # and nothing is missing after it has gone on
    monkeypatch.undo()
    assert train_with(setup, *options, "--resume_path", folder) == 0
    losses = dict(scalars(folder)["val/loss"])
    assert load_checkpoint(folder / "best.pth")["best"] == pytest.approx(min(losses.values()), rel=1e-6)
    assert load_checkpoint(folder / "latest.pth")["best"] == load_checkpoint(folder / "best.pth")["best"]


def test_a_validation_loss_that_is_not_finite_is_never_the_best(setup, with_validation, tmp_path):
    spoil(tmp_path / "val")
    assert train_with(setup, *with_validation) == 0
    assert all(np.isnan(loss) for _, loss in scalars(tmp_path / "run")["val/loss"])
    assert not (tmp_path / "run" / "best.pth").exists()
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["best"] is None


def test_damaged_records_are_left_out_counted_and_listed(setup, tmp_path, capsys):
    path = damage(tmp_path / "dump")
    assert train_with(setup, "--its_per_epoch", 12, "--workers", 1) == 1
    error = capsys.readouterr().err
    assert "1 pairs skipped:" in error
    line = error.splitlines()[-1]
    assert path.name in line and "is not a whole record" in line
    times = int(line.split("(")[-1].split(" ")[0])
    assert 1 <= times <= 30
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["step"] == 12


def test_a_dump_of_damaged_records_ends_the_run_with_one_line(setup, tmp_path, capsys):
    for path in (tmp_path / "dump" / "keypoints").rglob("*.npy"):
        path.write_bytes(b"")
    assert run(train.main, ["--config", str(setup), "--workers", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "20 pairs in a row make no sample" in error


@pytest.mark.parametrize("workers", [0, 1])
def test_out_of_memory_names_what_to_lower(setup, tmp_path, workers):
    arguments = ["--online", "1", "--online_sources", json.dumps({"path": str(tmp_path / "dump")}), "--min_keypoints",
                 "1", "--max_keypoints", "12000000", "--workers", str(workers)]
    process = subprocess.run(
        [sys.executable, "train.py", "--config", str(setup), *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (10 ** 10, 10 ** 10)), text=True)
    error = process.stderr.strip()
    assert process.returncode == 2 and len(error.splitlines()) == 1, error
    assert "out of memory" in error and "batch_size 2" in error and "max_keypoints 12000000" in error


def test_a_folder_has_one_training(setup, tmp_path):
    with locked(tmp_path / "run" / ".lock"), pytest.raises(InputError, match="another training writes to"):
        train_with(setup)
    assert list((tmp_path / "run").glob("*")) == []
    assert train_with(setup) == 0
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("raised, status, said", [
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
     InputError, "--shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), InputError, "--shm-size"),
    (RuntimeError("CUDA error: out of memory"), InputError, "out of memory with batch_size 2"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), InputError,
     "out of memory with batch_size 2"),
    (RuntimeError("CUDA error"), RuntimeError, "CUDA error")])
def test_an_error_ends_the_run_and_its_processes(setup, monkeypatch, raised, status, said):
    def fail(*_):
        raise raised

    monkeypatch.setattr(trainer.Trainer, "_read", fail)
    with pytest.raises(status, match=said):
        train_with(setup, "--workers", 1)
    assert not multiprocessing.active_children()


def test_sample_making_processes_end_with_a_killed_run(setup, tmp_path):
    process = start(setup, "--epochs", 100000, "--workers", 1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "latest.pth").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=20)  # its output ends when the last process that has it is gone


def test_a_gpu_that_only_emulates_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with pytest.raises(InputError, match="an old GPU has none and would only emulate it"):
        trainer.Trainer({"batch_size": 2, "norm_fn": "in", "precision": "bfloat16"}, Job(0, 1, torch.device("cuda:0")))


def test_tf32_is_set_while_training_runs(setup, tmp_path, monkeypatch):
    seen, step = [], trainer.Trainer._step
    monkeypatch.setattr(trainer, "check_precision", lambda precision, device: precision)  # as on a GPU
    monkeypatch.setattr(trainer.Trainer, "_step", lambda self, batch: seen.append(
        torch.get_float32_matmul_precision()) or step(self, batch))
    for precision, state in (("tf32", "high"), ("float32", "highest")):  # the same run: resumed in another precision
        train_with(setup, "--precision", precision, "--its_per_epoch", 2, "--epochs", 1 + len(seen) // 2, "--save_path",
                   tmp_path, "--resume_path", tmp_path)
        assert seen[-2:] == [state] * 2 and torch.get_float32_matmul_precision() == "highest"
    assert len(seen) == 4


def test_deterministic_algorithms_on_request(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # to be put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    read, seen = trainer.Trainer._read, []

    def record(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return read(*arguments)

    monkeypatch.setattr(trainer.Trainer, "_read", record)
    try:
        for wanted in (0, 1):
            train_with(setup, "--its_per_epoch", 1, "--deterministic", wanted, "--save_path", tmp_path / f"run{wanted}")
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, None), (True, ":4096:8")]


def test_bfloat16_trains_like_float32(setup, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        train_with(setup, "--precision", precision, "--its_per_epoch", 8, "--save_path", folder, "--lr", 0.001)
        losses[precision] = np.array([value for _, value in scalars(folder)["train/loss"]])
        model = load_checkpoint(folder / "latest.pth")["model"]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in model.values())
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
    assert not np.array_equal(losses["bfloat16"], losses["float32"])
    assert losses["bfloat16"][-1] < losses["bfloat16"][0]
