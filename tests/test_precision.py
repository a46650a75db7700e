"""Precisions of the networks: what a device has, which layers take them, and that matches hardly change."""
import json

import numpy as np
import pytest
import torch
from eval_scene import CAMERAS, NAMES, make_scene

from eval import eval_imp, match_images
from eval.image_matcher import ImageMatcher
from eval.iterative import match_one_shot
from eval.methods import MATCHERS, MatcherSettings, Method, PoseSetting, to_data
from eval.pair_sets import EvalPair, ListPairSet
from eval.run import evaluate
from nets import build_matcher, layers
from nets.layers import Attention, attend
from tools.cli import InputError, run
from tools.features import build_extractor
from tools.pair_list import Pair, write_pair_list
from tools.precision import check_precision, set_precision, tf32

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene"))


def set_cpu(monkeypatch, avx512_bf16=False, amx=False):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def test_what_a_device_cannot_do_is_said(monkeypatch, capsys):
    for has in ({"avx512_bf16": True}, {"amx": True}):
        set_cpu(monkeypatch, **has)
        assert check_precision("bfloat16", CPU) == "bfloat16" and check_precision("float32", CPU) == "float32"
    assert capsys.readouterr().err == ""
    set_cpu(monkeypatch)
    assert check_precision("bfloat16", CPU) == "bfloat16" and "emulates it" in capsys.readouterr().err
    assert check_precision("tf32", CPU) == "float32" and "on a CPU that is float32" in capsys.readouterr().err
    assert check_precision("tf32", GPU) == "tf32" and capsys.readouterr().err == ""
    with pytest.raises(InputError, match="precision 'float16': expected one of float32, tf32, bfloat16"):
        check_precision("float16", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(InputError, match="an old GPU has none and would only emulate it"):
        check_precision("bfloat16", GPU)


class Asked(torch.nn.Linear):
    """Notes what its forward pass is computed in."""

    def forward(self, x, bias=0):
        self.seen = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
        return super().forward(x) + bias


@pytest.mark.parametrize("name, seen", [("float32", ("highest", False)), ("tf32", ("high", False)),
                                        ("bfloat16", ("highest", True))])
def test_a_precision_is_that_of_the_layers_alone(name, seen):
    layer = Asked(3, 3)
    set_precision([layer], name)
    with torch.no_grad():
        out = layer(torch.ones(2, 3), bias=1)
    assert layer.seen == seen and out.dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")


def test_tf32_ends_with_its_block_also_after_an_error():
    with pytest.raises(ZeroDivisionError), tf32("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
        _ = 1 / 0
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


# attention in bfloat16

def random_attention(n, m, masked, batch=2, heads=4, dim=16):
    rng = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(batch, count, heads, dim, generator=rng).transpose(1, 2).bfloat16()
                             for count in (n, m, m))
    keep = torch.rand(batch, m, generator=rng) > 0.3 if masked else None
    return 2 * queries, keys, values, keep


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("n, m", [(32, 40), (50, 7), (0, 5), (1, 1)])
def test_attention_by_blocks(monkeypatch, n, m, scale, masked):
    """Also of logits so large that bfloat16 would round them to whole numbers."""
    monkeypatch.setattr(layers, "BLOCK_ROWS", 16)
    monkeypatch.setattr(Attention, "MAX_STORED", -1)
    queries, keys, values, keep = random_attention(n, m, masked)
    queries = scale * queries
    mask = None if keep is None else keep[:, None, None, :]
    logits = queries.double() @ keys.double().transpose(2, 3) / 4
    matrix = (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)
    with torch.no_grad():
        torch.testing.assert_close(attend(queries, keys, values, mask).double(), matrix @ values.double(), rtol=0.02,
                                   atol=0.02)
        attention = Attention(queries, keys, keep, is_shared=True)
        assert attention.stored is None
        if n:
            mass = matrix.sum(dim=(1, 2)) / matrix.sum(dim=(1, 2, 3)).unsqueeze(1)
            torch.testing.assert_close(attention.received_mass(None).double(), mass, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_that_instance_norm_takes_off_is_not_rounded_with(masked):
    rng = torch.Generator().manual_seed(0)
    mlp = layers.MLP([8, 16, 8], "in", "relu")
    x = torch.randn(2, 30, 8, generator=rng) + 30 * torch.randn(8, generator=rng)
    masks = (torch.rand(2, 20, generator=rng) > 0.3, None) if masked else (None, None)
    views = layers.Views((20, 10), masks)
    with torch.no_grad():
        expected = mlp(x, views)
        with torch.autocast("cpu", torch.bfloat16):
            found = mlp(x, views).float()
    real = slice(None) if not masked else views.joint_mask(x)
    torch.testing.assert_close(found[real], expected[real], rtol=0.02, atol=0.02)


def test_a_view_without_keypoints_in_bfloat16():
    network = build_matcher("eimp", descriptor_dim=32, n_layers=6).eval()
    set_precision(network.gnn.layers, "bfloat16")
    data = {}
    for v, n in (("0", 5), ("1", 0)):
        data |= {f"descriptors{v}": torch.rand(1, n, 32), f"norm_keypoints{v}": torch.rand(1, n, 2),
                 f"scores{v}": torch.rand(1, n)}
    with torch.no_grad():
        assert network(data)["matches0"].tolist() == [[-1] * 5]


@pytest.mark.parametrize("most", [-1, 2 ** 24])
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_in_bfloat16(monkeypatch, masked, scale, most):
    """With the matrix stored or not, they are those of double precision; the messages of a second layer add theirs."""
    monkeypatch.setattr(Attention, "MAX_STORED", most)
    queries, keys, values, keep = random_attention(20, 30, masked)
    tensors = scale * queries, keys, values
    weights = torch.randn(values[:, :, :20].shape, generator=torch.Generator().manual_seed(1))

    def gradients(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        attention = Attention(*leaves[:2], keep, is_shared=False)
        assert (attention.stored is None) == (most < 0 or dtype != torch.bfloat16)
        messages = attention.messages(leaves[2]) + attention.messages(2 * leaves[2].flip(2))
        return torch.autograd.grad((messages * weights).sum(), leaves)

    for found, expected in zip(gradients(torch.bfloat16), gradients(torch.float64)):
        assert (found - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize("most", [-1, 2 ** 22])
def test_shared_attention_in_bfloat16(monkeypatch, most):
    """Stored or computed again, it gives the same messages."""
    monkeypatch.setattr(Attention, "MAX_STORED", most)
    queries, keys, values, keep = random_attention(20, 30, True)
    with torch.no_grad():
        shared, own = (Attention(queries, keys, keep, is_shared) for is_shared in (True, False))
        assert (shared.stored is None) == (most < 0) and own.stored is None
        torch.testing.assert_close(shared.messages(values).float(), own.messages(values).float(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(shared.received_mass(None), own.received_mass(None), rtol=0.01, atol=1e-4)


# matching

def test_matches_in_bfloat16_are_those_of_float32(scene):
    extractor = build_extractor("sift", max_keypoints=400)
    features = [extractor(match_images.ImageMatcher("NN").load(scene / "images" / name).picture[..., 0])
                for name in NAMES[:2]]
    data = to_data(EvalPair(0, ("a", "b"), ("a", "b"), *features, *CAMERAS[:2]))
    for method in ("IMP", "EIMP"):
        found = {}
        for name in ("float32", "bfloat16"):
            matcher = MATCHERS[method](MatcherSettings(precision=name))
            outcome = match_one_shot(matcher, data)
            assert outcome.scores.dtype == np.float32
            found[name] = {tuple(match) for match in outcome.matches.tolist()}, outcome.scores
        (expected, scores), (other, other_scores) = found.values()
        assert len(expected) > 100 and 2 * len(expected & other) / (len(expected) + len(other)) > 0.98
        assert len(scores) != len(other_scores) or not np.array_equal(scores, other_scores)


def test_descriptors_between_layers_and_assignment_are_in_float32():
    network = build_matcher("imp", descriptor_dim=32, n_layers=5).eval()
    set_precision(network.gnn.layers, "bfloat16")
    rng = torch.Generator().manual_seed(0)
    data = {}
    for v in "01":
        data[f"descriptors{v}"] = torch.nn.functional.normalize(torch.randn(1, 50, 32, generator=rng), dim=-1)
        data[f"norm_keypoints{v}"], data[f"scores{v}"] = torch.rand(1, 50, 2, generator=rng), torch.rand(1, 50)
    with torch.no_grad():
        for state in network.iterate(data):
            assert state.x.dtype == state.assignment.dtype == torch.float32
            assert state.attention_self[0].queries.dtype == torch.bfloat16


def test_precision_is_that_of_networks():
    assert ImageMatcher("NN", precision="bfloat16").settings["precision"] == "float32"
    for name in ("float32", "bfloat16"):
        matcher = ImageMatcher("IMP", "sift", precision=name)
        assert matcher.settings["precision"] == name
        assert ("forward" in vars(matcher.matcher.network.gnn.layers[0])) == (name == "bfloat16")


def test_a_folder_is_resumed_in_its_precision(scene, tmp_path, capsys):
    def command(*options):
        images = [str(scene / "images" / name) for name in NAMES[:3]]
        assert run(match_images.main, [*images, "--matching_method", "IMP", "--feature_type", "sift",
                                       "--max_keypoints", "60", "--save_path", str(tmp_path), *options]) == 0
        with np.load(next(iter(tmp_path.glob("*.npz")))) as content:
            return capsys.readouterr().out, json.loads(str(content["settings"]))["precision"]

    assert command()[1] == "float32"
    said, used = command("--precision", "bfloat16")
    assert "bfloat16\n" in said and "there already" not in said and used == "bfloat16"
    said, used = command()
    assert "3 were there already" in said and used == "bfloat16"
    # results of earlier versions do not say it: they are of float32
    settings = {"matching_method": "IMP", "precision": "float32", "weights": None}
    for suffix in (".png", ".npz"):
        (tmp_path / f"old{suffix}").touch()
    np.savez(tmp_path / "old.npz", settings=json.dumps({"matching_method": "IMP", "weights": None}), summary="{}")
    assert match_images.read_complete(tmp_path / "old", settings, []) == {}
    assert match_images.read_complete(tmp_path / "old", {**settings, "precision": "bfloat16"}, []) is None


def test_an_evaluation_is_not_resumed_in_another_precision(scene, tmp_path, capsys, monkeypatch):
    write_pair_list(tmp_path / "list.txt", [Pair(*NAMES[:2], K0=CAMERAS[0], K1=CAMERAS[1], T_0to1=np.eye(4))])
    command = ["--pairs", str(tmp_path / "list.txt"), "--image_dir", str(scene / "images"), "--matching_method", "NN",
               "--feature_type", "sift", "--max_keypoints", "60", "--save_path", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(eval_imp, "by_first_seed", lambda *_: 1 / 0)  # after all pairs are in the journal
        with pytest.raises(ZeroDivisionError):
            eval_imp.main(command)
    journal = tmp_path / "out" / eval_imp.JOURNAL
    assert run(eval_imp.main, [*command, "--precision", "bfloat16"]) == 2
    assert "was made with precision float32, now it is bfloat16" in capsys.readouterr().err
    journal.write_text(journal.read_text().replace('"precision": "float32", ', ""))  # of an earlier version
    assert run(eval_imp.main, command) == 0 and "resuming: 1 of 1 pairs" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"]["precision"] == "float32"


def test_the_first_pair_is_matched_once_before_times_are_taken(scene):
    """The first time, kernels are compiled and memory is taken."""
    order = []

    class Noted(MATCHERS["NN"]):
        def match(self, data):
            order.append(int(data["keypoints1"].shape[1]))
            return super().match(data)

    pair_set = ListPairSet([Pair(NAMES[0], name) for name in NAMES[:3]], scene / "images",
                           build_extractor("sift", max_keypoints=400))
    setting = PoseSetting()
    results, _ = evaluate(pair_set, {"NN": Method(Noted(MatcherSettings()))}, [setting])
    counts = [row.n_keypoints1 for row in results[setting]["NN"]]
    assert len(counts) == 3 and order == [counts[0], *counts]
