import pytest
import torch

from nets import build_matcher
from tools import export_weights
from tools.checkpoint import load_checkpoint, load_matcher, save_checkpoint
from tools.cli import run


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "latest.pth"
    save_checkpoint(path, {"model": build_matcher("imp", descriptor_dim=128, n_layers=3).state_dict(), "step": 7,
                           "optimizer": {}, "config": {"network": "imp", "feature": "sift"}, "scenes": ["0000"]})
    return path


def test_exported_weights_load_as_a_matcher(checkpoint, tmp_path, capsys):
    assert run(export_weights.main, [str(checkpoint), str(tmp_path / "weights" / "mine.pth")]) == 0
    assert "mine.pth" in capsys.readouterr().out
    content = load_checkpoint(tmp_path / "weights" / "mine.pth")
    assert {name: content[name] for name in content if name != "model"} == {
        "network": "imp", "feature": "sift", "step": 7, "scenes": ["0000"]}
    assert all(value.dtype == torch.float16 for value in content["model"].values())
    whole = load_matcher(checkpoint, "imp", 128).state_dict()
    for name, value in load_matcher(tmp_path / "weights" / "mine.pth", "imp", 128).state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-7)


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
