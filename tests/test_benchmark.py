"""That eval.benchmark measures what it says; how long things take is not tested."""
import contextlib
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from eval import benchmark
from eval.straightforward import Straightforward
from nets import build_matcher
from nets.layers import Attention
from tools.cli import run
from tools.files import read_json


@pytest.mark.parametrize("n, dim, n_layers", [(512, 64, 15), (128, 32, 4), (256, 64, 9)])
def test_operations_are_those_of_the_straightforward_network(n, dim, n_layers):
    net = benchmark.matchers(dim, n_layers, "cpu")["imp"]
    data = benchmark.two_views(n, dim, 1, "cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Straightforward("imp", net.state_dict(), with_sinkhorn=False).run(data, last_only=True)
    encoder = 2 * 2 * n * sum(a * b for a, b in zip((3, 32, 64, 128, 256), (32, 64, 128, 256, dim)))
    assert counter.get_total_flops() - encoder == pytest.approx(benchmark.operations(n, dim, n_layers), rel=1e-6)


def test_what_the_second_view_is_asked_to_match():
    data = benchmark.two_views(64, 32, 2, "cpu", supervised=True)
    mask, similarity = data["matching_mask"][0, :-1, :-1] > 0, data["descriptors0"][0] @ data["descriptors1"][0].T
    assert mask.sum() == 32
    assert torch.equal(similarity.argmax(dim=1)[mask.any(dim=1)], mask.float().argmax(dim=1)[mask.any(dim=1)])


def test_half_of_the_keypoints_are_kept():
    net = benchmark.matchers(32, 6, "cpu")["eimp"].eval()
    data = benchmark.two_views(64, 32, 1, "cpu")
    with torch.inference_mode():
        matches0 = benchmark.match_half_kept(net, data)[0]
    assert matches0.shape == (1, 64) and (matches0[0, 32:] == -1).all()


def test_median_is_of_rounds_in_turn():
    order = []
    seconds = benchmark.median_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2,
                                       torch.device("cpu"))
    assert order == ["a", "b"] * 3 and set(seconds) == {"a", "b"}


def test_cost_of_operations_by_hand():
    x = torch.zeros(1000)
    with benchmark.Cost() as cost:
        y = 2 * x  # reads and writes 4000 bytes each
        row = y[:500]
        y.add_(1)
        kept = torch.empty(10)
        z = torch.cat([y, y])  # reads 8000 bytes, writes 8000
        del y, row, z
    assert (cost.kernels, cost.traffic) == (3, 32000)
    assert (cost.held, cost.peak) == (4000 + kept.nbytes, 16000 + kept.nbytes)


@pytest.mark.parametrize("kind, precision", [("imp", "float32"), ("eimp", "bfloat16")])
def test_a_step_costs_on_fake_tensors_what_it_costs_on_real_ones(kind, precision, monkeypatch):
    costs = []
    if kind == "imp":
        monkeypatch.setattr(Attention, "_matrix", None)  # a GPU stores none
    for mode in (contextlib.nullcontext, FakeTensorMode):
        with mode():
            net = build_matcher(kind, descriptor_dim=32, n_layers=5, n_min_tokens=16).train()
            costs.append(benchmark.step_cost(net, benchmark.two_views(48, 32, 2, "cpu", supervised=True), precision))
    assert costs[0] == costs[1]
    names = ("weights, moments, input", "kept for the gradient", "peak")
    before, kept, peak = (costs[0][f"{name} GiB"] for name in names)
    assert before * 2 ** 30 > 3 * sum(parameter.nbytes for parameter in net.parameters())
    assert peak >= before + kept > before


@pytest.mark.parametrize("with_sinkhorn", [True, False])
def test_padding_keeps_no_matrix_for_the_gradient(with_sinkhorn):
    kept = []
    for masks in ({}, {f"mask{v}": torch.arange(300).expand(2, 300) < 290 for v in "01"}):
        net = build_matcher("imp", descriptor_dim=16, n_layers=2, with_sinkhorn=with_sinkhorn).train()
        data = benchmark.two_views(300, 16, 2, "cpu", supervised=True) | masks
        kept.append(benchmark.step_cost(net, data, "float32")["kept for the gradient GiB"] * 2 ** 30)
    assert kept[1] - kept[0] < 301 ** 2  # bytes; two samples' assignment has eight times as many


TINY = {
    "match": ["--device", "cpu", "--keypoints", "32", "48", "--dim", "32", "--layers", "5", "--rounds", "1", "--batch",
              "1", "2", "--precision", "float32", "bfloat16"],
    "train": ["--device", "cpu", "--keypoints", "32", "--dim", "32", "--layers", "5", "--rounds", "1", "--precision",
              "float32", "bfloat16"],
    "memory": ["--keypoints", "32", "--dim", "32", "--layers", "3", "--batch", "2", "--precision", "bfloat16"],
}


@pytest.mark.parametrize("part", list(TINY))
def test_command_prints_its_table(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRODUCT_SIZE", 64)
    assert run(benchmark.main, [part, "--json", str(tmp_path / "numbers.json"), *TINY[part]]) == 0
    numbers = read_json(tmp_path / "numbers.json")
    printed = capsys.readouterr().out
    rows = {"match": ("rates", 8), "train": ("step", 4), "memory": ("step", 2)}
    name, count = rows[part]
    assert len(numbers[name]) == count
    for row in numbers[name]:
        for column, value in row.items():
            assert column.strip() in printed
            assert isinstance(value, str) or value > 0, row
    assert json.dumps(numbers["torch"]).strip('"') in printed


def test_training_takes_one_batch_size(capsys):
    assert run(benchmark.main, ["train", "--batch", "1", "2"]) == 2
    assert "--batch" in capsys.readouterr().err
