"""How untrained matchers start."""
import pytest
import torch

from nets import build_matcher
from nets.layers import Views
from tests.tiny_dump import make_tiny_dump
from tools.cli import InputError
from training import start
from training.config import DEFAULTS, load_train_config
from training.data import Choice, DumpSource, Samples
from training.start import _write, branch_ends, guided_start, position_code, warm_start
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
        gain = matcher.final_proj[0].weight[0, 0, 0].item()
        assert gain ** 2 / dim ** 0.5 == pytest.approx(39, rel=1e-5)
    assert matcher.bin_score.item() == 30


def test_position_code():
    """Codes have length 1, and agree the less, the further apart two keypoints are."""
    places = torch.tensor([[0.1, -0.2], [0.15, -0.2], [0.2, -0.2], [0.4, 0.3]])
    agreement = position_code(places) @ position_code(places[0])
    assert agreement[0].item() == pytest.approx(1, abs=1e-6)
    assert (agreement.diff() < -0.01).all()


def test_a_branch_can_write_a_linear_function():
    torch.manual_seed(0)
    layer = build_matcher("imp", descriptor_dim=32, n_layers=1).gnn.layers[0]
    rows, out = torch.randn(5, 64), torch.randn(32, 5)
    with torch.no_grad():
        layer.mlp[-1].weight.zero_()
        layer.mlp[-1].bias.zero_()
        _write(layer.mlp, [(rows[:2], out[:, :2]), (rows[2:], out[:, 2:])])
        x = torch.randn(1, 50, 64)
        written = layer.mlp(x, Views([50], [None]))[0]
    z = x[0] @ rows.T
    expected = (z - z.mean(dim=0)) / z.std(dim=0, unbiased=False) @ out.T
    torch.testing.assert_close(written, expected, rtol=1e-3, atol=1e-4)


def look_alikes(seed: int):
    """Two views of 240 keypoints, of which each looks like one other, the second turned by 150 degrees. -> data, and
    the true match of each in view 0."""
    rng = torch.Generator().manual_seed(seed)
    descriptors = (torch.rand(120, 128, generator=rng) ** 4).repeat(2, 1)
    places = torch.rand(240, 2, generator=rng) - 0.5
    turn = torch.tensor([[-0.87, -0.5], [0.5, -0.87]])
    order = torch.randperm(240, generator=rng)
    data = {}
    for v, x, rows in (("0", places, torch.arange(240)), ("1", places @ turn, order)):
        noisy = descriptors + 0.2 * torch.rand(240, 128, generator=rng)
        data |= {f"descriptors{v}": torch.nn.functional.normalize(noisy, dim=-1)[rows][None],
                 f"norm_keypoints{v}": x[rows][None], f"scores{v}": torch.full((1, 240), 0.03)}
    return data, order.argsort()


@pytest.mark.parametrize("network", ["gm", "eimp"])
def test_a_guided_start_tells_look_alikes_apart_by_their_neighbours(network, monkeypatch):
    monkeypatch.setattr(start, "FIT_STEPS", 200)
    data, true0 = look_alikes(1)
    right = {}
    for init in ("warm", "guided"):
        torch.manual_seed(0)
        matcher = build_matcher(network, descriptor_dim=128, n_layers=9)
        if init == "warm":
            warm_start(matcher)
        else:
            guided_start(matcher, look_alikes(2)[0]["descriptors0"][0], seed=0)
        matches0, _ = matcher.eval().match_all_iterations(data, threshold=0.0)
        right[init] = [(matches[0] == true0).float().mean().item() for matches in matches0]
    assert right["guided"][0] < right["warm"][-1] + 0.1
    assert right["guided"][-1] > right["warm"][-1] + 0.15


def test_codes_of_position_are_no_part_of_scores(monkeypatch):
    monkeypatch.setattr(start, "FIT_STEPS", 5)
    torch.manual_seed(0)
    matcher = build_matcher("imp", descriptor_dim=128, n_layers=1)
    data, _ = look_alikes(1)
    guided_start(matcher, data["descriptors0"][0], seed=0)
    code = matcher.eval().kenc(data["norm_keypoints0"], data["scores0"], None)
    assert code.norm(dim=-1).mean() > 0.1
    assert matcher.final_proj[0](code).abs().max() < 1e-3
    assert matcher.final_proj[0](data["descriptors0"]).norm(dim=-1).mean() > 10


def test_a_run_starts_guided_by_what_it_trains_on(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "FIT_STEPS", 2)
    make_tiny_dump(tmp_path / "dump")
    samples = Samples([DumpSource(tmp_path / "dump")], Choice(64, 8, 24))
    config = {**DEFAULTS, "init": "guided", "layers": 2}
    matchers = [build(config, samples) for _ in range(2)]
    for one, other in zip(*(matcher.parameters() for matcher in matchers), strict=True):
        assert torch.equal(one, other)
    blind = matchers[0].final_proj[0].matrix
    descriptors = torch.cat([torch.from_numpy(samples[k]["descriptors0"]).float() for k in range(16)])
    weakest = torch.linalg.eigh(descriptors.T @ descriptors).eigenvectors[:, :48]  # two codes of 24
    assert (blind @ weakest).abs().max() < 1e-2
    assert torch.linalg.matrix_rank(blind, rtol=1e-3) == 128 - 48


def test_a_guided_start_is_for_instance_norm_and_relu(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"init": "guided"}')
    with pytest.raises(InputError, match="init guided is for norm_fn in and ac_fn relu, not bn and relu"):
        load_train_config(path, ["--norm_fn", "bn"])


def test_published_start():
    matcher = build({**DEFAULTS, "layers": 4, "init": "published"})
    own = [layer.attn for layer in matcher.gnn.layers if hasattr(layer, "attn")]
    assert len(own) == 6
    for attn in own:
        for proj in attn.proj:
            assert torch.equal(proj.weight, attn.merge.weight) and torch.equal(proj.bias, attn.merge.bias)
    assert not torch.equal(own[0].merge.weight, own[1].merge.weight)
    assert all((end.bias == 0).all() and (end.weight != 0).any() for end in branch_ends(matcher))
