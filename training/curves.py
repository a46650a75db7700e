"""The curves of a run, read from its TensorBoard log."""
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools.visualize import plot_curves

MAX_POINTS = 120


def plot_losses(folder) -> Path:
    """Draw the training and validation loss over the steps of the run in `folder`; returns the picture's path."""
    events = EventAccumulator(str(Path(folder) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for name, tag in (("training", "train/loss"), ("validation", "val/loss")):
        if tag in events.Tags()["scalars"]:
            scalars = events.Scalars(tag)
            groups = np.array_split(np.array([(s.step, s.value) for s in scalars]), min(len(scalars), MAX_POINTS))
            curves[name] = tuple(np.array([group.mean(axis=0) for group in groups]).T)
    path = Path(folder) / "loss.png"
    plot_curves(path, curves, xlabel="step", ylabel="loss")
    return path
