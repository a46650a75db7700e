"""ONNX files against the networks that they were made from."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nets import build_matcher
from tools import export_onnx
from tools.checkpoint import load_matcher, save_checkpoint
from tools.cli import run
from tools.files import file_hash

onnxruntime = pytest.importorskip("onnxruntime")
SIZES = [(1, 1), (1, 5), (7, 2), (20, 16), (150, 90), (60, 81)]


def save_matcher(path, network: str, dim: int, n_layers: int):
    """A checkpoint of random weights, yet with projections by which equal descriptors match."""
    torch.manual_seed(3)
    matcher = build_matcher(network, descriptor_dim=dim, n_layers=n_layers)
    with torch.no_grad():
        for mlp in (matcher.kenc.encoder, *(layer.mlp for layer in matcher.gnn.layers)):
            mlp[-1].weight *= 0.1
        for projection in matcher.final_proj:
            projection.weight.copy_(8 * torch.eye(dim))
    save_checkpoint(path, {"model": matcher.state_dict(), "feature": "sift" if dim == 128 else "tiny",
                           "config": {"network": network, "sinkhorn_iterations": 2, "n_min_tokens": 8}})


def run_onnx(session, tensors) -> list[np.ndarray]:
    names = [item.name for item in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})


def layout(items) -> dict:
    return {item.name: (item.type, item.shape) for item in items}


@pytest.fixture(scope="module")
def eimp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eimp")
    save_matcher(folder / "eimp.pth", "eimp", 16, 5)
    assert run(export_onnx.main, [str(folder / "eimp.pth"), str(folder / "eimp.onnx")]) == 0
    return folder


def test_onnx_runtime_finds_the_same_matches(eimp):
    matcher = load_matcher(eimp / "eimp.pth", "eimp", 16)
    module = export_onnx.OneShot(matcher)
    session = onnxruntime.InferenceSession(eimp / "eimp.onnx")
    n_matches = 0
    for n0, n1 in SIZES:
        tensors = export_onnx.example(module, 16, n0, n1)
        with torch.no_grad():
            expected = module(*tensors)
        n_matches += int((expected[0] >= 0).sum())
        for found, value in zip(run_onnx(session, tensors), expected, strict=True):
            assert found.dtype == value.numpy().dtype
            np.testing.assert_allclose(found, value.numpy(), rtol=0, atol=1e-4)
    assert n_matches > 100
    matcher.n_min_tokens = 1000
    with torch.no_grad():
        assert (module(*tensors)[1] - expected[1]).abs().max() > 1e-3  # so that pooling was tested


def test_the_file_says_what_it_is(eimp):
    session = onnxruntime.InferenceSession(eimp / "eimp.onnx")
    assert layout(session.get_inputs()) == {
        name + v: ("tensor(float)", shape) for v in "01" for name, shape in (
            ("keypoints", [1, f"n{v}", 2]), ("descriptors", [1, f"n{v}", 16]), ("scores", [1, f"n{v}"]),
            ("image_size", [1, 2]))}
    assert layout(session.get_outputs()) == {
        name + v: (f"tensor({kind})", [1, f"n{v}"]) for v in "01" for name, kind in (
            ("matches", "int64"), ("matching_scores", "float"))}
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata.pop("version")
    assert metadata == {"network": "eimp", "feature_type": "tiny", "descriptor_dim": "16", "n_layers": "5",
                        "match_threshold": "0.2", "weights": f"eimp.pth {file_hash(eimp / 'eimp.pth')}", "for": ""}
    assert str(export_onnx.__file__).encode() not in (eimp / "eimp.onnx").read_bytes()


def test_file_for_colmap(tmp_path, capsys):
    weights, path = tmp_path / "imp.pth", tmp_path / "new" / "imp.onnx"
    save_matcher(weights, "imp", 128, 1)
    assert run(export_onnx.main, [str(weights), str(path), "--for", "colmap"]) == 0
    assert "kpts0, kpts1, desc0, desc1, image_size0, image_size1 -> matches0, mscores0" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path)
    assert layout(session.get_inputs()) == {
        "kpts0": ("tensor(float)", [1, "n0", "columns"]), "kpts1": ("tensor(float)", [1, "n1", "columns"]),
        "desc0": ("tensor(float)", [1, "n0", 128]), "desc1": ("tensor(float)", [1, "n1", 128]),
        "image_size0": ("tensor(float)", [1, 2]), "image_size1": ("tensor(float)", [1, 2])}
    assert [(item.name, item.type, item.shape[1:]) for item in session.get_outputs()] == [
        ("matches0", "tensor(int64)", [2]), ("mscores0", "tensor(float)", [])]
    assert session.get_modelmeta().custom_metadata_map["for"] == "colmap"

    matcher = load_matcher(weights, "imp", 128)
    tensors = export_onnx.example(export_onnx.ForColmap(matcher), 128, 40, 30)
    kpts0, kpts1, desc0, desc1, size0, size1 = tensors
    data = {"keypoints0": kpts0[..., :2] - 0.5, "keypoints1": kpts1[..., :2] - 0.5, "image_size0": size0,
            "image_size1": size1, "descriptors0": F.normalize(desc0, dim=-1), "scores0": torch.zeros(1, 40),
            "descriptors1": F.normalize(desc1, dim=-1), "scores1": torch.zeros(1, 30)}
    with torch.no_grad():
        out = matcher(data)
    matches, scores = run_onnx(session, tensors)
    rows = np.flatnonzero(out["matches0"][0] >= 0)
    assert matches.dtype == np.int64 and len(rows) > 10
    np.testing.assert_array_equal(matches, np.stack([rows, out["matches0"][0].numpy()[rows]], axis=1))
    np.testing.assert_allclose(scores, out["matching_scores0"][0].numpy()[rows], atol=1e-4)
    for columns in (2, 6):  # further ones do not matter
        kpts0, kpts1 = (F.pad(kpts[..., :2], (0, columns - 2), value=7.0) for kpts in tensors[:2])
        np.testing.assert_array_equal(run_onnx(session, (kpts0, kpts1, *tensors[2:]))[0], matches)
    first = [tensor[:, :1] for tensor in tensors[:4]]
    found, scores = run_onnx(session, (*first[:3], -first[3], *tensors[4:]))  # without a match
    assert found.shape == (0, 2) and scores.shape == (0,)


def test_what_cannot_be_exported_is_said(tmp_path, capsys, monkeypatch):
    save_matcher(tmp_path / "spp.pth", "imp", 256, 1)
    save_checkpoint(tmp_path / "other.pth", {"model": {"convPa.weight": torch.zeros(1)}})
    for_colmap = ["--for", "colmap"]
    for name, options, words in (("spp.pth", for_colmap, "256 channels"), ("other.pth", [], "holds no matcher"),
                                 ("other.pth", for_colmap, "holds no matcher"), ("none.pth", [], "no checkpoint")):
        assert run(export_onnx.main, [str(tmp_path / name), str(tmp_path / "out.onnx"), *options]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    assert run(export_onnx.main, [str(tmp_path / "spp.pth"), str(tmp_path / "out.onnx")]) == 2
    assert "pip install '.[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
