"""How untrained matchers start."""
import pytest
import torch

from nets import build_matcher
from training.config import DEFAULTS
from training.start import branch_ends, warm_start
from training.trainer import build


def test_warm_start_is_a_nearest_neighbour_matcher():
    rng = torch.Generator().manual_seed(0)
    descriptors0 = torch.nn.functional.normalize(torch.randn(1, 80, 128, generator=rng).abs(), dim=-1)
    noise = torch.randn(1, 80, 128, generator=rng) * 0.03
    descriptors1 = torch.nn.functional.normalize(descriptors0 + noise, dim=-1).flip(1)
    data = {"descriptors0": descriptors0, "descriptors1": descriptors1}
    for v in "01":
        data[f"norm_keypoints{v}"] = torch.rand(1, 80, 2, generator=rng) - 0.5
        data[f"scores{v}"] = torch.rand(1, 80, generator=rng)
    config = {**DEFAULTS, "layers": 9}
    right = {}
    for init in ("published", "warm"):
        matcher = build({**config, "init": init}).eval()
        with torch.no_grad():
            matches0 = matcher(data)["matches0"]
        right[init] = (matches0 == torch.arange(79, -1, -1)).float().mean().item()
    assert right["warm"] > 0.95
    assert right["published"] < 0.5


def test_warm_start_gain():
    for dim in (128, 256):
        matcher = build_matcher("imp", descriptor_dim=dim, n_layers=1)
        warm_start(matcher)
        gain = matcher.final_proj[0].weight[0, 0].item()
        assert gain ** 2 / dim ** 0.5 == pytest.approx(39, rel=1e-5)
    assert matcher.bin_score.item() == 30


def test_published_start():
    matcher = build({**DEFAULTS, "layers": 4, "init": "published"})
    state = matcher.state_dict()
    merges = [name for name in state if ".attn.merge." in name]
    assert len(merges) == 12
    for name in merges:
        for i in range(3):
            assert torch.equal(state[name.replace("merge", f"proj.{i}")], state[name])
    assert not torch.equal(state["gnn.layers.0.attn.merge.weight"], state["gnn.layers.1.attn.merge.weight"])
    assert all((end.bias == 0).all() and (end.weight != 0).any() for end in branch_ends(matcher))
