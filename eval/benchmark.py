"""How fast this machine matches and trains, beside the straightforward way in the same run.

    python3 -m eval.benchmark match     # one pair, one-shot: IMP, EIMP, eval.straightforward, and what operations allow
    python3 -m eval.benchmark train     # a training step, and Sinkhorn's share of it
    python3 -m eval.benchmark memory    # what a training step would take of a GPU, without one: an estimate

Times are medians of rounds, each of which runs everything once, so that what else the machine does hits all alike:
compare within a run.
"""
import argparse
import multiprocessing
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.peers import LightGlue, lightglue_is_installed
from eval.straightforward import Straightforward
from eval.summary import align
from nets import build_matcher
from nets.assignment import assign
from nets.layers import Attention
from nets.matchers import POOL_THRESHOLD, is_second
from tools.cli import InputError, run
from tools.distributed import choose_device
from tools.features import FEATURE_TYPES
from tools.files import write_json
from tools.precision import PRECISIONS, autocast, set_precision, tf32
from tools.processes import peak_bytes

PRODUCT_SIZE = 4096


def median_seconds(functions: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median time of each function {name: f()} over rounds that run each once, after one to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[1:])) for name, seconds in times.items()}


def operations(n: int, dim: int, n_layers: int) -> float:
    """Multiplications and additions of one-shot IMP for a pair of n keypoints a view.

    A shared attention matrix counts once. The encoder, norms, softmax and Sinkhorn are left out: they are few.
    """
    shared = sum(map(is_second, range(n_layers)))
    linear, product = 2 * dim * dim * 2 * n, 2 * n * n * dim * 2  # of both views: D x D layer; Q K^T or A V
    own, share = 10 * linear + 2 * product, 8 * linear + product
    return 2 * ((n_layers - shared) * own + shared * share) + linear + product / 2


def two_views(n: int, dim: int, batch: int, device, supervised: bool = False) -> dict:
    """Random keypoints, the second view being the first in another order, with noise; if supervised matching_mask."""
    rng = np.random.default_rng(0)
    order = rng.permutation(n)
    descriptors = rng.normal(size=(n, dim))
    data = {f"image_size{v}": np.array([700, 700]) for v in "01"}
    for v, rows in (("0", np.arange(n)), ("1", order)):
        noisy = descriptors[rows] + 0.3 * rng.normal(size=(n, dim))
        data[f"descriptors{v}"] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
        data[f"norm_keypoints{v}"] = rng.uniform(-0.7, 0.7, (n, 2))
        data[f"keypoints{v}"] = 350 + 490 * data[f"norm_keypoints{v}"]
        data[f"scores{v}"] = rng.uniform(0, 1, n)
    if supervised:
        target = np.argsort(order)
        target[: n // 2] = n  # half of the keypoints match, the others go to the dustbin
        mask = np.zeros((n + 1, n + 1))
        mask[np.arange(n), target] = 1
        mask[n, :n] = 1 - mask[:n, :n].sum(axis=0)
        data["matching_mask"] = mask
    return {key: torch.from_numpy(np.stack([value] * batch)).to(device, torch.float32) for key, value in data.items()}


def matchers(dim: int, n_layers: int, device) -> dict:
    """Untrained IMP and EIMP of the same weights."""
    torch.manual_seed(0)
    imp = build_matcher("imp", descriptor_dim=dim, n_layers=n_layers).to(device)
    eimp = build_matcher("eimp", descriptor_dim=dim, n_layers=n_layers).to(device)
    eimp.load_state_dict(imp.state_dict())
    return {"imp": imp, "eimp": eimp}


def print_table(rows: list[dict]) -> None:
    """Rows {column: number, text or None} as a table whose columns are those of the first."""
    def text(value):
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    print(*align([{name: text(value) for name, value in row.items()} for row in rows]), sep="\n")


# match

def match_half_kept(eimp, data: dict) -> tuple:
    """EIMP's iterations with what pooling needs at t = 3, where half of the keypoints are removed."""
    for state in eimp.iterate(data):
        if state.iteration == 3:
            state.attention_masses()
            half = [torch.arange(x.shape[1] // 2, device=x.device) for x in (state.x0, state.x1)]
            _ = state.assignment
            state.select(*half)
    return state.matches(0.2)


def _peak_bytes(device: torch.device) -> int:
    """Most memory that this process held so far, on the device or altogether; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes() or 0


def _extra_megabytes(n: int, dim: int, n_layers: int, device: torch.device) -> float:
    """Most memory that one-shot IMP of a pair takes beyond its weights and input, in a new process."""
    imp = matchers(dim, n_layers, device)["imp"].eval()
    with torch.inference_mode():
        for size in (n // 16, n):  # what the libraries take for themselves is there after the first
            data = two_views(size, dim, 1, device)
            before = _peak_bytes(device)
            imp(data)
    return (_peak_bytes(device) - before) / 1e6


def _variants(precision: str, args, device: torch.device) -> dict:
    """The networks to compare in a precision: {name: (network, width of its descriptors)}."""
    nets = matchers(args.dim, args.layers, device)
    for net in nets.values():
        set_precision(net.eval().gnn.layers, precision)
    variants = {"IMP": nets["imp"], "EIMP": nets["eimp"]}
    if args.compile:
        mode = "reduce-overhead" if device.type == "cuda" else None  # with CUDA graphs
        variants["IMP compiled"] = torch.compile(nets["imp"], dynamic=False, mode=mode)
    variants = {name: (net, args.dim) for name, net in variants.items()}
    if lightglue_is_installed():
        lightglue = LightGlue("aliked", device=device, precision=precision)
        variants["LightGlue"] = lightglue, FEATURE_TYPES["aliked"].dim
    return variants


def benchmark_match(args, device: torch.device) -> dict:
    nets = matchers(args.dim, args.layers, device)
    plain = {kind: Straightforward(kind, net.state_dict()) for kind, net in nets.items()}
    n_fewer = max(1, round(0.6 * args.layers))
    product = torch.rand(PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    for net in nets.values():
        net.eval()
    variants = {precision: _variants(precision, args, device) for precision in args.precision}
    against, rates = [], []
    for n in args.keypoints:
        data = two_views(n, args.dim, 1, device)
        functions = {
            "product": partial(torch.matmul, product, product),
            "imp": partial(nets["imp"], data),
            "fewer": partial(nets["imp"], data, n_layers=n_fewer),
            "plain imp": partial(plain["imp"].run, data, last_only=True),
            "eimp": partial(nets["eimp"], data),
            "plain eimp": partial(plain["eimp"].run, data, POOL_THRESHOLD, last_only=True),
            "half": partial(match_half_kept, nets["eimp"], data),
        }
        with torch.inference_mode():
            s = median_seconds(functions, args.rounds, device)
        rate = 2 * PRODUCT_SIZE ** 3 / s["product"]
        bound = operations(n, args.dim, args.layers) / rate
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            extra = pool.submit(_extra_megabytes, n, args.dim, args.layers, device).result()
        against.append({
            "keypoints": n, "product GFLOP/s": rate / 1e9, "bound s": bound, "IMP s": s["imp"],
            "IMP/bound": s["imp"] / bound, "straightforward IMP s": s["plain imp"], "x": s["plain imp"] / s["imp"],
            "EIMP s": s["eimp"], "straightforward EIMP s": s["plain eimp"], "x ": s["plain eimp"] / s["eimp"],
            f"IMP {n_fewer}/{args.layers}": s["fewer"] / s["imp"], "EIMP half kept/IMP": s["half"] / s["imp"],
            "extra MB": extra})
        for batch in args.batch:
            many = {dim: two_views(n, dim, batch, device) for dim in {args.dim, FEATURE_TYPES["aliked"].dim}}
            functions = {(precision, name): partial(net, many[dim]) for precision, nets_in in variants.items()
                         for name, (net, dim) in nets_in.items()}
            with torch.inference_mode():
                seconds = median_seconds(functions, args.rounds, device)
            for precision, names in variants.items():
                rates.append({"keypoints": n, "batch": batch, "precision": precision,
                              **{f"{name} pairs/s": batch / seconds[precision, name] for name in names}})
    print(f"one pair, D {args.dim}, {args.layers} iterations, one-shot; bound: operations with shared attention kept, "
          f"at the rate of a {PRODUCT_SIZE}^3 product")
    print_table(against)
    print("\npairs per second")
    print_table(rates)
    return {"pair": against, "rates": rates}


# train

def _loss(net, data: dict, precision: str, device: torch.device) -> torch.Tensor:
    with autocast(precision, device):
        return net(data)["loss"]


def _step(loss, optimizer, precision: str = "float32") -> None:
    with tf32(precision):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()


def _assignments_step(data: dict, n_layers: int) -> None:
    x0, x1 = (data[f"descriptors{v}"].clone().requires_grad_() for v in "01")
    bin_score = torch.tensor(1.0, device=x0.device)
    sum(assign(x0, x1, bin_score, True, 20).sum() for _ in range(n_layers)).backward()


def benchmark_train(args, device: torch.device) -> dict:
    rows = []
    for n in args.keypoints:
        data = two_views(n, args.dim, args.batch[0], device, supervised=True)
        functions = {"assignments": partial(_assignments_step, data, args.layers)}
        for kind, net in matchers(args.dim, args.layers, device).items():
            if args.compile:
                net.compile()
            optimizer = torch.optim.Adam(net.parameters(), fused=device.type == "cuda")
            for precision in args.precision:
                functions[kind, precision] = partial(_step, partial(_loss, net.train(), data, precision, device),
                                                     optimizer, precision)
            plain = Straightforward(kind, net.state_dict(), training=True)
            functions[kind, "straightforward"] = partial(_step, partial(plain.loss, data),
                                                         torch.optim.Adam(plain.parameters.values()))
        s = median_seconds(functions, args.rounds, device)
        for kind in ("imp", "eimp"):
            for precision in args.precision:
                step, plain = s[kind, precision], s[kind, "straightforward"]
                rows.append({"network": kind, "keypoints": n, "precision": precision, "step s": step,
                             "samples/s": args.batch[0] / step, "straightforward s": plain, "x": plain / step,
                             "assignments' share": s["assignments"] / step})
    print(f"a step: batch {args.batch[0]}, D {args.dim}, {args.layers} iterations; assignments: scores, Sinkhorn and "
          "the backward of both; straightforward: float32")
    print_table(rows)
    return {"step": rows}


# memory

class Cost(TorchDispatchMode):
    """What the operations in the block would take of a GPU.

    kernels: how many of them compute something, where each would be one launch, or more; traffic: bytes that these read
    and write; held: bytes of tensors there are, as far as the block has seen them; peak: the most there were, without
    what an operation needs inside.
    """

    def __init__(self):
        super().__init__()
        self.kernels = self.traffic = self.held = self.peak = 0
        self._storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (list(filter(torch.is_tensor, tree_leaves(values))) for values in ((args, kwargs), result))
        for tensor in inputs + outputs:
            self._hold(tensor.untyped_storage())
        old = {id(tensor.untyped_storage()) for tensor in inputs}
        made = any(id(tensor.untyped_storage()) not in old for tensor in outputs)
        if func._schema.is_mutable or (made and "empty" not in func.overloadpacket.__name__):
            self.kernels += 1
            self.traffic += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in inputs + outputs)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._storages:
            self._storages.add(id(storage))
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, id(storage), storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._storages.remove(key)
        self.held -= size


def step_cost(net, data: dict, precision: str) -> dict:
    """What a training step with Adam takes, its moments being there; net and data on fake tensors or real ones."""
    device = net.bin_score.device
    # attention matrices are stored on a CPU alone
    with mock.patch.object(Attention, "MAX_STORED", 0), Cost() as cost:
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        _step(partial(_loss, net, data, precision, device), optimizer)
        optimizer.zero_grad(set_to_none=True)
        before, cost.peak, cost.kernels, cost.traffic = cost.held, cost.held, 0, 0
        loss = _loss(net, data, precision, device)
        forward, kept = cost.kernels, cost.held - before
        loss.backward()
        row = {"kernels forward": forward, "backward": cost.kernels - forward, "traffic GB": cost.traffic / 1e9}
        optimizer.step()
    return {**row, "weights, moments, input GiB": before / 2 ** 30, "kept for the gradient GiB": kept / 2 ** 30,
            "peak GiB": cost.peak / 2 ** 30}


def benchmark_memory(args, device: torch.device) -> dict:
    rows = []
    for n in args.keypoints:
        for batch in args.batch:
            with FakeTensorMode(), Cost() as assignments:
                _assignments_step(two_views(n, args.dim, batch, device), args.layers)
            for kind in ("imp", "eimp"):
                for precision in args.precision:
                    with FakeTensorMode():
                        net = build_matcher(kind, descriptor_dim=args.dim, n_layers=args.layers).train()
                        data = two_views(n, args.dim, batch, device, supervised=True)
                        cost = step_cost(net, data, precision)
                    share = assignments.kernels / (cost["kernels forward"] + cost["backward"])
                    rows.append({"network": kind, "keypoints": n, "batch": batch, "precision": precision, **cost,
                                 "assignments' share of kernels": share})
    print(f"a training step, D {args.dim}, {args.layers} iterations, estimated on fake tensors, not measured; what "
          "CUDA, its libraries and its allocator take for themselves comes on top")
    print_table(rows)
    return {"step": rows}


BENCHMARKS = {"match": benchmark_match, "train": benchmark_train, "memory": benchmark_memory}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="part", required=True)
    for name, keypoints, batch in (("match", [512, 1024, 2048], 1), ("train", [512], 2), ("memory", [1024], 8)):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--json", metavar="FILE", help="also write the numbers there")
        command.add_argument("--keypoints", type=int, nargs="+", default=keypoints, help="of a view")
        command.add_argument("--dim", type=int, default=256, help="of descriptors")
        command.add_argument("--layers", type=int, default=15, help="iterations of the networks")
        command.add_argument("--batch", type=int, nargs="+", default=[batch])
        command.add_argument("--precision", nargs="+", choices=list(PRECISIONS),
                             default=["float32", "bfloat16"] if name == "memory" else ["float32"])
        if name == "memory":
            command.set_defaults(device="cpu")
            continue
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--compile", action="store_true", help="torch.compile; on a GPU match takes graphs")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    if args.part == "train" and len(args.batch) > 1:
        raise InputError("--batch: train takes one number")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    where = "fake tensors" if args.part == "memory" else where
    print(f"torch {torch.__version__}, {where}")
    numbers = BENCHMARKS[args.part](args, device)
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "machine": where, **numbers})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
