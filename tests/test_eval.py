"""Matchers, the evaluation command and what it reports, on images of two textured planes with exact poses."""
import csv
import hashlib
import itertools
import json
import os
import resource
import signal
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from eval_scene import NAMES, list_set, make_pair, make_scene, write_hdf5

from eval import eval_imp, methods
from eval.eval_imp import build_methods, parse_arguments, warn_of_training_scenes
from eval.iterative import IterationStep, PairMatches, match_iteratively, match_one_shot
from eval.journal import Journal
from eval.methods import MATCHERS, MatcherSettings, Method, NearestNeighbor, PoseSetting, to_data
from eval.pair_sets import Hdf5PairSet, ListPairSet
from eval.results import (
    PRECISION_THRESHOLD,
    PairResult,
    StepResult,
    epipolar_errors,
    score_pair,
    true_correspondences,
)
from eval.run import evaluate
from eval.summary import (
    format_table,
    summarize,
    summarize_iterations,
)
from nets import build_matcher
from tools import checkpoint
from tools.checkpoint import save_checkpoint
from tools.cli import InputError, OutputError, run
from tools.features import Features, Sift
from tools.files import read_image
from tools.geometry import make_pose
from tools.pair_list import Pair, write_pair_list
from training.start import warm_start

INSTALLED = ["magsac", "ransac", "poselib", *(["pycolmap"] if find_spec("pycolmap") else [])]
pytestmark = pytest.mark.usefixtures("one_thread")
MAGSAC = PoseSetting("magsac", 1.0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Folder with images/, depths/ and pairs.txt, never written to; all three pairs of the three views."""
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of seven iterations that matches nearest neighbours, trained on a scene called sub."""
    torch.manual_seed(0)
    network = build_matcher("imp", descriptor_dim=128, n_layers=7)
    warm_start(network)
    path = tmp_path_factory.mktemp("weights") / "warm.pth"
    save_checkpoint(path, {"model": network.state_dict(), "config": {"n_min_tokens": 60}, "scenes": ["sub", "other"]})
    return path


def evaluate_command(scene, save_path, *options, methods=("NN_ratio",)):
    return ["--matching_method", *methods, "--pairs", str(scene / "pairs.txt"), "--image_dir", str(scene / "images"),
            "--feature_type", "sift", "--max_keypoints", "400", "--save_path", str(save_path), "--device", "cpu",
            *map(str, options)]


def read_tables(folder):
    """The tables of results.json, without times."""
    tables = json.loads((folder / "results.json").read_text())["tables"]
    for table in tables:
        for numbers in table["methods"].values():
            assert set(numbers.pop("ms")) == {"features", "matching", "pose"}
    return tables


# the whole way

def test_command_measures_the_poses_of_a_pair_list(scene, tmp_path, capsys):
    command = evaluate_command(scene, tmp_path, "--depth_dir", scene / "depths", "--pictures", 2, "--threshold", 1,
                               "--unique_locations")
    command.insert(1, "NN")
    (tmp_path / "pairs_middle1.png").write_text("of an earlier run with more pictures")
    assert run(eval_imp.main, command) == 0
    heading, *table = capsys.readouterr().out.splitlines()
    assert heading == "magsac at 1 px"
    assert table[0].split()[:6:2] == ["method", "[95%]", "[95%]"] and "prec*@" in table[0]
    assert [line.split()[0] for line in table[1:3]] == ["NN", "NN_ratio"]
    assert len({len(line) for line in table[:3]}) == 1  # aligned

    results = json.loads((tmp_path / "results.json").read_text())
    (table,) = results["tables"]
    assert (table["estimator"], table["threshold"]) == ("magsac", 1)
    numbers = table["methods"]["NN_ratio"]
    assert numbers["auc"]["5"] > 0.7 and numbers["auc"]["20"] > 0.9
    assert numbers["auc_interval"]["5"][0] <= numbers["auc"]["5"] <= numbers["auc_interval"]["5"][1]
    assert numbers["precision"] > 0.85 and numbers["matches"] > 50 and 0.1 < numbers["matching_score"] < 1
    assert results["settings"]["threshold"] == [1] and results["versions"]["numpy"] == np.__version__
    depth = {method: table["methods"][method]["against_depth"] for method in ("NN", "NN_ratio")}
    assert depth["NN_ratio"]["precision"] > depth["NN"]["precision"] + 0.02 > 0.8
    assert depth["NN"]["recall"] > depth["NN_ratio"]["recall"] > 0.4
    assert depth["NN_ratio"]["baseline_recall"] == depth["NN"]["recall"]
    assert depth["NN"]["precision_at_baseline_recall"] == pytest.approx(depth["NN"]["precision"], abs=0.05)

    with open(tmp_path / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["method"] for row in rows} == {"NN", "NN_ratio"}
    assert rows[0]["image1"] == NAMES[1] and float(rows[-1]["error"]) < 5
    for average, name in ((np.mean, "mean"), (np.median, "median")):
        errors = [float(row[f"epipolar_{name}"]) for row in rows if row["method"] == "NN_ratio"]
        assert numbers["epipolar_error"][name] == pytest.approx(average(errors)) and 0 < average(errors) < 0.1
    for name in ("pairs_easy.png", "pairs_hard.png"):
        height, width = read_image(tmp_path / name).shape
        assert 640 < width < 760 and 2 * 240 < height < 2 * 400  # two methods below each other
    assert min(read_image(tmp_path / "pose_recall.png").shape) > 200
    assert not (tmp_path / "pairs_middle1.png").exists()


def test_two_runs_give_the_same_numbers_whatever_the_workers(scene, weights, tmp_path):
    written = []
    for name, workers in (("first", 0), ("second", 0), ("third", 2)):
        command = evaluate_command(scene, tmp_path / name, "--depth_dir", scene / "depths", "--pictures", 0,
                                   "--weights", weights, "--use_iterative", "--max_keypoints", 100, "--seed", 3,
                                   "--workers", workers, methods=["NN_ratio", "EIMP"])
        assert run(eval_imp.main, command) == 0
        written.append((read_tables(tmp_path / name), (tmp_path / name / "iterations.csv").read_text()))
    assert written[0] == written[1]
    assert written[0] == written[2]


def test_a_bad_pair_is_skipped_and_said(scene, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in NAMES[::2]:
        (tmp_path / name).write_bytes((scene / "images" / name).read_bytes())
    broken, missing = make_pair(0, 2), make_pair(0, 2)
    broken.image1, missing.image0 = "broken.png", "missing.png"
    write_pair_list(tmp_path / "list.txt", [broken, make_pair(0, 2), missing])
    command = evaluate_command(scene, tmp_path / "out", "--pictures", 1)
    command[3], command[5] = str(tmp_path / "list.txt"), str(tmp_path)
    assert run(eval_imp.main, command) == 1
    assert "2 pairs skipped" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tables"][0]["methods"]["NN_ratio"]["pairs"] == 1
    assert ["broken.png" in item["reason"] for item in results["skipped"]] == [True, False]

    write_pair_list(tmp_path / "list.txt", [missing])
    assert run(eval_imp.main, command) == 2
    assert "missing.png" in capsys.readouterr().err


def test_pairs_without_truth_are_matched_but_not_scored(scene, tmp_path):
    without_pose, without_K = make_pair(0, 1), Pair(NAMES[0], NAMES[2])
    without_pose.T_0to1 = None
    write_pair_list(tmp_path / "list.txt", [without_K, without_pose])
    command = evaluate_command(scene, tmp_path / "out", "--pictures", 2)
    command[3] = str(tmp_path / "list.txt")
    assert run(eval_imp.main, command) == 0
    numbers = read_tables(tmp_path / "out")[0]["methods"]["NN_ratio"]
    assert "auc" not in numbers and numbers["precision"] is None and numbers["matches"] > 50
    assert (tmp_path / "out" / "pairs_easy.png").exists()


def test_limit_takes_pairs_from_all_over_the_set(scene):
    pair_set = list_set(scene, [make_pair(0, 1), make_pair(0, 1), make_pair(1, 2), make_pair(0, 2), make_pair(0, 2)])
    results, _ = evaluate(pair_set, {"NN": Method(MATCHERS["NN"](MatcherSettings()))}, [MAGSAC], limit=3)
    assert [row.index for row in results[MAGSAC]["NN"]] == [0, 2, 4]


@pytest.mark.parametrize("options, message", [
    (["--image_dir", "nowhere"], "nowhere"),
    (["--pairs", "nowhere.txt"], "nowhere.txt"),
    (["--depth_dir", "nowhere"], "a.h5"),
    (["--matching_method", "IMP", "--weights", "nowhere.pth"], "nowhere.pth"),
    (["--matching_method", "NN", "--weights", "one.pth"], "--weights"),
    (["--matching_method", "IMP", "EIMP", "IMP_geo", "--weights", "one.pth", "two.pth"], "IMP, EIMP, IMP_geo"),
    (["--dataset", "megadepth1500"], "0015_0.1_0.3.npz"),
    (["--device", "gpu"], "gpu"),
    (["--device", "meta"], "unknown device 'meta'"),
    (["--matching_method", "IMP", "NN", "IMP", "--weights", "a.pth", "b.pth"], "names IMP 2 times"),
    (["--save_path", __file__], "is a file, not a folder"),
])
def test_bad_input_is_one_line_that_names_it(scene, tmp_path, capsys, options, message):
    assert run(eval_imp.main, [*evaluate_command(scene, tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_usage_errors_name_the_option(scene, tmp_path, capsys):
    for options, message in ((["--threshold", "0"], "--threshold"), (["--threshold", "best"], "--threshold"),
                             (["--workers", "-1"], "--workers"), (["--use_uncertainty"], "--use_iterative"),
                             (["--limit", "0"], "--limit"), (["--resize", "1", "2", "3"], "--resize"),
                             (["--resize", "0"], "--resize"), (["--seed", "-1"], "--seed"),
                             (["--estimator_seeds", "0"], "--estimator_seeds"), (["--pictures", "-1"], "--pictures"),
                             (["--max_keypoints", "-5"], "--max_keypoints"), (["--ratio", "nan"], "--ratio"),
                             (["--max_keypoints", "99999999999"], "--max_keypoints"),
                             (["--match_threshold", "nan"], "--match_threshold"),
                             (["--contrast_threshold", "inf"], "--contrast_threshold")):
        with pytest.raises(SystemExit) as error:
            parse_arguments([*evaluate_command(scene, tmp_path), *options])
        assert error.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["--matching_method", "NN", "--feature_type", "sift"])
    assert "--pairs and --image_dir" in capsys.readouterr().err


def test_missing_features_say_which_command_makes_them(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("{dataset: yfcc, feature_type: sift, output: no.hdf5, raw_data_dir: raw}")
    command = ["--matching_method", "NN", "--dataset", "yfcc", "--feature_type", "sift",
               "--config", str(tmp_path / "my.yaml")]
    assert run(eval_imp.main, command) == 2
    assert f"python3 -m dump.dump --config {tmp_path / 'my.yaml'}" in capsys.readouterr().err
    command[3] = "scannet"
    assert run(eval_imp.main, command) == 2
    assert "yfcc, not scannet" in capsys.readouterr().err


# iterative matching

def test_iterative_matching_stands_beside_one_shot(scene, weights, tmp_path, capsys):
    command = evaluate_command(scene, tmp_path, "--weights", weights, "--use_iterative", "--use_uncertainty",
                               "--depth_dir", scene / "depths", "--plot_time_auc", "--pictures", 1, "--threshold", 1,
                               "--max_keypoints", 150, methods=["NN_ratio", "IMP", "EIMP"])
    assert run(eval_imp.main, command) == 0
    out = capsys.readouterr().out
    (table,) = read_tables(tmp_path)
    methods = table["methods"]
    assert list(methods) == ["NN_ratio", "IMP 3 iterations", "IMP 5 iterations", "IMP", "IMP iterative",
                             "EIMP 3 iterations", "EIMP 5 iterations", "EIMP", "EIMP iterative, uncertainty"]
    assert methods["NN_ratio"]["iterations"] is None and methods["IMP 3 iterations"]["iterations"] == 3
    assert methods["IMP"]["iterations"] == 7 and 4 < methods["IMP iterative"]["iterations"] <= 7
    assert methods["IMP iterative"]["keypoints_kept"] == 150 > methods["EIMP iterative, uncertainty"]["keypoints_kept"]
    assert methods["IMP iterative"]["auc"]["10"] > 0.5
    for name in ("IMP iterative", "EIMP iterative, uncertainty"):
        by_iteration = methods[name]["by_iteration"]
        assert [numbers["iterations"] for numbers in by_iteration][:2] == [4, 6]
        assert by_iteration[0]["running"] == 1 and by_iteration[-1]["auc"] == methods[name]["auc"]
        assert f"\n{name}\nif ended after" in out

    with open(tmp_path / "iterations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"IMP iterative", "EIMP iterative, uncertainty"}
    assert {row["iterations"] for row in rows} >= {"4", "6"} and {row["estimator"] for row in rows} == {"magsac"}
    eimp_rows = [row for row in rows if row["method"].startswith("EIMP")]
    assert {int(row["kept0"]) for row in eimp_rows if row["iterations"] == "4"} == {150}
    assert max(int(row["kept0"]) for row in eimp_rows if row["iterations"] == "6") < 150
    for name in ("iterations_used.png", "time_auc.png", "pose_recall.png"):
        assert min(read_image(tmp_path / name).shape) > 200
    assert 5 * 240 < read_image(tmp_path / "pairs_easy.png").shape[0] < 5 * 600  # without those of fewer iterations


def test_uncertainty_reaches_the_loop(scene, weights, tmp_path):
    for flags, expected in ((["--use_iterative"], False), (["--use_iterative", "--use_uncertainty"], True)):
        args = parse_arguments(evaluate_command(scene, tmp_path, "--weights", weights, *flags,
                                                methods=["NN", "IMP", "EIMP"]))
        methods = build_methods(args)
        loops = {name: method for name, method in methods.items() if method.iterative}
        assert [method.use_uncertainty for method in loops.values()] == [False, expected]
        assert [method.matcher is methods[name.split()[0]].matcher for name, method in loops.items()] == [True, True]


def test_each_network_can_have_its_own_weights(scene, weights, tmp_path):
    other = build_matcher("eimp", descriptor_dim=128, n_layers=4)
    save_checkpoint(tmp_path / "other.pth", {"model": other.state_dict()})
    methods = build_methods(parse_arguments(evaluate_command(
        scene, tmp_path, "--weights", weights, tmp_path / "other.pth", methods=["IMP", "NN", "EIMP"])))
    assert methods["IMP"].matcher.n_iterations == 7 and methods["EIMP"].matcher.n_iterations == 4


# several estimators and thresholds

def test_all_estimators_have_a_table_each(scene, tmp_path, capsys):
    assert run(eval_imp.main, evaluate_command(scene, tmp_path / "all", "--estimator", "all", "--threshold", 1.5,
                                               "--pictures", 0)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " at " in line] == [f"{name} at 1.5 px" for name in INSTALLED]
    tables = read_tables(tmp_path / "all")
    assert [table["estimator"] for table in tables] == INSTALLED
    assert len({table["methods"]["NN_ratio"]["auc"]["5"] for table in tables}) == len(INSTALLED)
    assert len({table["methods"]["NN_ratio"]["matches"] for table in tables}) == 1
    with open(tmp_path / "all" / "pairs.csv", newline="") as file:
        assert [row["estimator"] for row in csv.DictReader(file)] == [name for name in INSTALLED for _ in range(3)]

    assert run(eval_imp.main, evaluate_command(scene, tmp_path / "one", "--estimator", "poselib", "--threshold", 1.5,
                                               "--pictures", 0)) == 0
    assert read_tables(tmp_path / "one") == tables[2:3]


def test_aucs_are_means_over_the_seeds_of_the_estimator(scene, weights, tmp_path):
    def numbers(name, *options):
        command = evaluate_command(scene, tmp_path / name, "--estimator", "ransac", "--weights", weights,
                                   "--use_iterative", *options, methods=["NN", "IMP"])
        assert run(eval_imp.main, command) == 0
        return read_tables(tmp_path / name)

    (mean,) = numbers("mean", "--seed", 3, "--estimator_seeds", 2)
    (one,), (other,) = numbers("one", "--seed", 3), numbers("other", "--seed", 4)
    differ = 0
    for method, expected in mean["methods"].items():
        aucs = [table["methods"][method]["auc"] for table in (one, other)]
        differ += aucs[0] != aucs[1]
        for threshold, value in expected["auc"].items():
            assert value == pytest.approx((aucs[0][threshold] + aucs[1][threshold]) / 2)
        assert expected["precision"] == one["methods"][method]["precision"]
    assert differ
    pairs = [(tmp_path / name / "pairs.csv").read_text().splitlines() for name in ("mean", "one")]
    assert len(pairs[0]) == len(pairs[1])


def test_each_threshold_has_a_table(scene, weights, tmp_path):
    command = evaluate_command(scene, tmp_path / "both", "--estimator", "poselib", "--weights", weights,
                               "--use_iterative", "--pictures", 0, "--max_keypoints", 150, "--threshold", 60, 1,
                               methods=["NN_ratio", "IMP"])
    assert run(eval_imp.main, command) == 0
    tables = read_tables(tmp_path / "both")
    assert [table["threshold"] for table in tables] == [60, 1]
    aucs = [table["methods"]["IMP"]["auc"]["10"] for table in tables]
    assert aucs[1] > aucs[0]
    command.remove("60")
    command[command.index(str(tmp_path / "both"))] = str(tmp_path / "one")
    assert run(eval_imp.main, command) == 0
    assert list(tables[1]["methods"]) == ["NN_ratio", "IMP", "IMP iterative"]
    assert read_tables(tmp_path / "one") == tables[1:]


# resuming after an interruption

class Interrupted(ListPairSet):
    """A set that is interrupted at a pair."""

    stops_at = None

    def __getitem__(self, i):
        if i == self.stops_at:
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_an_interrupted_run_resumes_and_ends_with_the_same_results(scene, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_imp, "ListPairSet", Interrupted)
    write_pair_list(tmp_path / "list.txt", [make_pair(i, j) for i, j in ((0, 1), (1, 2), (0, 2), (2, 0), (2, 1))])

    def command(name, *options):
        made = evaluate_command(scene, tmp_path / name, "--depth_dir", scene / "depths", "--pictures", 1, "--weights",
                                weights, "--use_iterative", "--max_keypoints", 150, *options,
                                methods=["NN_ratio", "EIMP"])
        made[4] = str(tmp_path / "list.txt")
        return made

    assert run(eval_imp.main, command("whole")) == 0
    assert not (tmp_path / "whole" / "journal.jsonl").exists()
    monkeypatch.setattr(Interrupted, "stops_at", 4)
    assert run(eval_imp.main, command("parts", "--workers", 1)) == 130
    journal = tmp_path / "parts" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 3  # the settings, and two pairs; two more had been begun
    assert "2 pairs are done: the same command resumes" in capsys.readouterr().err
    journal.write_bytes(journal.read_bytes()[:-100])  # as if it had been killed while it wrote the last line

    monkeypatch.setattr(Interrupted, "stops_at", None)
    assert run(eval_imp.main, command("parts", "--seed", 1)) == 2
    error = capsys.readouterr().err
    assert "journal.jsonl" in error and "seed 0" in error and "delete it" in error
    read = []
    monkeypatch.setattr(Interrupted, "__getitem__", lambda self, i: read.append(i) or ListPairSet.__getitem__(self, i))
    assert run(eval_imp.main, command("parts")) == 0
    assert "resuming: 1 of 5 pairs" in capsys.readouterr().err
    assert read[:4] == [1, 2, 3, 4]
    assert read_tables(tmp_path / "parts") == read_tables(tmp_path / "whole")
    for name in ("iterations.csv", "pairs_easy.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not journal.exists()


def test_a_longer_run_takes_over_what_a_shorter_one_did(scene, tmp_path):
    pair_set = list_set(scene, [make_pair(0, 1), make_pair(1, 2), make_pair(0, 2)])
    methods = {"NN": Method(MATCHERS["NN"](MatcherSettings()))}
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        few, _ = evaluate(pair_set, methods, [MAGSAC], limit=2, journal=journal)
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        assert sorted(journal.finished) == [0, 2]
        all_pairs, _ = evaluate(pair_set, methods, [MAGSAC], journal=journal)
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        again, _ = evaluate(pair_set, methods, [MAGSAC], limit=2, journal=journal)
    assert [row.index for row in all_pairs[MAGSAC]["NN"]] == [0, 1, 2]
    assert [row.error for row in few[MAGSAC]["NN"]] == [row.error for row in again[MAGSAC]["NN"]]


def test_a_journal_keeps_whole_lines_only(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"seed": 0}) as journal:
        journal.add(4, [{"error": float("inf")}])
        journal.add(7, [])
    whole = path.read_bytes()
    first_two = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for damaged in (whole[:-1], whole[:-8], whole[:first_two] + b"\0" * 50, whole[:first_two] + b"[1]\n" + whole[-20:]):
        path.write_bytes(damaged)
        with Journal(path, {"seed": 0}) as journal:
            assert journal.finished == {4: [{"error": float("inf")}]}
            journal.add(7, [])
        assert path.read_bytes() == whole


def test_journals_that_are_none_of_ours_or_in_use(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"seed": 7}):  # nothing was done with these settings, so they bind nobody
        assert path.exists()
    assert not path.exists()
    path.write_text('{"format": "imp-eval-journal", "version": 3, "settings": {"seed": 7}}\n')
    with Journal(path, {"seed": 0}) as journal:
        with pytest.raises(InputError, match="another evaluation is writing"):
            Journal(path, {"seed": 0})
        journal.add(1, [])
    with pytest.raises(InputError, match="seed 0, now it is 1"):
        Journal(path, {"seed": 1})
    path.write_text(path.read_text().replace('"version": 3', '"version": 2'))  # its results lack what is reported now
    with pytest.raises(InputError, match=r"delete it to start anew.* version 2, now it is 3"):
        Journal(path, {"seed": 0})
    for content in ("notes of mine\n", '{"a": 1}\n', "[]\n", "no end of line"):
        path.write_text(content)
        with pytest.raises(InputError, match="not a journal"):
            Journal(path, {"seed": 0})
        assert path.read_text() == content


def test_results_read_back_the_same():
    rng = np.random.default_rng(0)
    scores = np.r_[rng.random(300).astype(np.float32), np.float32([0, 1, 1e-30, 0.1, 1 / 3])]
    result = PairResult(3, ("a", "b"), 10, 11, 5, 4, {"pose": 0.1}, np.inf, np.inf, 0.25, 0.125, scores, scores > 0.5,
                        7, 6, 5, 8, False, [StepResult(4, 10, 9, 3, 0, 1 / 3, 2.0, None)])
    back = PairResult.from_json(json.loads(json.dumps(result.to_json())))
    assert back.scores.dtype == np.float32 and back.correct.dtype == bool
    np.testing.assert_array_equal(back.scores, scores)
    np.testing.assert_array_equal(back.correct, result.correct)
    back.scores, back.correct = result.scores, result.correct = None, None
    assert back == result


# what the weights were trained on

def test_weights_trained_on_a_tested_scene_are_named(scene, weights, tmp_path, capsys):
    silent = build_matcher("imp", descriptor_dim=128, n_layers=3).state_dict()
    save_checkpoint(tmp_path / "silent.pth", {"model": silent})
    methods = build_methods(parse_arguments(evaluate_command(
        scene, tmp_path, "--weights", weights, tmp_path / "silent.pth", methods=["IMP", "EIMP"])))
    listed = list_set(scene, [make_pair(0, 1), make_pair(0, 2)], depth_dir=scene / "depths")
    write_hdf5(tmp_path / "pairs.hdf5", listed)
    for pair_set in (listed, Hdf5PairSet(tmp_path / "pairs.hdf5", scene / "images")):
        assert warn_of_training_scenes(pair_set, methods) == {str(weights): ["sub"]}
        error = capsys.readouterr().err
        assert f"{weights} was trained on sub, which" in error and "silent" not in error
    assert warn_of_training_scenes(list_set(scene, [make_pair(0, 2)]), methods) == {}
    assert capsys.readouterr().err == ""
    megadepth = list_set(scene, [Pair("Undistorted_SfM/0015/images/a.jpg", "Undistorted_SfM/0022/images/b.jpg")])
    assert warn_of_training_scenes(megadepth, methods) == {}
    assert capsys.readouterr().err.startswith(f"note: {tmp_path / 'silent.pth'} does not say")


def test_the_warning_stays_with_the_results(scene, weights, tmp_path, capsys):
    command = evaluate_command(scene, tmp_path, "--weights", weights, "--max_keypoints", 60, "--n_layers", 1,
                               "--pictures", 0, methods=["IMP"])
    assert run(eval_imp.main, command) == 0
    assert "warning" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["trained_on_tested_scenes"] == {str(weights): ["sub"]}


def test_results_name_the_weights_that_were_taken(scene, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", weights.parent)
    default = weights.parent / "imp_sift_open.pth"
    default.write_bytes(weights.read_bytes())
    command = evaluate_command(scene, tmp_path, "--max_keypoints", 60, "--n_layers", 4, "--pictures", 0,
                               "--use_iterative", methods=["NN", "IMP"])
    assert run(eval_imp.main, command) == 0
    used = {"path": str(default), "sha256": hashlib.sha256(default.read_bytes()).hexdigest()[:16]}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["weights"] == {"IMP": used, "IMP iterative": used}


# matchers

def as_data(descriptors0, descriptors1):
    def unit(values):
        values = torch.tensor(values, dtype=torch.float32)
        return (values / values.norm(dim=1, keepdim=True))[None]
    return {"descriptors0": unit(descriptors0), "descriptors1": unit(descriptors1)}


def test_nearest_neighbours_are_mutual():
    # both of view 0 prefer the first of view 1, which prefers the second of view 0
    data = as_data([[1, 0.3], [1, 0.1], [0, 1]], [[1, 0], [-1, 0.5]])
    out = MATCHERS["NN"](MatcherSettings()).match(data)
    assert out["matches0"].tolist() == [-1, 0, 1]
    scores = out["matching_scores0"]
    assert scores[0] == 0 and 1 > scores[1] > scores[2] > 0


def test_ratio_test_scores_by_how_much_nearer_the_nearest_is():
    angles1 = np.radians([0, 10, 90])
    angles0 = np.radians([2, 88])
    data = as_data(np.c_[np.cos(angles0), np.sin(angles0)], np.c_[np.cos(angles1), np.sin(angles1)])
    matcher = MATCHERS["NN_ratio"](MatcherSettings(ratio=0.7))
    out = matcher.match(data)
    assert out["matches0"].tolist() == [0, 2]
    chord = lambda degrees: np.sin(np.radians(degrees) / 2)  # noqa: E731
    np.testing.assert_allclose(out["matching_scores0"], [1 - chord(2) / chord(8), 1 - chord(2) / chord(78)], atol=1e-4)
    assert matcher.threshold == pytest.approx(0.3)


def test_ratio_test_trusts_neither_twins_nor_a_lonely_descriptor():
    matcher = MATCHERS["NN_ratio"](MatcherSettings())
    assert matcher.match(as_data([[1, 0]], [[1, 0], [1, 0]]))["matching_scores0"].tolist() == [0]
    assert matcher.match(as_data([[1, 0]], [[1, 0]]))["matching_scores0"].tolist() == [0]


@pytest.mark.parametrize("method, network", [("IMP", "imp"), ("EIMP_geo", "eimp"), ("GM", "gm")])
def test_networks_are_evaluated_with_the_weights_named(scene, tmp_path, method, network):
    torch.manual_seed(0)
    net = build_matcher(network, descriptor_dim=128, n_layers=5)
    save_checkpoint(tmp_path / "net.pth", {"model": net.state_dict()})
    data = to_data(ListPairSet([make_pair(0, 1)], scene / "images", Sift(120))[0])
    net.eval().match_threshold = 0.0
    expected = net(data)
    scores = expected["matching_scores0"][0].detach()
    threshold = float(scores[scores > 0].median())
    matcher = MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), match_threshold=threshold))
    out = matcher.match(data)
    np.testing.assert_array_equal(out["matches0"], expected["matches0"][0])
    np.testing.assert_allclose(out["matching_scores0"], scores)
    found = match_one_shot(matcher, data)
    assert 0 < found.used.sum() == (scores > threshold).sum() < len(found.used)

    fewer = MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), n_layers=2)).match(data)
    first_two, _ = net.match_all_iterations(data, threshold=0.0, n_layers=2)
    np.testing.assert_array_equal(fewer["matches0"], first_two[-1, 0])
    assert MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"))).n_iterations == 5
    shortened = Method(matcher).with_iterations(2).matcher
    np.testing.assert_array_equal(shortened.match(data)["matches0"], first_two[-1, 0])
    assert matcher.n_iterations == 5
    with pytest.raises(InputError, match="n_layers 6"):
        MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), n_layers=6))
    with pytest.raises(InputError, match="128"):
        MATCHERS[method](MatcherSettings(weights=str(tmp_path / "net.pth"), feature_type="spp"))


def test_dual_softmax_reaches_the_network(tmp_path):
    save_checkpoint(tmp_path / "net.pth", {"model": build_matcher("imp", descriptor_dim=128, n_layers=2).state_dict()})
    for dual in (False, True):
        matcher = MATCHERS["IMP"](MatcherSettings(weights=str(tmp_path / "net.pth"), use_dual_softmax=dual))
        assert matcher.network.with_sinkhorn is not dual


def test_a_matcher_of_ones_own_is_ten_lines(scene, tmp_path, monkeypatch):
    """The example in eval.methods, run as it stands there."""
    first = "    from eval import eval_imp, methods\n"
    example = first + methods.__doc__.split(first, 1)[1]
    example = "\n".join(line.removeprefix("    ") for line in example.splitlines())
    assert len([line for line in example.splitlines() if line]) <= 11
    monkeypatch.setattr(methods, "MATCHERS", dict(MATCHERS))
    monkeypatch.setattr(eval_imp, "MATCHERS", methods.MATCHERS)
    command, main = [], eval_imp.main
    monkeypatch.setattr(eval_imp, "main", lambda argv: command.extend(argv))
    exec(example, {"__name__": "__main__"})
    assert command[:3] == ["--matching_method", "NN_ratio", "mine"]
    assert run(main, evaluate_command(scene, tmp_path, "--pictures", 0, methods=["NN", "mine"])) == 0
    assert read_tables(tmp_path)[0]["methods"]["mine"]["matches"] == 400


# what is reported of a pair

def test_a_view_without_keypoints_counts_as_a_failure(scene):
    pair = list_set(scene, [make_pair(0, 1)], depth_dir=scene / "depths")[0]
    pair.features1 = Features(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros((0, 128), np.float32),
                              pair.features1.image_size)
    pair.depth1 = np.zeros(0, np.float32)
    for method in ("NN", "NN_ratio"):
        found = match_one_shot(MATCHERS[method](MatcherSettings()), to_data(pair))
        found.seconds = {"matching": 0.0, "pose": 0.0}
        result = score_pair(pair, found, true_correspondences(pair), 0.0)
        assert result.error == np.inf and result.precision == 0 and result.n_true == 0 and result.n_matches == 0


def test_matches_are_judged_by_depth_only_where_both_ends_have_it(scene):
    pair = list_set(scene, [make_pair(0, 1)], depth_dir=scene / "depths")[0]
    true0 = true_correspondences(pair)
    right = np.flatnonzero(true0 >= 0)
    assert len(right) > 80
    # three right matches, one of them below the threshold, a wrong one, and one whose first keypoint has no depth
    matches = np.c_[right[:5], true0[right[:5]]]
    matches[3, 1] = true0[right[10]]
    pair.depth0[matches[4, 0]] = 0
    found = PairMatches(matches, np.array([0.9, 0.8, 0.1, 0.7, 0.6]), np.array([1, 1, 0, 1, 1], bool))
    result = score_pair(pair, found, true0, 0.0)
    assert (result.n_used, result.n_correct, result.n_true) == (3, 2, len(right))
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.1, 0.7])
    assert result.correct.tolist() == [True, True, True, False]
    # epipolar precision knows no depth: of the four used, the three right ones at least
    assert result.precision in (0.75, 1.0) and result.matching_score == 4 * result.precision / 400
    errors = epipolar_errors(pair, matches[[0, 1, 3, 4]])
    assert result.epipolar_mean == pytest.approx(np.mean(errors)) and max(errors) < 1
    assert result.epipolar_median == pytest.approx(np.median(errors))


def test_a_match_adds_no_more_than_the_worst_error_to_a_mean(scene):
    pair = list_set(scene, [make_pair(0, 1)])[0]
    pair.T_0to1 = make_pose(np.eye(3), [0, 0, 1])  # straight ahead: the epipole is the principal point
    pair.features1.keypoints[0] = pair.K1[:2, 2]
    matches = np.stack([np.arange(3)] * 2, axis=1)
    errors = epipolar_errors(pair, matches)
    assert errors[0] == np.inf and max(errors[1:]) < 1
    found = PairMatches(matches, np.ones(3), np.ones(3, bool))
    assert score_pair(pair, found, None, 0.0).epipolar_mean == pytest.approx((1 + errors[1] + errors[2]) / 3)
    found.used[:] = False
    assert score_pair(pair, found, None, 0.0).epipolar_mean is None


def test_every_iteration_is_judged_by_its_own_pose(scene):
    pair = list_set(scene, [make_pair(0, 1)])[0]
    R, t = pair.T_0to1[:3, :3], pair.T_0to1[:3, 3]
    matches = np.stack([np.arange(30)] * 2, axis=1)
    right, wrong = (R, t, np.arange(30) < 20), (R, t[::-1], np.arange(30) < 3)
    steps = [IterationStep(iteration, np.arange(kept0), np.arange(kept1), matches[:n], np.ones(n),
                           None if pose is None else (*pose[:2], pose[2][:n]))
             for iteration, kept0, kept1, n, pose in ((3, 400, 390, 30, wrong), (5, 300, 280, 24, None),
                                                      (7, 200, 180, 27, right))]
    found = PairMatches(matches, np.ones(30), np.ones(30, bool), None, 8, False, steps)
    first, second, third = score_pair(pair, found, None, 0.0).steps
    assert [step.iterations for step in (first, second, third)] == [4, 6, 8]
    assert (first.kept0, first.kept1, first.n_matches, first.n_inliers) == (400, 390, 30, 3)
    assert (second.n_matches, second.n_inliers, second.error) == (24, 0, np.inf)
    assert third.n_inliers == 20 and third.error < 1e-6 and 5 < first.error < 90
    assert first.precision == pytest.approx(
        np.mean(epipolar_errors(pair, matches) < PRECISION_THRESHOLD)) != second.precision


def row(error, n_matches, scores=(), correct=(), n_true=None, n_used=None, n_correct=None, **others):
    seconds = {"features": 0.004, "matching": 0.002, "pose": 0.001}
    return PairResult(0, ("a", "b"), 100, 100, n_matches, n_matches, seconds, error, 0.0, 0.5, 0.25,
                      np.array(scores, np.float32), np.array(correct, bool), n_true, n_used, n_correct, **others)


def test_summary_compares_at_the_recall_of_the_first_method():
    baseline = [row(1.0, 10, [0.9, 0.5], [True, False], 4, 2, 1, epipolar_mean=0.1, epipolar_median=0.01),
                row(np.inf, 20, [0.6], [True], 4, 1, 1)]
    other = [row(2.0, 6, [0.9, 0.8, 0.2], [True, True, False], 4, 1, 1), row(3.0, 8, [0.85], [False], 4, 0, 0)]
    summary = summarize({"base": baseline, "other": other}, seed=0)
    base, other = summary["base"], summary["other"]
    assert base["matches"] == 15 and base["pose_found"] == 0.5 and base["ms"]["features"] == pytest.approx(4)
    assert base["auc"]["5"] == pytest.approx((0.5 * 1 / 2 + 0.5 * 4) / 5)
    assert base["epipolar_error"] == {"mean": 0.1, "median": 0.01}  # of pairs that have matches
    assert other["epipolar_error"] == {"mean": None, "median": None}
    assert base["against_depth"]["recall"] == other["against_depth"]["baseline_recall"] == 0.25
    assert base["against_depth"]["precision"] == pytest.approx(2 / 3)
    # 2 of 8 are found at score 0.8: two right, one wrong
    assert other["against_depth"]["precision_at_baseline_recall"] == pytest.approx(2 / 3)
    table = format_table(summary).splitlines()
    assert "prec*@25.0" in table[0] and len(table) == 6 and "66.7" in table[2]
    low, high = other["auc_gain_interval"]["20"]
    assert "auc_gain_interval" not in base and low <= other["auc"]["20"] - base["auc"]["20"] <= high
    assert table[3] == f"AUC@20 of other less that of base: 95% in [{100 * low:+.1f}, {100 * high:+.1f}]"


def test_iterations_are_summed_up_as_if_the_loop_ended_there():
    def step(iterations, kept, error, precision):
        return StepResult(iterations, kept, kept - 2, 30, 20, error, 0.0, precision)

    stopped = row(1.0, 10, n_iterations=6, stopped_early=True, steps=[step(4, 100, 4.0, 0.1), step(6, 60, 3.0, 0.2)])
    ran = row(2.0, 10, n_iterations=8, stopped_early=False,
              steps=[step(4, 100, np.inf, 0.3), step(6, 80, 9.0, 0.4), step(8, 40, 7.0, 0.7)])
    empty = row(np.inf, 0, n_iterations=0, stopped_early=False)
    rows = summarize_iterations([stopped, ran, empty, empty], seed=0)
    assert [numbers["iterations"] for numbers in rows] == [4, 6, 8]
    assert [numbers["running"] for numbers in rows] == [0.5, 0.5, 0.25]
    assert [numbers["stopped"] for numbers in rows] == [0, 0.25, 0]
    assert [numbers["keypoints_kept"] for numbers in rows] == [99, 69, 39]
    # the results themselves count where a pair ends and after it, the poses on the way before that
    assert [numbers["precision"] for numbers in rows] == pytest.approx([0.35, 0.475, 0.5])
    assert rows[0]["auc"]["5"] == pytest.approx((4 * 0.125 + 1 * 0.25) / 5)
    assert rows[2]["auc"]["5"] == pytest.approx((0.125 + 0.375 + 3 * 0.5) / 5)

    numbers = summarize({"loop": [stopped, ran, empty, empty]}, seed=0)["loop"]
    assert numbers["iterations"] == 3.5 and numbers["stopped_early"] == 0.25 and numbers["keypoints_kept"] == 49
    assert numbers["by_iteration"] == rows


class FailingMatcher(NearestNeighbor):
    """A matcher that fails where fails(data)."""

    def __init__(self, fails, text: str):
        self.fails, self.text = fails, text

    def match(self, data):
        if self.fails(data):
            raise ValueError(self.text)
        return super().match(data)


def failing_at(call: int, text: str):
    """A matcher that fails the so manieth time."""
    calls = itertools.count(1)
    return FailingMatcher(lambda data: next(calls) == call, text)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pair_on_which_a_matcher_fails_is_skipped_and_the_others_are_kept(scene, workers):
    pairs = [make_pair(0, 1), make_pair(0, 1), make_pair(0, 1)]
    methods = {"mine": Method(failing_at(2, "odd\npair"))}
    results, skipped = evaluate(list_set(scene, pairs), methods, [MAGSAC], workers=workers)
    assert len(results[MAGSAC]["mine"]) == 2
    assert [reason for _, reason in skipped] == ["ValueError: odd pair"]


# journals that are damaged

METHODS = {"NN": Method(MATCHERS["NN"](MatcherSettings())), "NN_ratio": Method(MATCHERS["NN_ratio"](MatcherSettings()))}


@pytest.fixture(scope="module")
def finished(scene, tmp_path_factory):
    """A set of three pairs with depth, the results of all, and the bytes of their journal."""
    pair_set = ListPairSet([make_pair(0, 1), make_pair(1, 2), make_pair(0, 2)], scene / "images", Sift(60, 1e-5),
                           depth_dir=scene / "depths")
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with Journal(path, {}) as journal:
        results, _ = evaluate(pair_set, METHODS, [MAGSAC], journal=journal)
    return pair_set, results, path.read_bytes()


def untimed(results):
    return [{**row.to_json(), "seconds": None} for rows in results[MAGSAC].values() for row in rows]


def changed(change, result=False):
    """The line of a pair, with a change of what it holds, or of its first result."""
    def spoil(line):
        content = json.loads(line)
        change(content["results"][0]["result"] if result else content)
        return json.dumps(content).encode() + b"\n"
    return spoil


def put(**values):
    return lambda content: content.update(values)


@pytest.mark.parametrize("spoil", [
    lambda line: b"\0" * len(line) + b"\n", lambda line: line[:len(line) // 2] + b"\n", lambda line: line[5:],
    lambda line: b"[" * 10 ** 5 + b"\n", lambda line: b"[1]\n", lambda line: b'{"pair": %s}\n' % (b"9" * 5000),
    lambda line: line.replace(b'"NN_ratio"', b'"NN"'), lambda line: line.replace(b'"magsac"', b'"ransac"'),
    *(changed(put(**values)) for values in (
        {"pair": [1]}, {"pair": True}, {"pair": "1"}, {"results": {}}, {"results": [{"x": 1}]}, {"results": [5]},
        {"results": []})),
    changed(lambda content: content["results"].pop()), changed(lambda content: content["results"].append({})),
    *(changed(put(**values), result=True) for values in (
        {"n_matches": "5"}, {"n_matches": -5}, {"n_matches": 5.5}, {"n_keypoints0": None}, {"error_R": float("nan")},
        {"error_R": None}, {"error_R": None, "error_t": None}, {"precision": "0.5"}, {"seconds": {}}, {"seconds": 5},
        {"seconds": {"features": "1", "matching": 1, "pose": 1}}, {"names": "ab"}, {"names": [1, 2]}, {"index": 0},
        {"scores": [0.5]}, {"scores": [[1]], "correct": [[1]]}, {"scores": 5}, {"n_true": None}, {"steps": [{}]},
        {"n_iterations": 10 ** 400}, {"stopped_early": True}, {"unknown": 1},
        {"steps": [{"iterations": 4, "kept0": 1, "kept1": 1, "n_matches": 1, "n_inliers": 1, "error_R": 1.0}]})),
])
def test_a_damaged_line_of_a_journal_is_dropped_and_its_pair_done_again(finished, tmp_path, capsys, spoil):
    pair_set, results, whole = finished
    header, first, second, third = whole.splitlines(keepends=True)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(header + first + spoil(second) + third)
    with Journal(path, {}) as journal:
        again, skipped = evaluate(pair_set, METHODS, [MAGSAC], journal=journal)
        assert journal.n_added == 1
    assert not skipped and untimed(again) == untimed(results)
    error = capsys.readouterr().err
    assert "journal.jsonl: 1 damaged lines dropped" in error and "resuming: 2 of 3 pairs" in error
    with Journal(path, {}) as journal:
        evaluate(pair_set, METHODS, [MAGSAC], journal=journal)
        assert journal.n_added == 0
    assert path.read_bytes().count(b"\n") in (4, 5) and "damaged" not in capsys.readouterr().err


def test_what_is_in_the_place_of_a_journal(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("mine\n")
    path = tmp_path / "journal.jsonl"
    path.symlink_to(other)
    with Journal(path, {}) as journal:
        journal.add(0, [])
    assert not path.is_symlink() and other.read_text() == "mine\n"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"journal\.jsonl is a device or pipe, not a journal"):
        Journal(path, {})
    path.unlink()
    for first in (b'{"format": "imp-eval-journal", "version": 3, "settings": []}\n', b"[" * 10 ** 5 + b"\n"):
        path.write_bytes(first + b'{"pair": 0, "results": []}\n')
        with pytest.raises(InputError, match="is not a journal of an evaluation"):
            Journal(path, {})


def test_a_full_disk_keeps_the_whole_lines_of_a_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Journal(path, {}) as journal:
        journal.add(0, [])
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(OutputError, match=r"cannot write .*journal.jsonl: .*what is done is kept"):
                journal.add(1, ["x" * 100])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == before
        journal.add(1, [])
    with Journal(path, {}) as journal:
        assert sorted(journal.finished) == [0, 1] and not journal.n_damaged


# pairs that are skipped

@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pairs_are_in_the_order_of_the_set(scene, workers):
    pairs = [make_pair(0, 1), Pair("gone0.png", NAMES[0]), make_pair(0, 2), Pair("gone1.png", NAMES[0])]
    pair_set = list_set(scene, pairs)

    def is_the_first(data):
        # slept, so that the next ones are read meanwhile
        return data["image_size1"][0, 0] == 400 and time.sleep(0.05) is None

    methods = {"mine": Method(FailingMatcher(is_the_first, "odd"))}
    _, skipped = evaluate(pair_set, methods, [MAGSAC], workers=workers)
    assert [name for name, _ in skipped] == [pair_set.name(i) for i in (0, 1, 3)]


def test_what_only_the_loop_cannot_do_is_left_out_of_all_rows_and_said(scene, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "match_iteratively", lambda network, data, *rest: match_iteratively(
        network, data, *rest) if data["image_size1"][0, 0] != 400 else {}["odd"])
    command = evaluate_command(scene, tmp_path, "--weights", weights, "--use_iterative", "--pictures", 2,
                               "--max_keypoints", 60, methods=["NN_ratio", "IMP"])
    assert run(eval_imp.main, command) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    (skipped,) = results["skipped"]
    assert NAMES[1] in str(skipped) and "1 pairs skipped" in capsys.readouterr().err
    assert [numbers["pairs"] for numbers in results["tables"][0]["methods"].values()] == [2, 2, 2]


def test_a_picture_that_fails_does_not_end_the_others(scene, tmp_path):
    pair_set = list_set(scene, [make_pair(0, 1), make_pair(0, 2)])
    methods = {"mine": Method(failing_at(4, "odd"))}  # the first pair is matched twice
    results, _ = evaluate(pair_set, methods, [MAGSAC])
    failed = eval_imp.write_pictures(tmp_path, pair_set, methods, results[MAGSAC], MAGSAC, 2)
    assert failed == [("pairs_easy.png", "ValueError: odd")] and (tmp_path / "pairs_hard.png").exists()
