import json

import pytest

import train
from tools.cli import InputError
from tools.config import load_config, parse_overrides, read_config
from training.config import DEFAULTS, SETTINGS, load_train_config

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


def test_texts_that_say_a_number_or_nothing(tmp_path):
    config = load(tmp_path, {"lr": "1e-4", "layers": "9", "weight_path": "None"})
    assert (config["lr"], config["layers"], config["weight_path"]) == (1e-4, 9, None)
    assert load(tmp_path, {"weight_path": "a.pth"}, "--weight_path", "null")["weight_path"] is None


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


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{one}: &{one} [{', '.join(['*' + other] * 8)}]\n" for other, one in zip("abcdefgh", "bcdefghi"))
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{one}: &{one} {{<<: [{', '.join(['*' + other] * 9)}]}}\n" for other, one in zip("abcdefghi", "bcdefghij"))


@pytest.mark.parametrize("suffix, content, message", [
    ("json", '{"lr": 1, "layers": 9, "lr": 2}', "key 'lr' is there twice"),
    ("yaml", "lr: 1\nlayers: 9\nlr: 2\n", "key 'lr' is there twice.*line 3"),
    ("yaml", "extractor: {a: 1, a: 1}", "key 'a' is there twice"),
    ("yaml", "lr: " + "[" * 5000, "not valid YAML: maximum recursion"),
    ("json", '{"lr": ' + "[" * 5000, "not valid JSON"),
    ("yaml", "layers: " + "9" * 5000, "not valid YAML"),
    ("json", '{"layers": ' + "9" * 5000 + "}", "not valid JSON"),
    ("yaml", "layers: 0x" + "f" * 5000, "a number of 20000 bits"),
    ("yaml", "lr: .nan", "lr nan: expected a finite number"),
    ("yaml", "lr: -.inf", "lr -inf: expected a finite number"),
    ("json", '{"lr": Infinity}', "lr inf: expected a finite number"),
    ("yaml", LAUGHS, "holds too much"),
    ("yaml", "lr: &a [*a]", "holds too much"),
    ("yaml", MERGES, "unknown key 'a'"),
    ("yaml", "lr: &a [1]\nlayers: [*a, *a, {x: *a}]", "lr should be a number, not \\[1\\]"),
    ("yaml", "5: 6", "key 5 is not text"),
    ("yaml", f"layers: [{', '.join(['x' * 99] * 99)}]", "layers should be a whole number, not .{0,500}$"),
])
def test_what_nobody_writes_in_a_configuration_is_one_short_line(tmp_path, suffix, content, message):
    path = tmp_path / f"config.{suffix}"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        load_config(path, SIMPLE, [])
    assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 700


def test_aliases_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "config.yml"
    path.write_text("first: &b {lr: 1, layers: 9}\nmine: {<<: *b, layers: 7, weight_path: ~/a.pth}\nother: ~\n")
    content = read_config(path)
    assert content == {"first": {"lr": 1, "layers": 9}, "mine": {"lr": 1, "layers": 7, "weight_path": "/home/me/a.pth"},
                       "other": None}
    online = {"online_sources": [{"path": "~/photos"}], "online": 1, "base_path": "~/dump"}
    (tmp_path / "config.json").write_text(json.dumps(online))
    config = load_train_config(tmp_path / "config.json", [])
    assert (config["online_sources"], config["base_path"]) == ([{"path": "/home/me/photos"}], "/home/me/dump")


@pytest.mark.parametrize("arguments, message", [
    (["--lr", "[" * 5000], "lr should be a number, not '\\[\\["),
    (["--lr", "9" * 5000], "expected a finite number"),
    (["--lr", "NaN"], "expected a finite number"),
    (["--batchsize", "8"], "unknown key"),
    (["--layers", "many"], "layers should be a whole number"),
    (["--network", "null"], "network should be a text"),
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
    ({"its_per_epoch": -2}, "its_per_epoch -2: expected at least -1"),
    ({"layers": 10 ** 9}, "layers 1000000000: expected at most 1000"),
    ({"sinkhorn_iterations": "1e9"}, "sinkhorn_iterations should be a whole number"),
    ({"sinkhorn_iterations": 10 ** 9}, "sinkhorn_iterations 1000000000: expected at most"),
    ({"n_min_tokens": -1}, "n_min_tokens -1: expected at least 0"),
    ({"lr": "nan"}, "lr nan: expected a finite number"),
    ({"lr": 10 ** 400}, "lr inf: expected a finite number"),
    ({"seed": 10 ** 400}, "seed 1000+: expected at most"),
    ({"batch_size": True}, "batch_size should be a whole number"),
    ({"match_threshold": 1.5}, "match_threshold 1.5: expected at most 1"),
    ({"online": 1, "online_sources": [{"path": "x", "weight": 10 ** 400}]}, "online_sources, x: weight inf"),
    ({"eval_confg": 1}, "unknown key 'eval_confg'"),
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


def test_a_configuration_says_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "a.json").write_text('{"base": "b.json", "lr": 1e-3}')
    (tmp_path / "b.json").write_text('{"base": "c.json", "lr": 1e-5, "layers": 7}')
    (tmp_path / "c.json").write_text('{"layers": 3, "seed": 5}')
    config = load_train_config(tmp_path / "a.json", ["--seed", "6"])
    assert config == {**DEFAULTS, "lr": 1e-3, "layers": 7, "seed": 6}
    geo = load_train_config("configs/config_train_megadepth_eimp_geo.json", [])
    plain = load_train_config("configs/config_train_megadepth.json", [])
    assert {key for key in geo if geo[key] != plain[key]} == {"network", "save_path", "with_pose"}
    for content, message in (('{"base": "a.json"}', "is its own base"), ('{"base": 3}', "base should be a text"),
                             ('{"base": "d.json"}', "d.json")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load_train_config(tmp_path / "a.json", [])


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for key, setting in SETTINGS.items():
        (k,) = [k for k, line in enumerate(lines) if line.split()[:1] == [f"--{key}"]]
        assert json.dumps(setting.default) in lines[k] and lines[k + 1].strip() == setting.help


def test_a_configuration_of_the_original_is_read(tmp_path, capsys):
    unused = {"name": "DGNNS", "dataset": "megadepth", "network_1": "gm", "network_2": "adagmn", "base_path_": "/data",
              "scene_list_fn_": "a.txt", "scene_list_fn_validation": "b.txt", "min_overlap_ratio": 0.1,
              "max_overlap_ratio": 0.7, "image_size": [640, 480], "pre_load": False, "error_th": 5, "train": 1,
              "optim_": "adamw", "eval_config": {"a": 1}, "with_dist": True}
    used = {"network": "dgnns", "feature": "spp", "base_path": "/data/dump", "scene_list_fn": "assets/train.txt",
            "pairs_per_scene": 80, "max_keypoints": 1024, "min_inliers": 32, "max_inliers": 512,
            "random_inliers": True, "batch_size": 16, "epochs": 10000, "its_per_epoch": 1000, "lr": 0.0001,
            "min_lr": 1e-6, "decay_rate": 0.999992, "decay_iter": 200000, "optim": "adam", "layers": 15,
            "norm_fn": "in", "ac_fn": "relu", "with_sinkhorn": True, "with_pose": 0, "n_min_tokens": 256,
            "gpu": [0, 1], "workers": 16, "save_path": "runs/a", "weight_path": "None", "resume_path": "None"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**unused, **used}))
    config = load_train_config(path, [])
    assert config == {**DEFAULTS, **used, "with_pose": False, "weight_path": None, "resume_path": None}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("not used here: " + ", ".join(unused))
