"""Checkpoints: the keys that published files have, and what is said of files that do not fit."""
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill_

from nets import SuperPoint, build_matcher
from tools import checkpoint
from tools.checkpoint import default_weights, describe_weights, load_checkpoint, load_matcher, load_weights
from tools.cli import InputError


def published_shapes(network, dim, n_layers, norm_fn):
    """Names and shapes of a published state dict."""
    shapes = {"bin_score": ()}

    def linear(name, n_out, n_in):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in, 1), (n_out,)

    def mlp(name, *channels):
        index = 0
        for i in range(1, len(channels)):
            linear(f"{name}.{index}", channels[i], channels[i - 1])
            if norm_fn == "bn" and i < len(channels) - 1:
                for key in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{name}.{index + 1}.{key}"] = (channels[i],)
                shapes[f"{name}.{index + 1}.num_batches_tracked"] = ()
            index += 2 if norm_fn is None else 3

    mlp("kenc.encoder", 3, 32, 64, 128, 256, dim)
    for i in range(2 * n_layers):
        layer = f"gnn.layers.{i}"
        if network != "gm" and i >= 4 and (i - 4) % 4 >= 2:
            names = [f"{layer}.proj", f"{layer}.merge"]
        else:
            names = [*(f"{layer}.attn.proj.{j}" for j in range(3)), f"{layer}.attn.merge"]
        for name in names:
            linear(name, dim, dim)
        mlp(f"{layer}.mlp", 2 * dim, 2 * dim, dim)
    for t in range(n_layers):
        linear(f"final_proj.{t}", dim, dim)
    return shapes


def make_state(network="eimp", dim=8, n_layers=5, norm_fn="in"):
    return fill_(build_matcher(network, descriptor_dim=dim, n_layers=n_layers, norm_fn=norm_fn)).state_dict()


@pytest.fixture
def save(tmp_path):
    def save(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return save


@pytest.mark.parametrize("network, norm_fn", [("gm", "in"), ("imp", "in"), ("eimp", "in"), ("imp", "bn"), ("gm", None)])
@pytest.mark.parametrize("dim, n_layers", [(256, 15), (8, 5), (12, 1)])
def test_published_files_load(network, norm_fn, dim, n_layers):
    shapes = published_shapes(network, dim, n_layers, norm_fn)
    with torch.device("meta"):
        matcher = build_matcher(network, descriptor_dim=dim, n_layers=n_layers, norm_fn=norm_fn)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert {name: tuple(value.shape) for name, value in matcher.state_dict().items()} == shapes
    matcher.load_state_dict(state, strict=True, assign=True)
    found = describe_weights(state)
    assert (found["descriptor_dim"], found["n_layers"], found["norm_fn"]) == (dim, n_layers, norm_fn)
    assert found["network"] == ("gm" if network == "gm" and n_layers > 3 else "imp")


@pytest.mark.parametrize("norm_fn", ["in", "bn", None])
@pytest.mark.parametrize("network", ["gm", "imp", "eimp"])
def test_a_file_says_what_its_network_is(save, network, norm_fn):
    state = make_state(network, norm_fn=norm_fn)
    for content in ({"model": state, "epoch": 3}, state):  # a bare state dict too
        matcher = load_matcher(save(content), network, 8)
        assert not matcher.training and matcher.n_layers == 5 and type(matcher).__name__.lower() == network
        assert all(torch.equal(value, state[name]) for name, value in matcher.state_dict().items())


def test_settings_of_a_file_and_options(save):
    """What weights do not show comes from the config that our files carry; what the caller says goes before both."""
    config = {"ac_fn": "gelu", "with_sinkhorn": False, "n_min_tokens": 7, "layers": 99, "lr": 0.1}
    path = save({"model": make_state(), "config": config})
    matcher = load_matcher(path, "eimp", 8)
    assert (matcher.with_sinkhorn, matcher.n_min_tokens, matcher.n_layers) == (False, 7, 5)
    assert isinstance(matcher.gnn.layers[0].mlp[2], torch.nn.GELU)
    matcher = load_matcher(path, "eimp", 8, with_sinkhorn=True, match_threshold=0.5)
    assert (matcher.with_sinkhorn, matcher.match_threshold, matcher.n_min_tokens) == (True, 0.5, 7)
    assert load_matcher(save({"model": make_state(), "config": "of another kind"}), "eimp", 8).n_min_tokens == 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read_as_single(save, dtype):
    state = {name: value.to(dtype) if value.is_floating_point() else value
             for name, value in make_state(norm_fn="bn").items()}
    matcher = load_matcher(save({"model": state}), "eimp", 8)
    for name, value in matcher.state_dict().items():
        assert value.dtype == (torch.int64 if name.endswith("tracked") else torch.float32)
        assert torch.equal(value, state[name].to(value.dtype))


def test_files_for_something_else(save):
    eimp, gm = make_state(), make_state("gm")
    wrong_shape = {**eimp, "gnn.layers.3.attn.merge.weight": torch.zeros(8, 4, 1)}
    lacking = {name: value for name, value in eimp.items() if name != "gnn.layers.2.mlp.0.bias"}
    for state, network, dim, options, message in (
            (eimp, "gm", 8, {}, "holds the network imp, not gm"),
            (gm, "eimp", 8, {}, "holds the network gm, not eimp"),
            (eimp, "eimp", 16, {}, "is for descriptors of 8 channels, not 16: check --feature_type"),
            (eimp, "eimp", 8, {"n_layers": 7},
             r"it lacks gnn.layers.10.* \(the file is for network imp, descriptor_dim 8, n_layers 5, norm_fn in\)"),
            (eimp, "eimp", 8, {"norm_fn": "bn"}, "it lacks kenc.encoder.1.weight"),
            (lacking, "eimp", 8, {}, r"does not fit this network: it lacks gnn.layers.2.mlp.0.bias"),
            ({**eimp, "gnn.extra": torch.zeros(1)}, "imp", 8, {}, "it has gnn.extra, which the network does not have"),
            (wrong_shape, "imp", 8, {},
             r"gnn.layers.3.attn.merge.weight has shape \(8, 4, 1\), the network wants \(8, 8, 1\)"),
            (SuperPoint().state_dict(), "imp", 8, {},
             r"holds no matcher, as it has no final_proj weights \(superpoint\)"),
            ({}, "imp", 8, {}, "holds no matcher")):
        path = save({"model": state})
        with pytest.raises(InputError, match=message) as error:
            load_matcher(path, network, dim, **options)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_are_not_touched_by_a_file_that_does_not_fit():
    matcher = build_matcher("imp", descriptor_dim=8, n_layers=5)
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    state = make_state("imp")
    state["final_proj.4.bias"] = torch.zeros(9)
    with pytest.raises(InputError, match=r"final_proj.4.bias has shape"):
        load_weights(matcher, state, "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())


class RunsCode:
    """What a hostile file holds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_cannot_be_read(save, tmp_path):
    whole = save({"model": make_state()}).read_bytes()
    witness = tmp_path / "ran"
    files = {"truncated.pth": whole[:len(whole) // 2], "empty.pth": b"", "page.pth": b"<html>not found</html>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not a readable checkpoint"):
            load_checkpoint(tmp_path / name)
    hostile = save({"model": make_state(), "more": RunsCode(witness)}, "code.pth")
    with pytest.raises(InputError, match=r"code.pth was left unread: it holds \w+\.mkdir, which could run code"):
        load_checkpoint(hostile)
    assert not witness.exists()
    torch.load(hostile, weights_only=False)
    assert witness.exists()  # so it was indeed the guard that kept it from running
    for content, message in (([1, 2], "has no entry 'model'"), ({"net": {}}, "has no entry 'model'"),
                             ({"model": {"a": 1}}, "a in its entry 'model' is not a tensor")):
        with pytest.raises(InputError, match=message):
            load_checkpoint(save(content))
    with pytest.raises(InputError, match=r"no checkpoint at .*absent.pth"):
        load_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize("modules", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("min_loss", [None, np.float64(0.25), np.float32(0.25), np.int64(3), np.array([0.25, 3])])
def test_a_checkpoint_of_the_published_trainer(save, min_loss, modules):
    """It stored the mean of its losses, a NumPy number, under the module names of NumPy 1."""
    path = save({"epoch": 7, "iteration": 7000, "model": make_state(), "min_loss": min_loss})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"cnumpy._core.", b"c%b." % modules.encode()))
    content = load_checkpoint(path)
    assert content["epoch"] == 7 and np.array_equal(content["min_loss"], min_loss)
    assert type(content["min_loss"]) is type(min_loss) or isinstance(min_loss, np.ndarray)
    assert load_matcher(path, "eimp", 8).n_layers == 5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "matcher."])
@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", None])
def test_weights_of_wrapped_networks(save, prefix, entry):
    state = make_state()
    wrapped = {prefix + name: value for name, value in state.items()}
    matcher = load_matcher(save({entry: wrapped} if entry else wrapped), "eimp", 8)
    assert all(torch.equal(value, state[name]) for name, value in matcher.state_dict().items())


@pytest.mark.parametrize("damage, message", [
    ({"config": {"sinkhorn_iterations": 10 ** 9}}, "config says sinkhorn_iterations 1000000000"),
    ({"config": {"ac_fn": []}}, "config says ac_fn"), ({"config": {"n_min_tokens": "many"}}, "config says n_min"),
    ({"config": {"with_sinkhorn": torch.zeros(3)}}, "config says with_sinkhorn"),
    ({"model": {**make_state(), "bin_score": torch.tensor(float("nan"))}}, "bin_score has values that are not finite"),
    ({"model": {f"final_proj.{i}.weight": torch.zeros(8) for i in range(1000)} | {"a": torch.ones(1)}},
     "1000 iterations"),
    ({"model": {**make_state(), "bin_score": torch.zeros(2).to_sparse()}}, "bin_score in its entry 'model' is no"),
    ({"model": {**make_state(), 3: torch.zeros(2)}}, "3 in its entry 'model' is not a tensor"),
    ({"model": {"final_proj.0.weight": torch.tensor(1.0), "gnn": torch.tensor(1.0)}}, "descriptors of 0 channels"),
])
def test_damaged_values(save, damage, message):
    path = save({"model": make_state(), **damage})
    with pytest.raises(InputError, match=message) as error:
        load_matcher(path, "eimp", 8)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_byte_anywhere_is_one_line(save, tmp_path):
    whole, rng = save({"model": make_state("gm", 4, 1), "config": {"network": "gm"}}).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        # the zip's directory and the pickle are a small part of the file
        data[rng.choice((rng.randrange(1500), rng.randrange(-4000, 0)))] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pth").write_bytes(data)
        try:
            load_matcher(tmp_path / "flipped.pth", "gm", 4)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def test_default_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    for method, feature_type, dataset, name in (
            ("IMP", "spp", "yfcc", "imp_spp"), ("EIMP", "sift", None, "eimp_sift"),
            ("IMP_geo", "spp", "yfcc", "imp_geo_spp_yfcc"), ("EIMP_geo", "spp", "scannet", "eimp_geo_spp_scannet"),
            ("EIMP_geo", "sift", "scannet", "eimp_geo_sift"), ("IMP_geo", "sift", None, "imp_geo_sift")):
        channels = {"spp": 256, "sift": 128}[feature_type]
        with pytest.raises(InputError, match=rf"for {method} with {feature_type} \({channels} channels\): put the "
                                             rf"published file at weights/{name}.pth, or name one with --weights"):
            default_weights(method, feature_type, dataset)
        (tmp_path / f"{name}.pth").touch()
        assert default_weights(method, feature_type, dataset) == tmp_path / f"{name}.pth"
    with pytest.raises(InputError, match=r"name weights/eimp_geo_spp_yfcc.pth .* or weights/eimp_geo_spp_scannet.pth"):
        default_weights("EIMP_geo", "spp", None)


def test_our_own_weights_stand_in_for_published_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    (tmp_path / "imp_sift_open.pth").touch()
    for method in ("IMP", "EIMP"):
        assert default_weights(method, "sift", "yfcc") == tmp_path / "imp_sift_open.pth"
        error = capsys.readouterr().err
        assert f"weights/{method.lower()}_sift.pth" in error and "weights/imp_sift_open.pth" in error
        assert error.count("\n") == 1
    for method, feature_type in (("GM", "sift"), ("EIMP", "spp"), ("EIMP_geo", "sift")):
        with pytest.raises(InputError):
            default_weights(method, feature_type)
    (tmp_path / "eimp_sift.pth").touch()
    assert default_weights("EIMP", "sift", "yfcc") == tmp_path / "eimp_sift.pth"
    assert capsys.readouterr().err == ""


def test_the_file_that_shipped_for_eimp_is_that_of_imp(capsys):
    old, new = (load_checkpoint(checkpoint.WEIGHTS / f"{name}_sift_open.pth")["model"] for name in ("eimp", "imp"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert "IMP and EIMP have the same parameters" in capsys.readouterr().err


def test_the_demo_is_offered_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "runs" / "demo" / "imp" / "latest.pth"
    for made in (False, True):
        with pytest.raises(InputError, match=r"weights/imp_sift.pth, or name one with --weights") as error:
            default_weights("IMP", "sift")
        offer = "the demo's are at runs/demo/imp/latest.pth" if made else "`make demo` trains small ones"
        assert str(error.value).endswith(offer)
        demo.parent.mkdir(parents=True, exist_ok=True)
        demo.touch()
    for method, feature_type in (("IMP", "spp"), ("GM", "sift")):
        with pytest.raises(InputError) as error:
            default_weights(method, feature_type)
        assert "demo" not in str(error.value)


def test_every_published_file_is_explained():
    text = (Path(__file__).parent.parent / "weights" / "README.md").read_text()
    names = [f"{network}_{kind}.pth" for network in ("imp", "eimp")
             for kind in ("spp", "sift", "geo_spp_yfcc", "geo_spp_scannet", "geo_sift")]
    for name in [*names, checkpoint.SUPERPOINT]:
        assert f"`{name}`" in text
