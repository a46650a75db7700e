"""SuperPoint features all the way, with random weights: scene -> dump -> EIMP training -> evaluation."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from golden.fill import fill_
from plane_scene import files_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dump import dump, dump_megadepth, features
from dump.make_scenes import make_scenes
from eval import eval_imp
from nets import EIMP, SuperPoint
from tools import checkpoint
from tools.cli import run
from tools.features import Spp
from tools.manifest import load_dump
from tools.records import read_record

MIN_KEYPOINTS = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A scene in the layouts of training and evaluation, and SuperPoint weights in the place of the public ones."""
    root = tmp_path_factory.mktemp("spp")
    make_scenes(root / "scenes", scenes=1, images_per_scene=5, size=(160, 124), layouts=("megadepth", "yfcc"), pairs=3,
                workers=1)
    torch.save(fill_(SuperPoint(), "random").state_dict(), root / checkpoint.SUPERPOINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "WEIGHTS", root)
        yield root
    features._extractor.cache_clear()


@pytest.fixture(scope="module")
def training_dump(root):
    assert dump_megadepth.main(["--feature_type", "spp", "--base_path", str(root / "scenes" / "megadepth"),
                                "--save_path", str(root / "dump"), "--min_keypoints", str(MIN_KEYPOINTS),
                                "--device", "cpu", "--workers", "1"]) == 0
    return root / "dump"


@pytest.fixture(scope="module")
def trained(root, training_dump):
    """The folder of a run of EIMP."""
    config = {"network": "eimp", "feature": "spp", "layers": 5, "n_min_tokens": 16, "base_path": str(training_dump),
              "save_path": str(root / "run"), "max_keypoints": MIN_KEYPOINTS, "min_inliers": 8, "max_inliers": 48,
              "batch_size": 2, "epochs": 1, "its_per_epoch": 3, "workers": 0, "gpu": [-1], "init": "warm"}
    (root / "config.json").write_text(json.dumps(config))
    assert train.main(["--config", str(root / "config.json")]) == 0
    return root / "run"


def test_without_weights(root, tmp_path, monkeypatch, capsys):
    """The dump stops before it begins."""
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    features._extractor.cache_clear()
    assert run(dump_megadepth.main, ["--feature_type", "spp", "--base_path", str(root / "scenes" / "megadepth"),
                                     "--save_path", str(tmp_path / "dump")]) == 2
    assert "put superpoint_v1.pth" in capsys.readouterr().err
    assert not (tmp_path / "dump").exists()


def test_dump(training_dump):
    found = load_dump(training_dump)
    assert found["feature_type"] == "spp" and found["scenes"]["0000"] > 2
    assert found["settings"]["nms_radius"] == 3 and found["settings"]["keypoint_threshold"] == 0.001
    assert dump_megadepth.main(["--save_path", str(training_dump), "--verify"]) == 0
    records = [read_record(path) for path in (training_dump / "keypoints" / "0000").glob("*_spp.npy")]
    assert len(records) > 2
    for record in records:
        assert tuple(record["image_size"]) == (160, 124)
        assert record["descriptors"].shape == (len(record["keypoints"]), 256)
        # the last four rows belong to no whole cell; keypoints keep 4 px from the border of the others
        assert (record["keypoints"].min(axis=0) >= 4).all()
        assert (record["keypoints"].max(axis=0) < (160 - 4, 120 - 4)).all()
        assert (np.diff(record["scores"]) <= 0).all()


def spp_dump(root, out):
    return run(dump_megadepth.main, ["--feature_type", "spp", "--base_path", str(root / "scenes" / "megadepth"),
                                     "--save_path", str(out), "--min_keypoints", str(MIN_KEYPOINTS),
                                     "--device", "cpu", "--workers", "1"])


def by_position(record):
    """Its arrays over keypoints, not in the order of their scores: convolutions of another batch size may round
    otherwise, which swaps keypoints whose scores are all but equal."""
    order = np.lexsort(record["keypoints"].T)
    return {name: record[name][order] for name in ("keypoints", "scores", "descriptors", "depth")}


def test_dump_in_batches(root, training_dump, tmp_path, monkeypatch):
    """As on a GPU: the same features as one image at a time, and the same bytes after an interruption."""
    recipe = dump_megadepth.Recipe("spp", device="cpu")
    network, batches = features.extractor(*recipe.extraction), []
    extract_batch = network.extract_batch
    monkeypatch.setattr(network, "batch_pixels", 2 * 160 * 124)
    monkeypatch.setattr(network, "extract_batch", lambda images: batches.append(len(images)) or extract_batch(images))
    assert spp_dump(root, tmp_path / "dump") == 0
    assert batches == [2, 2, 1]
    for path in (training_dump / "keypoints" / "0000").iterdir():
        one, other = (by_position(read_record(folder / "keypoints" / "0000" / path.name))
                      for folder in (training_dump, tmp_path / "dump"))
        np.testing.assert_array_equal(other["keypoints"], one["keypoints"])
        np.testing.assert_allclose(other["scores"], one["scores"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(other["descriptors"].astype(float), one["descriptors"], rtol=0, atol=1e-3)
        np.testing.assert_array_equal(other["depth"], one["depth"])
    finished = files_of(tmp_path / "dump")
    (tmp_path / "dump" / "scenes" / "0000.json").unlink()
    min((tmp_path / "dump" / "keypoints" / "0000").iterdir()).unlink()
    assert spp_dump(root, tmp_path / "dump") == 0
    assert batches == [2, 2, 1, 2] and files_of(tmp_path / "dump") == finished


PATCHED_COMMAND = """
import sys
from pathlib import Path
from tools import checkpoint
checkpoint.WEIGHTS = Path(sys.argv[1])  # in the workers, too: they run what is outside of the condition below
from dump.dump_megadepth import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


def test_number_of_workers_and_threads_does_not_matter(root, training_dump, tmp_path):
    """Dumps on machines with other numbers of cores end with the same bytes."""
    threads = torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        try:
            assert spp_dump(root, tmp_path / f"{n}") == 0
            assert torch.get_num_threads() == n
        finally:
            torch.set_num_threads(threads)
        assert files_of(tmp_path / f"{n}") == files_of(training_dump)
    (tmp_path / "command.py").write_text(PATCHED_COMMAND)
    subprocess.run([sys.executable, tmp_path / "command.py", root, "--feature_type", "spp", "--base_path",
                    root / "scenes" / "megadepth", "--save_path", tmp_path / "dump", "--min_keypoints",
                    str(MIN_KEYPOINTS), "--device", "cpu", "--workers", "2"], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "3", "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert files_of(tmp_path / "dump") == files_of(training_dump)


def test_other_weights_are_refused(root, training_dump, tmp_path, monkeypatch, capsys):
    """The same in another file are not: the hash is of what they are."""
    state = fill_(SuperPoint(), "random").state_dict()
    for weights, status in (({"model": state}, 0), (fill_(SuperPoint(), "others").state_dict(), 2)):
        torch.save(weights, tmp_path / checkpoint.SUPERPOINT)
        monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
        features._extractor.cache_clear()
        capsys.readouterr()
        assert spp_dump(root, training_dump) == status
    assert "was made with weights " in capsys.readouterr().err
    features._extractor.cache_clear()


def test_training(trained):
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    matcher = checkpoint.load_matcher(trained / "latest.pth", "eimp", 256)
    assert isinstance(matcher, EIMP) and (matcher.n_layers, matcher.n_min_tokens) == (5, 16)
    assert all(torch.isfinite(value).all() for value in matcher.state_dict().values())


def test_evaluation(root, trained):
    config = {"dataset": "yfcc", "feature_type": "spp", "raw_data_dir": str(root / "scenes" / "yfcc" / "raw_data"),
              "output": str(root / "pairs.hdf5"), "scenes": [], "resize": [200], "extractor": {"max_keypoints": 200}}
    (root / "eval.yaml").write_text(json.dumps(config))
    assert dump.main(["--config", str(root / "eval.yaml"), "--device", "cpu", "--workers", "1"]) == 0
    with h5py.File(root / "pairs.hdf5") as file:
        assert file["desc1"]["0"].shape == (len(file["kpt1"]["0"]), 256)
        settings = json.loads(file.attrs["settings"])
    assert settings["weights"] == features.weights_of(("spp", Spp.dump_settings, "cpu"))["weights"]
    assert eval_imp.main(["--matching_method", "EIMP", "--dataset", "yfcc", "--feature_type", "spp", "--config",
                          str(root / "eval.yaml"), "--weights", str(trained / "latest.pth"), "--device", "cpu",
                          "--pictures", "0", "--save_path", str(root / "results")]) == 0
    assert (root / "results" / "results.json").is_file()
