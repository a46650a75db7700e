"""The recipe of the weights: the whole way in miniature, stopped once, and how the minutes are divided."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import plane_scene
import pytest
import torch
from test_features import kornia_extractor

from tools.checkpoint import load_matcher
from tools.cli import InputError, run
from tools.files import write_bytes, write_image
from tools.geometry import make_pose
from training import weights

ROOT = Path(__file__).parents[1]
MINIATURE = """
import sys
from tools.cli import run
from training import weights
weights.MOST_SCENES, weights.HELDOUT_SCENES = 2, 1
weights.SCENE_OPTIONS = ("--images_per_scene", 4, "--size", 200, 152, "--workers", 1)
weights.FEATURE_OPTIONS = ("--max_keypoints", 300, "--min_keypoints", 128, "--workers", 1)
sys.exit(run(weights.main))
"""
KEYS = ("--layers 5 --max_keypoints 96 --min_keypoints 64 --min_inliers 8 --max_inliers 48 --view_size 200 "
        "--extract_keypoints 300 --batch_size 4 --its_per_epoch 2 --workers 0 --gpu -1").split()


@pytest.fixture
def inputs(tmp_path):
    """Three photographs, and an RGB-D sequence of four frames to train on and four to evaluate on."""
    kornia_extractor("aliked")
    pictures = [plane_scene.texture(i) for i in range(3)]
    for i, picture in enumerate(pictures):
        write_image(tmp_path / "photos" / f"{i}.jpg", picture[:270, :360])
    folder = tmp_path / "sequence"
    for i in range(4):
        R = cv2.Rodrigues(np.array([0, 0, 0.3 * i]))[0]
        pose = make_pose(R, -R @ [0.4 * i - 0.5, 0.1 * i, 0.15 * i])
        for number, picture in ((i, pictures[0]), (weights.FIRST_VAL + i, pictures[1])):
            image, depth = plane_scene.view(picture, pose)
            stem = f"frame-{number:06d}"
            write_image(folder / f"{stem}.color.jpg", image)
            write_image(folder / f"{stem}.depth.png", np.round(1000 * depth).astype(np.uint16))
            np.savetxt(folder / f"{stem}.pose.txt", np.linalg.inv(pose))
    np.savetxt(folder / "camera-intrinsics.txt", plane_scene.K)
    return tmp_path


def start(folder, *more) -> subprocess.Popen:
    command = [sys.executable, "-c", MINIATURE, "--photos", "photos", "--kitchen", "sequence", "--minutes", "60",
               "--eval_pairs", "2", *KEYS, *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_recipe_resumes_what_was_stopped(inputs):
    folder = inputs / weights.RUNS
    first = start(inputs, "--epochs", "1000")
    while not (folder / "imp" / "epoch_00000.pth").exists() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[0]
    assert first.returncode == 130, said
    stopped_at = torch.load(folder / "imp" / "latest.pth")["step"]
    made = {path: path.stat().st_mtime_ns for path in (inputs / weights.DATA).rglob("*.npy")}
    seconds = json.loads((folder / "clock.json").read_text())["seconds"]
    assert set(seconds) == {"scenes", "features", "imp"} and any("scenes_aliked" in str(path) for path in made)

    second = start(inputs, "--epochs", str(stopped_at // 2 + 1))
    said = second.communicate()[0]
    assert second.returncode == 0, said
    # nothing is made or trained twice
    assert made == {path: path.stat().st_mtime_ns for path in (inputs / weights.DATA).rglob("*.npy")}
    stages = {command.split()[4].removeprefix(f"{weights.RUNS}/"): command
              for command in said.split("+ -m ") if command.startswith("train ")}
    assert list(stages) == ["imp", "imp_decay", "eimp"]
    assert "epoch 0:" not in stages["imp"] and "epoch 0:" in stages["eimp"]
    clock = json.loads((folder / "clock.json").read_text())
    assert clock["done"] == list(weights.SHARES) and clock["seconds"]["imp"] > seconds["imp"]
    assert {name: clock["seconds"][name] for name in ("scenes", "features")} == {
        name: seconds[name] for name in ("scenes", "features")}

    steps = {name: torch.load(folder / name / "latest.pth")["step"] for name in stages}
    assert steps["imp"] >= stopped_at and steps["eimp"] == 2 * (stopped_at // 2 + 1)
    start_of_eimp, imp = (json.loads((folder / name / "config.json").read_text()) for name in ("eimp", "imp"))
    assert start_of_eimp["weight_path"] == str(weights.RUNS / "imp" / "latest.pth")
    assert start_of_eimp["network"] == "eimp" and start_of_eimp["decay_rate"] < 1
    assert [source["path"] for source in imp["online_sources"]] == [
        f"{weights.DATA}/{name}" for name in ("photos", "scenes_aliked", "kitchen_aliked")]
    for network in ("imp", "eimp"):
        path = folder / f"{network}_aliked_open.pth"
        assert load_matcher(path, network, 128).n_layers == 5 and path.stat().st_size < 16e6
    for name in ("kitchen", "procedural"):
        methods = json.loads((folder / name / "results.json").read_text())["tables"][0]["methods"]
        assert list(methods) == ["NN", "IMP", "IMP iterative", "EIMP", "EIMP iterative", "LightGlue",
                                 "LightGlue iterative"]
    assert "\n  EIMP iterative: kitchen " in said


def test_no_source_gives_more_than_half_of_the_samples():
    config = weights.load_train_config(weights.CONFIG, [])
    shares = np.array([source["weight"] for source in config["online_sources"]])
    assert len(shares) == 3 and shares.sum() == pytest.approx(1) and (shares <= 0.5).all()


def test_minutes_are_divided(tmp_path):
    clock = weights.Clock(tmp_path / "clock.json", minutes=10)
    assert clock.budget("scenes") == pytest.approx(600 * weights.SHARES["scenes"])
    assert not clock.spend("scenes", 20)
    assert clock.budget("imp") == pytest.approx(580 * 0.4 / 0.7)  # what the stages before it leave
    clock = weights.Clock(tmp_path / "clock.json", minutes=10)
    assert not clock.spend("scenes", 39) and clock.spend("scenes", 2)
    clock.spend("imp", 1000)
    assert clock.budget("eimp") == 0


def test_a_command_ends_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(weights, "POLL_SECONDS", 0.05)
    asked = []
    weights.call("http.server", "0", is_over=lambda seconds: asked.append(seconds) or len(asked) > 2)  # for ever
    assert len(asked) > 2
    with pytest.raises(InputError, match=r"http\.server ended with status"):
        weights.call("http.server", "--no_such_option")


def test_a_stage_that_gives_nothing_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "POLL_SECONDS", 0.05)
    clock = weights.Clock(tmp_path / "clock.json", minutes=0.01)
    with pytest.raises(InputError, match=r"run again with more --minutes"):
        weights.call_stage(clock, "scenes", tmp_path / "*.txt", "http.server", "0")
    assert not clock.done
    write_bytes(tmp_path / "one.txt", b"")
    weights.call_stage(clock, "scenes", tmp_path / "*.txt", "http.server", "0")
    assert clock.done == ["scenes"]
    clock.minutes = 60  # time that a stage which is done does not take
    weights.call_stage(clock, "scenes", tmp_path / "*.txt", "http.server", "--no_such_option")


def test_mistakes_are_found_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--photos", str(tmp_path), "--kitchen", str(tmp_path), "--minutes", "1"]
    for more, expected in ((["--layer", "3"], "layer"), (["--photos", "nowhere"], "--photos nowhere is not a folder")):
        assert run(weights.main, [*options, *more]) == 2
        assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
