"""The curves of runs, read from their TensorBoard logs.

    python3 -m training.curves runs/demo/imp runs/demo/published --save_path assets/warm_start.png
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools.cli import InputError, run
from tools.files import check_file
from tools.visualize import plot_curves, plot_panels

MAX_POINTS = 120
COMPARED = {"loss": "train/loss", "precision of matches": "train/precision"}
COMPARED_POINTS = 40


def read_curves(folder, tags: dict[str, str], points: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curves of the run in `folder`: tags {name: tag} -> {name: (steps, values)} of those that were logged.

    At most `points` of each, means of steps in a row; values that are not finite are left out.
    """
    log = Path(folder) / "tensorboard"
    events = EventAccumulator(str(log), size_guidance={"scalars": 0})
    if log.is_dir():
        for path in log.iterdir():
            check_file(path)
        events.Reload()
    curves = {}
    for name, tag in tags.items():
        scalars = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        finite = np.array([(scalar.step, scalar.value) for scalar in scalars if np.isfinite(scalar.value)])
        if len(finite):
            groups = np.array_split(finite, min(len(finite), points))
            curves[name] = tuple(np.array([group.mean(axis=0) for group in groups]).T)
    return curves


def plot_losses(folder) -> Path:
    """Draw the training and validation loss over the steps of the run in `folder`; returns the picture's path."""
    path = Path(folder) / "loss.png"
    curves = read_curves(folder, {"training": "train/loss", "validation": "val/loss"}, MAX_POINTS)
    plot_curves(path, curves, xlabel="step", ylabel="loss")
    return path


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("training.curves", description="Compare training runs: loss and precision of "
                                     f"matches over steps, {COMPARED_POINTS} means of each.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="save_path of train.py")
    parser.add_argument("--save_path", required=True, metavar="PNG", help="picture to write")
    args = parser.parse_args(argv)
    if Path(args.save_path).suffix != ".png":
        raise InputError(f"--save_path {args.save_path}: give the name of a .png file")
    runs = {folder: read_curves(folder, COMPARED, COMPARED_POINTS) for folder in args.runs}
    for folder, curves in runs.items():
        if not curves:
            raise InputError(f"{folder} holds no log of a run: give the save_path of train.py")
    plot_panels(args.save_path, {name: {folder: curves[name] for folder, curves in runs.items() if name in curves}
                                 for name in COMPARED}, xlabel="step")
    print(args.save_path)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
