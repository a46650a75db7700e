"""How untrained matchers start."""
import json

import pytest
import torch

from tests.tiny_dump import make_tiny_dump
from tools.features import FEATURE_TYPES
from training import start
from training.config import DEFAULTS, load_train_config
from training.data import collate
from training.sources import training_samples
from training.start import branch_ends, similarities, warm_start
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


def test_a_warm_start_is_that_of_the_feature_type():
    starts = {}
    for name, feature in FEATURE_TYPES.items():
        matcher = build({**DEFAULTS, "feature": name, "layers": 1, "init": "warm"})
        gain = matcher.final_proj[0].weight[0, 0].item()
        assert gain ** 2 / feature.dim ** 0.5 == pytest.approx(feature.logit_scale, rel=1e-5)
        starts[name] = feature.logit_scale, matcher.bin_score.item()
    assert starts["sift"] == (39, 30) and starts["aliked"] == (22, 6)


def test_starts_are_compared(tmp_path, capsys):
    """By the loss that a network has which starts so, the least first; and by the similarities of the samples."""
    make_tiny_dump(tmp_path / "dump", feature="aliked")
    config = {"feature": "aliked", "base_path": str(tmp_path / "dump"), "max_keypoints": 90, "min_inliers": 20,
              "max_inliers": 30}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert start.main(["--config", str(tmp_path / "config.json"), "--samples", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("similarity, true matches: median 0.9")
    assert said[1].startswith("similarity, nearest of an unmatched keypoint: median 0.2")
    assert said[2].endswith("(now: 22, 6)")
    rows = [[float(value) for value in line.split()] for line in said[3:]]
    assert len(rows) == 10 and rows == sorted(rows, key=lambda row: row[2])

    samples = training_samples(load_train_config(tmp_path / "config.json", []))
    batch = collate([samples[k] for k in range(4)])
    batch |= {f"descriptors{v}": batch[f"descriptors{v}"].float() for v in "01"}
    matcher = build({**DEFAULTS, "feature": "aliked", "layers": 1})
    warm_start(matcher, *rows[0][:2])
    for end in branch_ends(matcher):  # what they add to the descriptors is of no use yet
        torch.nn.init.zeros_(end.weight)
    with torch.no_grad():
        assert matcher(batch)["loss"].item() == pytest.approx(rows[0][2], abs=0.01)


def test_similarities_are_those_of_the_labels():
    x0 = torch.eye(4)[None]
    x1 = torch.tensor([[[0, 1.0, 0, 0], [0.8, 0, 0.6, 0], [0, 0, 1.0, 0]]])
    batch = {"descriptors0": x0, "descriptors1": x1, "target0": torch.tensor([[1, 3, 3, -1]]),
             "mask1": torch.tensor([[True, True, False]])}
    of_matches, of_others = similarities(batch)
    assert of_matches.tolist() == pytest.approx([0.8]) and of_others.tolist() == pytest.approx([1.0, 0.6])


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
