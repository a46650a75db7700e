"""The networks against the golden vectors of the published definition (tests/golden)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill_, matching_mask, two_views

from nets import SuperPoint, build_matcher
from nets.pooling import keep_indices

GOLDEN = Path(__file__).parent / "golden"
MATCHERS = sorted(path.stem for path in GOLDEN.glob("*_l*.npz"))
TRAINED = ["eimp_d64_l7", "gm_d64_l7", "imp_bn_dualsoftmax_d64_l7", "imp_d64_l7"]
POOLED = ["eimp_d128_l9_uneven", "eimp_d256_l15", "eimp_d64_l7"]


def load(name):
    """The golden arrays, the matcher they are for, and its input."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    config = json.loads(str(golden["config"]))
    matcher = build_matcher(config["method"], descriptor_dim=config["D"], n_layers=config["L"],
                            norm_fn=config["norm_fn"], with_sinkhorn=config["with_sinkhorn"],
                            match_threshold=config["match_threshold"], n_min_tokens=config["n_min_tokens"])
    fill_(matcher, config["salt"], config["gain"])
    views = two_views(config["n0"], config["n1"], config["D"], config["batch"], seed=config["seed"])
    return golden, matcher, {key: torch.from_numpy(value) for key, value in views.items()}


def test_all_files_are_here():
    assert len(MATCHERS) == 9
    for name in MATCHERS:
        with np.load(GOLDEN / f"{name}.npz") as file:
            assert ("train_loss" in file) == (name in TRAINED)
            assert any(key.startswith("keep0") for key in file) == ("indices0_pool0.6" in file) == (name in POOLED)


@pytest.mark.parametrize("name", MATCHERS)
def test_matches_at_every_iteration(name):
    golden, matcher, data = load(name)
    for suffix, pool_threshold in (("", 0.1), ("_pool0.6", 0.6)):
        if f"indices0{suffix}" not in golden:
            continue
        indices, scores = matcher.eval().match_all_iterations(data, threshold=0.2, pool_threshold=pool_threshold)
        stable = golden[f"stable0{suffix}"]
        assert indices.shape == stable.shape and stable.mean() > 0.99
        np.testing.assert_array_equal(indices.numpy()[stable], golden[f"indices0{suffix}"][stable])
        np.testing.assert_allclose(scores.numpy()[stable], golden[f"mscores0{suffix}"][stable], rtol=0, atol=1e-4)
        if not suffix:
            out = matcher(data)
            np.testing.assert_array_equal(out["matches0"], indices[-1])
            np.testing.assert_array_equal(out["matching_scores0"].detach(), scores[-1])


@pytest.mark.parametrize("name", MATCHERS)
def test_what_is_computed_on_the_way(name):
    golden, matcher, data = load(name)
    matcher.eval()
    compared = set()

    def check(key, value, rtol=0.0):
        if key in golden:
            np.testing.assert_allclose(value.numpy(), golden[key], rtol=rtol, atol=0 if rtol else 1e-4, err_msg=key)
            compared.add(key)

    with torch.no_grad():
        check("encoded0", (matcher.encode(data).x0 - data["descriptors0"])[:, :8])
        for state in matcher.iterate(data):
            check(f"score_it{state.iteration}", state.assignment[:, :32, :32])
            check(f"score_sum_it{state.iteration}", state.assignment.double().sum(), rtol=1e-5)
        check("desc0_last", state.x0[:, :16])
        check("desc1_last", state.x1[:, :16])
    assert compared == {key for key in golden if key.startswith(("encoded", "score_", "desc"))}


@pytest.mark.parametrize("name", POOLED)
def test_kept_keypoints(name):
    golden, matcher, data = load(name)
    n_compared = 0
    with torch.no_grad():
        for state in matcher.eval().iterate(data):
            for threshold in ("0.1", "0.4", "0.7"):
                self0, cross0, self1, cross1 = (mass[0] for mass in state.attention_masses())
                assignment = state.assignment[0]
                for view, p, own, cross in ((0, assignment, self0, cross0), (1, assignment.T, self1, cross1)):
                    expected = golden.get(f"keep{view}_it{state.iteration}_th{threshold}")
                    if expected is not None:
                        kept = keep_indices(p, own, cross, float(threshold), matcher.n_min_tokens)
                        np.testing.assert_array_equal(kept, expected)
                        n_compared += 1
    assert n_compared == sum(key.startswith("keep") for key in golden) == 12


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_gradients(name):
    golden, matcher, data = load(name)
    n1 = data["descriptors1"].shape[1]
    data["matching_mask"] = torch.from_numpy(matching_mask(data["gt0"].numpy(), n1))
    out = matcher.train()(data)
    out["loss"].backward()
    names = [key.removeprefix("train_") for key in golden if key.startswith("train_")]
    assert len(names) == 7
    for key in names:
        np.testing.assert_allclose(out[key].detach().numpy(), golden[f"train_{key}"], rtol=1e-4, err_msg=key)
    norms = {key: parameter.grad.norm().item() for key, parameter in matcher.named_parameters()}
    assert set(norms) == set(golden["grad_names"])
    for key, expected in zip(golden["grad_names"], golden["grad_norms"]):
        if expected > 1e-5:
            assert norms[key] == pytest.approx(expected, rel=1e-3), key
        else:
            assert norms[key] < 1e-4, key


def test_superpoint():
    with np.load(GOLDEN / "superpoint_160x200.npz") as file:
        golden = dict(file)
    config = json.loads(str(golden["config"]))
    network = fill_(SuperPoint(nms_radius=config["nms_radius"], keypoint_threshold=config["keypoint_threshold"],
                               max_keypoints=config["max_keypoints"], remove_borders=config["remove_borders"]),
                    config["salt"]).eval()
    with torch.no_grad():
        out = network(torch.from_numpy(golden["exact_image"])[None, None])
    np.testing.assert_array_equal(out["keypoints"][0], golden["keypoints"])
    np.testing.assert_allclose(out["scores"][0], golden["scores"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(out["descriptors"][0][:64], golden["descriptors"], rtol=0, atol=1e-4)
