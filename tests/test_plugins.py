"""hloc and glue-factory, neither of which can be installed here: stand-ins with their interfaces and file layout."""
import copy
import importlib
import inspect
import sys
from abc import ABCMeta, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import cv2
import h5py
import numpy as np
import pytest
import torch
from eval_scene import CAMERAS, NAMES, POSES, SIZES, list_set, make_pair, make_scene, write_warm_weights
from torch import nn

from eval import hloc_files
from eval.match_features import match_features
from tools.cli import InputError
from tools.features import FEATURE_TYPES, Sift
from tools.files import read_image
from tools.geometry import relative_pose
from tools.metrics import match_errors
from tools.pair_list import Pair


class HlocModel(nn.Module, metaclass=ABCMeta):
    """As hloc.utils.base_model.BaseModel."""

    default_conf: ClassVar = {}
    required_inputs: ClassVar = []

    def __init__(self, conf):
        super().__init__()
        self.conf = conf = {**self.default_conf, **conf}
        self.required_inputs = copy.copy(self.required_inputs)
        self._init(conf)

    def forward(self, data):
        for key in self.required_inputs:
            assert key in data, key
        return self._forward(data)

    @abstractmethod
    def _init(self, conf):
        raise NotImplementedError

    @abstractmethod
    def _forward(self, data):
        raise NotImplementedError


class GluefactoryModel(nn.Module, metaclass=ABCMeta):
    """As gluefactory.models.base_model.BaseModel, whose configuration is read by attribute."""

    default_conf: ClassVar = {"name": None, "trainable": True}
    required_data_keys: ClassVar = []

    def __init__(self, conf):
        super().__init__()
        self.conf = SimpleNamespace(**{**GluefactoryModel.default_conf, **self.default_conf, **conf})
        self._init(self.conf)
        for parameter in self.parameters():
            parameter.requires_grad = self.conf.trainable

    def forward(self, data):
        for key in self.required_data_keys:
            assert key in data, key
        return self._forward(data)

    @abstractmethod
    def _init(self, conf):
        raise NotImplementedError

    @abstractmethod
    def _forward(self, data):
        raise NotImplementedError

    @abstractmethod
    def loss(self, pred, data):
        raise NotImplementedError


def dynamic_load(root, model, base_model=HlocModel):
    """As hloc.utils.base_model.dynamic_load."""
    module_path = f"{root.__name__}.{model}"
    module = __import__(module_path, fromlist=[""])
    classes = [kind for _, kind in inspect.getmembers(module, inspect.isclass)
               if kind.__module__ == module_path and issubclass(kind, base_model)]
    assert len(classes) == 1, classes
    return classes[0]


@pytest.fixture
def hloc(monkeypatch):
    """Packages hloc.extractors and hloc.matchers, and our plugin in them."""
    modules = {name: ModuleType(name) for name in ("hloc", "hloc.utils", "hloc.utils.base_model", "hloc.extractors",
                                                   "hloc.matchers")}
    modules["hloc.utils.base_model"].BaseModel = HlocModel
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("eval.hloc_plugin", "hloc.extractors.imp", "hloc.matchers.imp"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is as before afterwards
        del sys.modules[name]
    plugin = importlib.import_module("eval.hloc_plugin")
    return SimpleNamespace(extractors=modules["hloc.extractors"], matchers=modules["hloc.matchers"], plugin=plugin)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_warm_weights(tmp_path_factory.mktemp("weights") / "warm.pth")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene"))


def extract_features(hloc, images, path, resize_max):
    """As hloc.extract_features.main does it, on the images of the scene."""
    conf = {**hloc.plugin.EXTRACTOR_CONF["model"], "max_keypoints": 400, "device": "cpu"}
    model = dynamic_load(hloc.extractors, conf["name"])(conf).eval()
    for name in NAMES:
        image = read_image(images / name).astype(np.float32)
        original_size = np.array(image.shape[::-1])
        scale = min(1, resize_max / max(image.shape))
        if scale < 1:
            size = tuple(round(side * scale) for side in original_size)
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        predicted = model({"image": torch.from_numpy(image[None, None] / 255)})
        predicted = {key: value[0].cpu().numpy() for key, value in predicted.items()}
        scales = (original_size / image.shape[::-1]).astype(np.float32)
        predicted["keypoints"] = (predicted["keypoints"] + 0.5) * scales - 0.5
        predicted["image_size"] = original_size
        predicted = {key: value.astype(np.float16) if value.dtype == np.float32 else value
                     for key, value in predicted.items()}
        with h5py.File(path, "a", libver="latest") as file:
            group = file.create_group(name)
            for key, value in predicted.items():
                group.create_dataset(key, data=value)
            group["keypoints"].attrs["uncertainty"] = scales.mean()


def match_as_hloc(hloc, features, path, conf):
    """As hloc.match_features.match_from_paths does it, on one pair of the scene."""
    model = dynamic_load(hloc.matchers, "imp")({**hloc.plugin.MATCHER_CONF["model"], **conf}).eval()
    data = {}
    with h5py.File(features, "r") as file:
        for v, name in enumerate(NAMES[:2]):
            for key, value in file[name].items():
                data[f"{key}{v}"] = torch.from_numpy(value.__array__()).float()[None]
            data[f"image{v}"] = torch.empty((1, 1) + tuple(file[name]["image_size"])[::-1])
    predicted = model(data)
    with h5py.File(path, "a", libver="latest") as file:
        group = file.create_group("/".join(name.replace("/", "-") for name in NAMES[:2]))
        group.create_dataset("matches0", data=predicted["matches0"][0].cpu().short().numpy())
        group.create_dataset("matching_scores0", data=predicted["matching_scores0"][0].cpu().half().numpy())


def match_arrays(view0, view1, *cameras, **options):
    arrays = [getattr(view, name) for view in (view0, view1)
              for name in ("keypoints", "descriptors", "scores", "image_size")]
    return match_features(*arrays, *cameras, **options)


def right_share(keypoints0, keypoints1, matches) -> float:
    """Share of matches within 3 pixels of their epipolar line, at the focal length of 360."""
    errors = match_errors(keypoints0[matches[:, 0]], keypoints1[matches[:, 1]], *CAMERAS[:2],
                          relative_pose(*POSES[:2]))
    return float(np.mean(np.asarray(errors) < 3 / 360))


@pytest.mark.parametrize("method", ["EIMP", "NN_ratio"])
def test_hloc_extracts_and_matches(method, hloc, scene, weights, tmp_path):
    extract_features(hloc, scene / "images", tmp_path / "features.h5", 1600)
    view = hloc_files.read_features(tmp_path / "features.h5", NAMES[0])
    own = Sift(**{**Sift.eval_settings, "max_keypoints": 400})(read_image(scene / "images" / NAMES[0]))
    assert view.image_size == SIZES[0]
    for name, tolerance in (("keypoints", 0.2), ("scores", 1e-3), ("descriptors", 1e-3)):  # half precision
        np.testing.assert_allclose(getattr(view, name), getattr(own, name), atol=tolerance)

    match_as_hloc(hloc, tmp_path / "features.h5", tmp_path / "matches.h5", {
        "matching_method": method, "weights": str(weights) if method == "EIMP" else None, "device": "cpu"})
    matches, scores = hloc_files.read_matches(tmp_path / "matches.h5", *NAMES[:2])
    other = hloc_files.read_features(tmp_path / "features.h5", NAMES[1])
    assert len(matches) == len(scores) > 50 and scores.min() > 0.1
    assert right_share(view.keypoints, other.keypoints, matches) > 0.8
    own = match_arrays(view, other, matching_method=method, weights=weights if method == "EIMP" else None)
    np.testing.assert_array_equal(matches, own.matches)
    np.testing.assert_allclose(scores, own.scores, atol=1e-3)
    swapped, _ = hloc_files.read_matches(tmp_path / "matches.h5", NAMES[1], NAMES[0])
    np.testing.assert_array_equal(swapped, matches[:, ::-1])
    with pytest.raises(InputError, match="has no matches of"):
        hloc_files.read_matches(tmp_path / "matches.h5", NAMES[0], NAMES[2])


def test_hloc_downscales_and_colours(hloc, scene, tmp_path, monkeypatch):
    extract_features(hloc, scene / "images", tmp_path / "features.h5", 300)
    assert hloc_files.read_features(tmp_path / "features.h5", NAMES[1]).image_size == SIZES[1]
    seen = []
    monkeypatch.setattr(FEATURE_TYPES["sift"], "color", True)
    monkeypatch.setattr(FEATURE_TYPES["sift"], "_extract", lambda self, images: seen.extend(images) or [
        self._features(image[..., 1].copy()) for image in images])
    model = dynamic_load(hloc.extractors, "imp")({"device": "cpu"})
    rgb = torch.rand(1, 3, 60, 80)
    out = model({"image": rgb})
    np.testing.assert_array_equal(seen[0][..., ::-1], (255 * rgb[0]).round().byte().permute(1, 2, 0).numpy())
    n = out["scores"].shape[1]
    assert out["keypoints"].shape == (1, n, 2) and out["descriptors"].shape == (1, 128, n)
    model({"image": rgb[:, :1]})
    assert (seen[1] == seen[1][..., :1]).all() and seen[1].shape == (60, 80, 3)
    monkeypatch.setattr(FEATURE_TYPES["sift"], "color", False)
    with pytest.raises(ValueError, match="grayscale"):
        model({"image": rgb})


@pytest.mark.parametrize("n0", [0, 2])
def test_hloc_matches_few_keypoints(n0, hloc, monkeypatch):
    model = dynamic_load(hloc.matchers, "imp")({"matching_method": "NN_ratio", "device": "cpu"})
    seen, match = {}, model.matcher.match
    monkeypatch.setattr(model.matcher, "match", lambda data: seen.update(data) or match(data))
    data = {f"image{v}": torch.empty(1, 1, 240, 320) for v in "01"}
    for v, n in (("0", n0), ("1", 3)):
        data |= {f"keypoints{v}": torch.rand(1, n, 2), f"scores{v}": torch.rand(1, n),
                 f"descriptors{v}": torch.rand(1, 128, n)}
    assert model(data)["matches0"].shape == (1, n0)
    if n0:  # as our matchers take it
        assert seen["image_size0"].tolist() == [[320, 240]] and seen["descriptors1"].shape == (1, 3, 128)


def test_hloc_files_written_by_us(scene, weights, tmp_path):
    pair_set = list_set(scene, [make_pair(0, 1), make_pair(1, 2)])
    views = [pair_set[0].features0, pair_set[0].features1, pair_set[1].features1]
    features, path = tmp_path / "features.h5", tmp_path / "matches.h5"
    hloc_files.write_features(features, zip(NAMES, views))
    with h5py.File(features) as file:
        group = file[NAMES[1]]
        assert set(group) == {"keypoints", "scores", "descriptors", "image_size"}
        assert group["descriptors"].shape == (128, len(views[1].keypoints))
        assert tuple(group["image_size"]) == SIZES[1]
    for name in ("keypoints", "scores", "descriptors", "image_size"):
        np.testing.assert_array_equal(getattr(hloc_files.read_features(features, NAMES[1]), name),
                                      getattr(views[1], name))
    pairs = [make_pair(0, 1), Pair(NAMES[2], NAMES[1]), Pair(NAMES[1], NAMES[0]), Pair(NAMES[0], "missing.png"),
             Pair(NAMES[0], NAMES[2], 1, 0)]
    options = {"matching_method": "EIMP", "weights": weights}
    skipped = hloc_files.match_pairs(features, pairs, path, verified=True, **options)
    assert [name for name, _ in skipped] == [f"{NAMES[0]} missing.png", f"{NAMES[0]} {NAMES[2]}"]
    with h5py.File(path) as file:
        assert sorted(f"{a}/{b}" for a in file for b in file[a]) == ["a.png/sub-b.png", "c.png/sub-b.png"]
        stored = file["a.png/sub-b.png"]
        assert stored["matches0"].shape == stored["matching_scores0"].shape == (len(views[0].keypoints),)
    matches, scores = hloc_files.read_matches(path, *NAMES[:2])
    assert len(matches) > 50 and right_share(views[0].keypoints, views[1].keypoints, matches) > 0.95
    assert (scores > 0).all() and len(hloc_files.read_matches(path, NAMES[2], NAMES[1])[0]) > 20
    for verified in (False, True):
        assert not hloc_files.match_pairs(features, [make_pair(0, 1)], path, verified, matching_method="NN_ratio")
        found = match_arrays(*views[:2], *CAMERAS[:2], matching_method="NN_ratio")
        chosen = found.pose[2] if verified else slice(None)
        np.testing.assert_array_equal(hloc_files.read_matches(path, *NAMES[:2])[0], found.matches[chosen])
    assert 50 < found.pose[2].sum() < len(found.matches)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"matches\.h5"):
        hloc_files.read_matches(path, *NAMES[:2])


def test_gluefactory_matches_a_batch(weights, monkeypatch):
    for name in ("gluefactory", "gluefactory.models", "gluefactory.models.base_model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["gluefactory.models.base_model"].BaseModel = GluefactoryModel
    monkeypatch.setitem(sys.modules, "eval.gluefactory_matcher", None)
    del sys.modules["eval.gluefactory_matcher"]
    name = "eval.gluefactory_matcher"
    module = __import__(name, fromlist=[""])
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass)
             if kind.__module__ == name and issubclass(kind, GluefactoryModel)]
    assert kinds == [module.__main_model__]
    model = kinds[0]({"name": name, "matching_method": "EIMP", "weights": str(weights)}).eval()
    assert not any(parameter.requires_grad for parameter in model.parameters())

    generator = torch.Generator().manual_seed(0)
    descriptors = nn.functional.normalize(torch.randn(2, 50, 128, generator=generator), dim=-1)
    keypoints = 300 * torch.rand(2, 50, 2, generator=generator)
    order = torch.randperm(50, generator=generator)[:40]
    view = {"image_size": torch.tensor([[400.0, 300.0], [320.0, 240.0]])}
    data = {"keypoints0": keypoints, "keypoints1": keypoints[:, order] + 5, "descriptors0": descriptors,
            "descriptors1": descriptors[:, order], "view0": view, "view1": view,
            "keypoint_scores0": torch.rand(2, 50, generator=generator)}
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    out = model(data)
    assert (out["matches1"] == order).float().mean() > 0.95
    assert out["matches0"].shape == out["matching_scores0"].shape == (2, 50)
    assert out["matches1"].shape == out["matching_scores1"].shape == (2, 40)
    assert not kinds[0]({"weights": str(weights), "match_threshold": 1.0}).eval()(data)["matches0"].ge(0).any()
    expected = {"keypoints0": keypoints - 0.5, "keypoints1": keypoints[:, order] + 4.5, "scores1": torch.zeros(2, 40),
                "scores0": data["keypoint_scores0"], "descriptors0": descriptors, "image_size1": view["image_size"]}
    for key, value in expected.items():
        torch.testing.assert_close(seen[0][key], value)
    with pytest.raises(NotImplementedError, match=r"train\.py"):
        model.loss(out, data)
