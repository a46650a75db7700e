"""Checkpoints: written whole, loaded without running code, and clear about what does not fit.

A checkpoint file is a dict whose `model` entry is the state dict, like the published ones; ours add `config`, `step`
and what else is needed to resume.
"""
import functools
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from imp_matching import shipped
from nets import SuperPoint, build_matcher
from tools.cli import InputError
from tools.features import FEATURE_TYPES
from tools.files import atomic_path
from tools.safe_pickle import STAND_INS

WEIGHTS = shipped("weights")
SUPERPOINT = "superpoint_v1.pth"
DEMO = Path("runs/demo/imp/latest.pth")  # what `make demo` trains
# what `config` tells of a network, as weights do not show it, and which values can be
TOLD = {"ac_fn": lambda value: str(value) in ("relu", "gelu", "lrelu"),
        "with_sinkhorn": lambda value: type(value) is bool,
        "sinkhorn_iterations": lambda value: type(value) is int and 0 <= value <= 1000,
        "n_min_tokens": lambda value: type(value) is int and 0 <= value < 2 ** 31}
MAX_LAYERS = 200


def save_checkpoint(path, content: dict) -> None:
    """Write a checkpoint, atomically."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path) -> dict:
    """Read a checkpoint file -> dict whose entry `model` is a state dict.

    `state_dict`, `model_state_dict` and a bare state dict are taken as `model`, and a prefix that all its keys share is
    taken off. Numbers and arrays of NumPy beside it are read. InputError if the file is missing, damaged, no
    checkpoint, or would run code.
    """
    path = _renamed(Path(path))
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch's are not compressed
                if sum(member.file_size for member in archive.infolist()) > 4 * path.stat().st_size:
                    raise ValueError("it would take far more memory than its file")
        with (warnings.catch_warnings(action="ignore"),
              torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()])):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged file makes of torch's readers
        # torch's own words recommend to load it all the same
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            raise InputError(f"{path} was left unread: it holds {foreign[1]}, which could run code when loaded; get a "
                             "file of weights alone") from None
        raise InputError(f"{path} is not a readable checkpoint: it is damaged, incomplete or something else; get it "
                         "again") from None
    content = content if isinstance(content, dict) else {}
    if content and all(torch.is_tensor(value) for value in content.values()):
        content = {"model": content}
    entry = next((name for name in ("model", "state_dict", "model_state_dict", "extractor")
                  if isinstance(content.get(name), dict)), None)
    if entry is None:
        raise InputError(f"{path} is not a checkpoint: it has no entry 'model'")
    state = content.pop(entry)
    for key, value in state.items():
        if not isinstance(key, str) or not torch.is_tensor(value) or value.layout != torch.strided:
            raise InputError(f"{path} is not a checkpoint: {str(key)[:100]} in its entry '{entry}' is not a tensor")
    # wrappers put their own name before all keys: DistributedDataParallel "module", torch.compile "_orig_mod"
    while len(first := {key.partition(".")[0] for key in state}) == 1 and not first & state.keys():
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return {**content, "model": state}


@functools.cache  # said once
def _renamed(path: Path) -> Path:
    """Earlier, our weights came a second time, for EIMP."""
    same = path.with_name("imp_sift_open.pth")
    if path.name != "eimp_sift_open.pth" or path.is_file() or not same.is_file():
        return path
    print(f"{path}: IMP and EIMP have the same parameters, taking {same}", file=sys.stderr)
    return same


def describe_weights(state: dict) -> dict:
    """What a state dict says of its network: network, and for a matcher descriptor_dim, n_layers, norm_fn.

    IMP and EIMP have the same parameters; both are called imp. {} if it is neither a matcher nor SuperPoint.
    """
    projections = [state[key] for key in state if re.fullmatch(r"final_proj\.\d+\.weight", key)]
    n_layers = len(projections)
    if not n_layers:
        return {"network": "superpoint"} if "convPa.weight" in state else {}
    shares = any(re.fullmatch(r"gnn\.layers\.\d+\.proj\.weight", key) for key in state)
    norm_fn = "bn" if "gnn.layers.0.mlp.1.weight" in state else "in"
    if "gnn.layers.0.mlp.2.weight" in state:
        norm_fn = None
    # up to three iterations, nothing is shared and the three networks are one
    network = "imp" if shares or n_layers <= 3 else "gm"
    return {"network": network, "descriptor_dim": (*projections[0].shape, 0)[0], "n_layers": n_layers,
            "norm_fn": norm_fn}


def load_weights(module: torch.nn.Module, state: dict, path) -> None:
    """Load a state dict with strict keys and shapes; InputError names the first wrong one and what the file is for."""
    own = module.state_dict()
    problems = [f"{key} has shape {tuple(state[key].shape)}, the network wants {tuple(value.shape)}"
                for key, value in own.items() if key in state and value.shape != state[key].shape]
    problems += [f"it lacks {key}" for key in own if key not in state]
    problems += [f"it has {key}, which the network does not have" for key in state if key not in own]
    if problems:
        description = ", ".join(f"{name} {value}" for name, value in describe_weights(state).items())
        raise InputError(f"{path} does not fit this network: {problems[0]}"
                         + (f" (the file is for {description})" if description else ""))
    module.load_state_dict(state)


def check_finite(module: torch.nn.Module, path) -> None:
    """InputError if a weight is not a finite number."""
    for key, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path} is of no use: {key} has values that are not finite; its training diverged, or "
                             "the file is damaged")


def load_matcher(path, network: str, descriptor_dim: int, device="cpu", **options):
    """Build the matcher that a checkpoint holds, in evaluation mode on `device`.

    network: gm, imp or eimp; layers and norm come from the file, what it does not say (activation) from the `config`
    it may carry; options override both (those of `nets.build_matcher`).
    """
    content = load_checkpoint(path)
    found = describe_weights(content["model"])
    if "n_layers" not in found:
        held = found.get("network") or f"its first key is {next(iter(content['model']), None)}"
        raise InputError(f"{path} holds no matcher, as it has no final_proj weights ({held})")
    if found["n_layers"] > MAX_LAYERS:
        raise InputError(f"{path} holds {found['n_layers']} iterations, more than {MAX_LAYERS}")
    if found["descriptor_dim"] != descriptor_dim:
        raise InputError(f"{path} is for descriptors of {found['descriptor_dim']} channels, not {descriptor_dim}: "
                         "check --feature_type")
    if (network == "gm") != (found["network"] == "gm") and found["n_layers"] > 3:
        raise InputError(f"{path} holds the network {found['network']}, not {network}")
    config = content.get("config")
    settings = {"n_layers": found["n_layers"], "norm_fn": found["norm_fn"], "descriptor_dim": descriptor_dim}
    for key in TOLD.keys() & (config if isinstance(config, dict) else ()):
        if not TOLD[key](config[key]):
            raise InputError(f"{path} is damaged: its config says {key} {str(config[key])[:50]}")
        settings[key] = config[key]
    matcher = build_matcher(network, **{**settings, **options})
    load_weights(matcher, content["model"], path)
    check_finite(matcher, path)
    return matcher.float().eval().to(device)


def find_weights(name: str) -> Path:
    """Where a file of weights lies: below $IMP_WEIGHTS, below ./weights if we are installed, or with what ships."""
    # in site-packages, where nobody puts a file, WEIGHTS is tools/weights
    folders = [os.environ.get("IMP_WEIGHTS"), "weights" if WEIGHTS.parent.name == "tools" else None]
    return next((Path(folder, name) for folder in folders if folder and Path(folder, name).is_file()), WEIGHTS / name)


def load_superpoint(path=None, device="cpu", **options) -> SuperPoint:
    """SuperPoint in evaluation mode on `device`, with the weights at `path` (None: weights/superpoint_v1.pth).

    Options as those of `nets.SuperPoint`. InputError says what to put where if there are no weights.
    """
    path = find_weights(SUPERPOINT) if path is None else Path(path)
    if not path.is_file():
        raise InputError(f"no SuperPoint weights at {path}: put {SUPERPOINT}, which its authors publish, at "
                         f"weights/{SUPERPOINT} (see weights/README.md), or use --feature_type sift")
    network = SuperPoint(**options)
    load_weights(network, load_checkpoint(path)["model"], path)
    check_finite(network, path)
    return network.eval().to(device)


def default_weights(method: str, feature_type: str, dataset: str | None = None) -> Path:
    """The weights to take for a method (IMP, EIMP, IMP_geo, EIMP_geo, GM): published ones, or else our own.

    dataset: yfcc or scannet; None, or another, where the published files are for one of these: there is no default.
    Our own, `imp_{feature}_open.pth` for IMP and EIMP, whose parameters are the same, are taken with a line that says
    so. InputError says what to put where.
    """
    name = f"{method.lower()}_{feature_type}"
    if method.lower().endswith("_geo") and feature_type == "spp":
        if dataset not in ("yfcc", "scannet"):
            raise InputError(f"there are two files of weights for {method} with spp: name weights/{name}_yfcc.pth "
                             f"(outdoor) or weights/{name}_scannet.pth (indoor) with --weights")
        name += f"_{dataset}"
    published, own = find_weights(f"{name}.pth"), find_weights(f"{name.removeprefix('e')}_open.pth")
    if published.is_file():
        return published
    if own.is_file():
        print(f"no published weights at weights/{published.name}: taking our own, weights/{own.name}", file=sys.stderr)
        return own
    demo = ""
    if feature_type == "sift" and method != "GM":
        demo = f"; the demo's are at {DEMO}" if DEMO.is_file() else "; `make demo` trains small ones"
    raise InputError(f"no weights for {method} with {feature_type} ({FEATURE_TYPES[feature_type].dim} channels): "
                     f"put the published file at weights/{published.name}, or name one with --weights{demo}")
