"""ALIKED features all the way: scenes -> dump -> training, also online -> evaluation beside LightGlue."""
import json
import shutil

import numpy as np
import pytest
from test_features import kornia_extractor

import train
from dump import dump, dump_megadepth, features
from dump.make_scenes import make_scenes
from eval import eval_imp
from imp_matching import shipped
from tools import checkpoint
from tools.manifest import load_dump
from tools.pretrained import find_pretrained
from tools.records import read_record

MIN_KEYPOINTS = 128
BASE = str(shipped("configs") / "config_train_megadepth_aliked.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    kornia_extractor("aliked")
    root = tmp_path_factory.mktemp("aliked")
    make_scenes(root / "scenes", scenes=1, images_per_scene=4, size=(200, 152), layouts=("megadepth", "yfcc"), pairs=2,
                workers=1)
    assert dump_megadepth.main(["--feature_type", "aliked", "--base_path", str(root / "scenes" / "megadepth"),
                                "--save_path", str(root / "dump"), "--min_keypoints", str(MIN_KEYPOINTS),
                                "--max_keypoints", "300", "--device", "cpu", "--workers", "1"]) == 0
    yield root
    features._extractor.cache_clear()


@pytest.fixture(scope="module")
def trained(root):
    config = {"base": BASE, "layers": 3, "scene_list_fn": None,
              "base_path": str(root / "dump"), "save_path": str(root / "run"), "max_keypoints": MIN_KEYPOINTS,
              "min_inliers": 8, "max_inliers": 48, "batch_size": 2, "epochs": 1, "its_per_epoch": 2, "workers": 0,
              "gpu": [-1], "init": "warm"}
    (root / "config.json").write_text(json.dumps(config))
    assert train.main(["--config", str(root / "config.json")]) == 0
    return root / "run" / "latest.pth"


def test_dump(root):
    found = load_dump(root / "dump")
    assert found["feature_type"] == "aliked" and found["scenes"]["0000"] > 2
    assert found["settings"]["nms_radius"] == 2 and len(found["settings"]["weights"]) == 16
    assert dump_megadepth.main(["--save_path", str(root / "dump"), "--verify"]) == 0
    for path in (root / "dump" / "keypoints" / "0000").glob("*_aliked.npy"):
        record = read_record(path)
        assert record["descriptors"].shape == (len(record["keypoints"]), 128) and len(record["keypoints"]) <= 300
        assert (np.diff(record["scores"]) <= 0).all()


def test_training(trained):
    assert checkpoint.load_matcher(trained, "imp", 128).n_layers == 3
    assert checkpoint.load_checkpoint(trained)["config"]["feature"] == "aliked"


def test_training_on_photographs(root):
    """Online samples are made of images in colour."""
    config = {"base": BASE, "layers": 2, "online": 1, "online_sources": [{"path": str(root / "scenes" / "yfcc")}],
              "extract_keypoints": 300, "min_keypoints": 64, "view_size": 200, "online_views": 2, "inlier_th": 3.0,
              "save_path": str(root / "online"), "max_keypoints": 64, "min_inliers": 4, "max_inliers": 32,
              "batch_size": 1, "epochs": 1, "its_per_epoch": 1, "workers": 0, "gpu": [-1], "init": "warm"}
    (root / "online.json").write_text(json.dumps(config))
    assert train.main(["--config", str(root / "online.json")]) == 0


def test_evaluation(root, trained):
    config = {"dataset": "yfcc", "feature_type": "aliked", "raw_data_dir": str(root / "scenes" / "yfcc" / "raw_data"),
              "output": str(root / "pairs.hdf5"), "scenes": [], "resize": [200], "extractor": {"max_keypoints": 200}}
    (root / "eval.yaml").write_text(json.dumps(config))
    shutil.copy(find_pretrained("aliked_lightglue.pth"), root / "lightglue.pth")
    assert dump.main(["--config", str(root / "eval.yaml"), "--device", "cpu", "--workers", "1"]) == 0
    assert eval_imp.main(["--matching_method", "IMP", "LightGlue", "--use_iterative", "--dataset", "yfcc",
                          "--feature_type", "aliked", "--config", str(root / "eval.yaml"), "--weights", str(trained),
                          str(root / "lightglue.pth"), "--device", "cpu", "--pictures", "0",
                          "--save_path", str(root / "results")]) == 0
    methods = json.loads((root / "results" / "results.json").read_text())["tables"][0]["methods"]
    assert list(methods) == ["IMP", "IMP iterative", "LightGlue", "LightGlue iterative"]
