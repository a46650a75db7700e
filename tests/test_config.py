import json

import pytest

from tools.cli import InputError
from tools.config import load_config, parse_overrides
from training.config import DEFAULTS, load_train_config

SIMPLE = {"lr": 1e-4, "layers": 15, "with_sinkhorn": True, "gpu": [], "weight_path": None, "network": "imp"}


def load(tmp_path, content, *arguments):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_config(path, SIMPLE, list(arguments))


def test_file_over_defaults_and_command_line_over_both(tmp_path):
    config = load(tmp_path, {"lr": 0.1, "layers": 9}, "--layers", "7", "--gpu", "1", "--weight_path", "a.pth")
    assert config == {"lr": 0.1, "layers": 7, "with_sinkhorn": True, "gpu": [1], "weight_path": "a.pth",
                      "network": "imp"}


def test_zero_and_one_are_flags_and_whole_numbers_are_numbers(tmp_path):
    config = load(tmp_path, {"with_sinkhorn": 0, "lr": 1})
    assert config["with_sinkhorn"] is False
    assert isinstance(config["lr"], float)


@pytest.mark.parametrize("content, message", [
    ({"layer": 9}, "unknown key 'layer'; did you mean 'layers'"),
    ({"layers": 9.5}, "layers should be a whole number"),
    ({"layers": True}, "layers should be a whole number"),
    ({"gpu": 0}, "gpu should be a list"),
    ({"network": 3}, "network should be a text"),
    ("{not json", "not valid JSON"),
    ("[1]", "does not hold keys"),
])
def test_mistakes_in_the_file_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize("arguments, message", [
    (["--batchsize", "8"], "unknown key"),
    (["--layers", "many"], "layers should be a whole number"),
    (["--layers"], "--layers lacks a value"),
    (["layers", "3"], "unexpected argument"),
])
def test_mistakes_on_the_command_line_are_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, {}, *arguments)


def test_overrides_are_read_as_json_where_they_are():
    assert parse_overrides(["--a", "1e-3", "--b=true", "--c", "1", "2", "--d-e", "x/y.pth", "--f", "-1"]) == {
        "a": 1e-3, "b": True, "c": [1, 2], "d_e": "x/y.pth", "f": -1}


def test_missing_file():
    with pytest.raises(InputError, match=r"nowhere\.json"):
        load_train_config("nowhere.json", [])


@pytest.mark.parametrize("values, message", [
    ({"network": "superglue"}, "network 'superglue': expected one of gm"),
    ({"batch_size": 0}, "batch_size 0: expected at least 1"),
    ({"min_inliers": 50, "max_inliers": 20}, "min_inliers 50 is more"),
    ({"its_per_epoch": 0}, "its_per_epoch 0"),
])
def test_training_settings_are_checked(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        load_train_config(path, [])


def test_published_schedule_is_what_the_shipped_config_says():
    config = load_train_config("configs/config_train_megadepth.json", [])
    expected = {"network": "imp", "feature": "spp", "layers": 15, "lr": 1e-4, "min_lr": 1e-6, "decay_rate": 0.999992,
                "decay_iter": 200000, "batch_size": 16, "epochs": 10000, "its_per_epoch": 1000, "pairs_per_scene": 80,
                "max_keypoints": 1024, "min_inliers": 32, "max_inliers": 512, "init": "published", "norm_fn": "in",
                "ac_fn": "relu", "with_sinkhorn": True, "n_min_tokens": 256, "optim": "adam"}
    assert {key: config[key] for key in expected} == expected
    assert set(config) == set(DEFAULTS)
