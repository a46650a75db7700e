import pytest
import torch

from eval.image_matcher import choose_model
from nets import build_matcher
from tools import export_weights
from tools.checkpoint import load_checkpoint, load_matcher, save_checkpoint
from tools.cli import run


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "latest.pth"
    config = {"network": "eimp", "feature": "sift", "ac_fn": "gelu", "with_sinkhorn": False, "sinkhorn_iterations": 7,
              "n_min_tokens": 40, "base_path": "/home/me"}
    model = build_matcher("eimp", descriptor_dim=128, n_layers=3, ac_fn="gelu").state_dict()
    save_checkpoint(path, {"model": model, "step": 7, "optimizer": {}, "config": config, "scenes": ["0000"]})
    return path


def test_exported_weights_load_as_a_matcher(checkpoint, tmp_path, capsys):
    assert run(export_weights.main, [str(checkpoint), str(tmp_path / "weights" / "mine.pth")]) == 0
    assert "mine.pth" in capsys.readouterr().out
    content = load_checkpoint(tmp_path / "weights" / "mine.pth")
    config = {"network": "eimp", "ac_fn": "gelu", "with_sinkhorn": False, "sinkhorn_iterations": 7, "n_min_tokens": 40}
    assert {name: content[name] for name in content if name != "model"} == {
        "network": "eimp", "feature": "sift", "config": config, "step": 7, "scenes": ["0000"]}
    assert all(value.dtype == torch.float16 for value in content["model"].values())
    whole = load_matcher(checkpoint, "eimp", 128).state_dict()
    matcher = load_matcher(tmp_path / "weights" / "mine.pth", "eimp", 128)
    for name, value in matcher.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-7)
    assert (matcher.with_sinkhorn, matcher.sinkhorn_iterations, matcher.n_min_tokens) == (False, 7, 40)
    assert isinstance(matcher.gnn.layers[0].mlp[2], torch.nn.GELU)


def test_an_export_says_which_network_it_is(checkpoint, tmp_path):
    export_weights.export_weights(checkpoint, tmp_path / "mine.pth")
    assert choose_model(None, None, tmp_path / "mine.pth")[0] == "EIMP"
    content = load_checkpoint(tmp_path / "mine.pth")
    del content["config"]  # as exports were before
    save_checkpoint(tmp_path / "old.pth", content)
    assert choose_model(None, None, tmp_path / "old.pth")[0] == "EIMP"
    assert load_matcher(tmp_path / "old.pth", "eimp", 128).n_min_tokens == 256


def test_what_it_was_trained_on_can_be_said(checkpoint, tmp_path):
    assert run(export_weights.main, [str(checkpoint), str(tmp_path / "mine.pth"), "--scenes", "a", "b"]) == 0
    assert load_checkpoint(tmp_path / "mine.pth")["scenes"] == ["a", "b"]


def test_what_cannot_be_exported_is_said(checkpoint, tmp_path, capsys):
    content = load_checkpoint(checkpoint)
    content["model"]["bin_score"].fill_(1e6)
    save_checkpoint(tmp_path / "large.pth", content)
    save_checkpoint(tmp_path / "bare.pth", {"model": content["model"]})
    for name, words in (("large.pth", "bin_score"), ("bare.pth", "train.py"), ("none.pth", "no checkpoint")):
        assert run(export_weights.main, [str(tmp_path / name), str(tmp_path / "out.pth")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out.pth").exists()
