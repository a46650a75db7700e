"""The original program's evaluation: its command, its YAML files and its protocol, in a folder laid out as its own."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_scene import make_pair, make_scene, write_hdf5

from eval import eval_imp
from eval.pair_sets import ListPairSet
from nets import build_matcher
from tools.checkpoint import save_checkpoint
from tools.cli import run
from tools.features import Sift
from training.start import warm_start

EVAL_YAML = """
reader: {name: standard, rawdata_dir: raw_data, dataset_dir: data/yfcc_eval_spp.hdf5, num_kpt: 100}
evaluator: {name: auc, rescale: 640, num_pair: 2, inlier_th: 0.005}
matcher: {name: IMP, cos: [0.1]}
"""
DUMP_YAML = """
data_name: yfcc
rawdata_dir: raw_data
dataset_dump_dir: data
data_split: ['test']
extractor: {name: sp, num_kpt: 150, resize: [-1], overwrite: false, num_process: 2, det_th: 0.005}
"""


def wide_sift(image):
    """Features with the 256 channels that spp has."""
    found = Sift(250, 1e-5)(image)
    return replace(found, descriptors=np.repeat(found.descriptors, 2, axis=1) / np.float32(np.sqrt(2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """raw_data/, data/yfcc_eval_spp.hdf5 of three pairs, weights/."""
    root = tmp_path_factory.mktemp("original")
    (make_scene(root / "scene") / "images").rename(root / "raw_data")
    pairs = ListPairSet([make_pair(0, 1), make_pair(1, 2), make_pair(0, 2)], root / "raw_data", wide_sift)
    (root / "data").mkdir()
    write_hdf5(root / "data/yfcc_eval_spp.hdf5", pairs, depth=False, numbers=(0, 1, 2))
    torch.manual_seed(0)
    network = build_matcher("imp", descriptor_dim=256, n_layers=7)
    warm_start(network)
    for name in ("imp", "eimp"):
        save_checkpoint(root / f"weights/{name}_spp.pth", {"model": network.state_dict(),
                                                           "config": {"n_min_tokens": 60}})
    return root


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("IMP_WEIGHTS", str(folder / "weights"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(*options, method="IMP", dataset="yfcc"):
    """Results of the command; the options end with those given."""
    assert run(eval_imp.main, ["--matching_method", method, "--dataset", dataset, *map(str, options)]) == 0
    return json.loads(open("runs/eval/yfcc_spp/results.json").read())


def test_the_command_of_the_originals_readme():
    results = evaluate()
    (table,) = results["tables"]
    assert (table["estimator"], table["threshold"]) == ("magsac", 1)
    assert table["methods"]["IMP"]["pairs"] == 3 and table["methods"]["IMP"]["auc"]["20"] > 0.8
    assert results["weights"]["IMP"]["path"].endswith("weights/imp_spp.pth")


def test_published_protocol_from_end_to_end(capsys):
    options = ["--use_iterative", "--pictures", 0, "--limit", 1]
    tables = {}
    for protocol in ([], ["--protocol", "published"], ["--protocol", "published", "--use_uncertainty"]):
        results = evaluate(*options, *protocol, method="EIMP")
        tables[len(protocol)] = results["tables"][0], list(results["tables"][0]["methods"].values())[1]
        said = "protocol: published (its published figures could not be checked" in capsys.readouterr().out
        assert said is bool(protocol) and results["settings"]["protocol"] == ("published" if protocol else "default")
    (default, ours), (published, theirs), (_, uncertain) = (tables[n] for n in (0, 2, 3))
    assert (default["estimator"], published["estimator"]) == ("magsac", "magsac_published")
    # inliers: all in front of both cameras; pooling: with uncertainty alone
    one_shot = [table["methods"]["EIMP"] for table in (default, published)]
    assert one_shot[0]["matches"] == one_shot[1]["matches"] > one_shot[1]["inliers"] > 1.05 * one_shot[0]["inliers"]
    assert theirs["keypoints_kept"] == theirs["keypoints"] == 250 > uncertain["keypoints_kept"]
    assert ours["keypoints_kept"] < 250


def test_the_originals_yaml_of_an_evaluation(tmp_path, capsys):
    path = tmp_path / "original.yaml"
    path.write_text(EVAL_YAML)
    results = evaluate("--config", path, "--pictures", 0)
    numbers = results["tables"][0]["methods"]["IMP"]
    assert numbers["pairs"] == 2 and numbers["keypoints"] == 100 and results["settings"]["max_keypoints"] == 100
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {path}: not needed here and ignored: matcher, reader.name, evaluator.name, "
                     "evaluator.rescale, evaluator.inlier_th"]
    numbers = evaluate("--config", path, "--pictures", 0, "--limit", 1)["tables"][0]["methods"]["IMP"]
    assert numbers["pairs"] == 1


@pytest.mark.parametrize("old, new, said", [
    ("num_kpt", "num_kpts", "unknown key 'reader.num_kpts'; did you mean 'reader.num_kpt'"),
    ("rescale", "rescal", "unknown key 'evaluator.rescal'; did you mean 'evaluator.rescale'"),
    ("matcher", "macher", "unknown key 'macher'; did you mean 'matcher'"),
    ("num_pair: 2", "num_pair: many", "num_pair should be a whole number, not"),
    ("dataset_dir: data/", "dataset_dir: nowhere/", "no features at nowhere/yfcc_eval_spp.hdf5"),
    ("dataset_dir: data/yfcc_eval_spp.hdf5, ", "", "lacks output"),
    ("reader: {", "reader: 5 #", "reader should hold keys and values, not '5'"),
])
def test_mistakes_in_the_originals_yaml_of_an_evaluation(tmp_path, capsys, old, new, said):
    path = tmp_path / "original.yaml"
    path.write_text(EVAL_YAML.replace(old, new))
    assert run(eval_imp.main, ["--matching_method", "IMP", "--dataset", "yfcc", "--config", str(path)]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and said in error and all(note.startswith("note: ") for note in notes)


def test_the_originals_yaml_of_the_features_names_the_same_file(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(DUMP_YAML)
    args = eval_imp.parse_arguments(["--matching_method", "NN", "--dataset", "yfcc", "--config", str(path),
                                     "--hdf5", "data/yfcc_eval_spp.hdf5"])
    pair_set = eval_imp.build_pair_set(args)
    assert str(pair_set.image_dir) == "raw_data" and len(pair_set) == 3
