"""Write the weights of a training run alone, in half precision: what is shared and shipped.

    python3 -m tools.export_weights runs/train/latest.pth weights/imp_sift_open.pth
"""
import argparse
import sys
from pathlib import Path

import torch

from tools.checkpoint import TOLD, load_checkpoint, save_checkpoint
from tools.cli import InputError, run


def export_weights(checkpoint, path, scenes: list[str] | None = None) -> None:
    """Write `model` in float16, `scenes`, `network`, `feature` and `step` of a checkpoint of train.py to `path`.

    Of its `config`, what `load_matcher` asks for goes along. scenes: what to say that it was trained on; None: what
    the checkpoint says. InputError if it is none of train.py's, or if a weight is too large for float16.
    """
    content = load_checkpoint(checkpoint)
    config = content.get("config")
    if not isinstance(config, dict) or "step" not in content or not {"network", "feature"} <= config.keys():
        raise InputError(f"{checkpoint} was not written by train.py: it does not say how it was trained")
    model = {name: value.half() if value.is_floating_point() else value for name, value in content["model"].items()}
    too_large = [name for name, value in model.items() if not torch.isfinite(value).all()]
    if too_large:
        raise InputError(f"{checkpoint}: {too_large[0]} does not fit in half precision")
    save_checkpoint(path, {"model": model, "network": config["network"], "feature": config["feature"],
                           "config": {key: config[key] for key in ("network", *TOLD) if key in config},
                           "step": content["step"], "scenes": content.get("scenes") if scenes is None else scenes})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="tools.export_weights", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="of train.py")
    parser.add_argument("path", help="file to write")
    parser.add_argument("--scenes", nargs="+", metavar="NAME",
                        help="what it was trained on, if the names of its scenes say too little")
    args = parser.parse_args(argv)
    export_weights(args.checkpoint, args.path, args.scenes)
    print(f"{args.path}: {Path(args.path).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
