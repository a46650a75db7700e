"""Write a matcher as an ONNX file: one-shot matching of one pair, with any number of keypoints.

    python3 -m tools.export_onnx weights/imp_sift_open.pth imp_sift.onnx
    python3 -m tools.export_onnx weights/imp_sift_open.pth imp_colmap.onnx --for colmap

docs/pipelines.md has the inputs and outputs. Needs the extra `onnx`.
"""
import argparse
import contextlib
import importlib.util
import logging
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets.matchers import MATCHERS, Matcher
from tools.checkpoint import describe_weights, load_checkpoint, load_matcher
from tools.cli import InputError, number, run
from tools.features import FEATURE_TYPES
from tools.files import atomic_path, file_hash

DATA_NAMES = [name + view for view in "01" for name in ("keypoints", "descriptors", "scores", "image_size")]
COLMAP_NAMES = ["kpts0", "kpts1", "desc0", "desc1", "image_size0", "image_size1"]


class OneShot(nn.Module):
    """A matcher with the tensors of `nets.matchers.Matcher.forward` as arguments, those of view 0 first."""

    inputs = DATA_NAMES
    outputs = ("matches0", "matching_scores0", "matches1", "matching_scores1")

    def __init__(self, matcher: Matcher):
        super().__init__()
        self.matcher = matcher

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.matcher(dict(zip(DATA_NAMES, tensors)))
        return tuple(out[name] for name in self.outputs)


class ForColmap(OneShot):
    """A matcher of SIFT as COLMAP calls LightGlue; what is assumed of COLMAP is in docs/pipelines.md.

    Keypoints (1, N, C) start with x, y, where the centre of the top-left pixel is (0.5, 0.5); descriptors (1, N, 128)
    are RootSIFT of any length. Returns matches (M, 2) int64 and their scores (M,).
    """

    inputs = COLMAP_NAMES
    outputs = ("matches0", "mscores0")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        data = {}
        for v in (0, 1):
            keypoints, descriptors, image_size = tensors[v::2]
            data |= {f"keypoints{v}": keypoints[..., :2] - 0.5, f"descriptors{v}": F.normalize(descriptors, dim=-1),
                     f"scores{v}": torch.zeros_like(descriptors[..., 0]), f"image_size{v}": image_size}
        out = self.matcher(data)
        matches0, scores0 = out["matches0"][0], out["matching_scores0"][0]
        rows = (matches0 >= 0).nonzero()[:, 0]
        return torch.stack([rows, matches0[rows]], dim=1), scores0[rows]


def example(module: OneShot, dim: int, n0: int = 20, n1: int = 16, seed: int = 0) -> tuple[Tensor, ...]:
    """Random features of two images as `module` takes them: the first keypoints of both match, in order."""
    generator = torch.Generator().manual_seed(seed)
    n = max(n0, n1)
    keypoints = torch.rand(1, n, 2, generator=generator) * torch.tensor([600.0, 440.0])
    descriptors = F.normalize(torch.randn(1, n, dim, generator=generator), dim=-1)
    scores = torch.rand(1, n, generator=generator)
    size = torch.tensor([[640.0, 480.0]])
    data = {}
    for v, m in (("0", n0), ("1", n1)):
        moved = keypoints[:, :m] + 20 * float(v)
        data |= {f"keypoints{v}": moved, f"descriptors{v}": descriptors[:, :m], f"scores{v}": scores[:, :m],
                 f"kpts{v}": F.pad(moved, (0, 2)), f"desc{v}": 512 * descriptors[:, :m], f"image_size{v}": size}
    return tuple(data[name] for name in module.inputs)


def export_onnx(module: OneShot, dim: int, path, metadata: dict | None = None) -> None:
    """Write a module for features of `dim` channels, atomically; metadata: what the file says of itself, as text."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise InputError("onnx is not installed: pip install '.[onnx]'")
    shapes = tuple({} if name.startswith("image_size") else {1: torch.export.Dim(f"n{name[-1]}", min=2, max=2 ** 20)}
                   for name in module.inputs)
    if "kpts0" in module.inputs:
        for shape in shapes[:2]:
            shape[2] = torch.export.Dim("columns", min=2, max=16)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision, which nothing here needs, is not installed
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        program = torch.onnx.export(module.eval(), example(module, dim), dynamo=True, dynamic_shapes=(shapes,),
                                    input_names=list(module.inputs), output_names=list(module.outputs), verbose=False,
                                    optimize=False)  # runtimes do that, in a tenth of the time
    logger.setLevel(level)
    model = program.model
    model.metadata_props.update(metadata or {})
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # where in the source it comes from, with paths of this machine
    with atomic_path(path) as temporary:
        program.save(temporary)


def _version() -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version("imp-matching")
    return "unknown"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="tools.export_onnx", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a checkpoint of GM, IMP or EIMP")
    parser.add_argument("path", help="file to write, .onnx")
    parser.add_argument("--for", dest="program", choices=["colmap"],
                        help="write the inputs and outputs that this program's LightGlue has; SIFT only")
    parser.add_argument("--network", choices=sorted(MATCHERS),
                        help="default: as the weights say; IMP and EIMP have the same parameters")
    parser.add_argument("--match_threshold", type=number(0, 1), default=0.2, help="least score of a match (0.2)")
    args = parser.parse_args(argv)

    content = load_checkpoint(args.weights)
    described = describe_weights(content["model"])
    config = content.get("config")
    trained = (config if isinstance(config, dict) else content).get("network")
    network = args.network or (trained if trained in MATCHERS else described.get("network"))
    dim = described.get("descriptor_dim", 128)
    feature = str(content.get("feature", next((name for name, kind in FEATURE_TYPES.items() if kind.dim == dim), "")))
    if args.program and dim != 128:
        raise InputError(f"{args.weights} is for descriptors of {dim} channels: --for {args.program} takes weights for "
                         "SIFT, of 128")
    matcher = load_matcher(args.weights, network, dim, match_threshold=args.match_threshold)
    module = ForColmap(matcher) if args.program else OneShot(matcher)
    export_onnx(module, dim, args.path, {
        "network": network, "feature_type": feature, "descriptor_dim": str(dim), "n_layers": str(matcher.n_layers),
        "match_threshold": str(args.match_threshold), "version": _version(), "for": args.program or "",
        "weights": f"{Path(args.weights).name} {file_hash(args.weights)}"})
    print(f"{args.path}: {Path(args.path).stat().st_size / 1e6:.1f} MB, {', '.join(module.inputs)} -> "
          f"{', '.join(module.outputs)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
