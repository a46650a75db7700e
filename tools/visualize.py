"""Drawing only: matches between two images, and curves."""
import cv2
import numpy as np
from matplotlib.figure import Figure

from tools.files import atomic_path

VIEW_SIDE = 640  # pixels, the longer side of a view in a picture at most
GAP = 8
TEXT_HEIGHT = 22
INK = (40, 40, 40)
# BGR, from certain to wrong: green, yellow, red, even in lightness on photographs
GREEN, YELLOW, RED = (60, 190, 40), (0, 200, 240), (40, 40, 230)


def _ramp(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] -> BGR (N, 3): 0 green, 0.5 yellow, 1 red."""
    anchors = np.array([GREEN, YELLOW, RED], np.float64)
    return np.stack([np.interp(values, [0, 0.5, 1], anchors[:, channel]) for channel in range(3)], axis=1)


def error_colors(errors: np.ndarray, threshold: float) -> np.ndarray:
    """Errors (N,) >= 0 -> BGR (N, 3): green at 0, yellow at the threshold, red from twice the threshold on."""
    return _ramp(np.clip(np.asarray(errors, np.float64) / (2 * threshold), 0, 1))


def score_colors(scores: np.ndarray) -> np.ndarray:
    """Scores (N,) in [0, 1] -> BGR (N, 3): red at 0, yellow at 0.5, green at 1."""
    return _ramp(1 - np.clip(np.asarray(scores, np.float64), 0, 1))


def _as_view(image: np.ndarray) -> tuple[np.ndarray, float]:
    """An image (H, W) or (H, W, 3), made small enough for a picture, and its scale; in gray, for colours to show."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    scale = min(1.0, VIEW_SIDE / max(image.shape))
    if scale < 1:
        size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), scale


def _write_text(canvas: np.ndarray, line: str, x: int, baseline: int) -> None:
    """Write a line on the canvas, in smaller letters if it would not fit."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.5
    (width, _), _ = cv2.getTextSize(line, font, size, 1)
    size *= min(1.0, (canvas.shape[1] - x - 4) / max(width, 1))
    cv2.putText(canvas, line, (x, baseline), font, size, INK, 1, cv2.LINE_AA)


def draw_matches(image0: np.ndarray, image1: np.ndarray, keypoints0: np.ndarray, keypoints1: np.ndarray,
                 title=(), errors=None, scores=None, error_threshold: float = 0.005) -> np.ndarray:
    """Two images side by side with lines between matched keypoints -> BGR picture (H, W, 3) uint8.

    image0/1: (H, W) or (H, W, 3) BGR; keypoints0/1: (M, 2), row i of one matches row i of the other, in pixels of the
    images given; title: lines of text above. Coloured by errors (M,), by scores (M,), or all green. A legend with
    counts ends the text.
    """
    (view0, scale0), (view1, scale1) = _as_view(image0), _as_view(image1)
    lines = list(title)
    if errors is not None:
        colors = error_colors(errors, error_threshold)
        good = int(np.sum(np.asarray(errors) < error_threshold))
        lines.append(f"{len(errors)} matches: {good} with an epipolar error below {error_threshold:g} (green to "
                     f"yellow), {len(errors) - good} above (to red)")
        order = np.argsort(errors, kind="stable")
    elif scores is not None:
        colors = score_colors(scores)
        lines.append(f"{len(scores)} matches by score: 0 red, 1 green")
        order = np.argsort(-np.asarray(scores), kind="stable")
    else:
        colors = np.tile(np.array(GREEN, np.float64), (len(keypoints0), 1))
        lines.append(f"{len(keypoints0)} matches")
        order = np.arange(len(keypoints0))

    top = TEXT_HEIGHT * len(lines) + 8
    left1 = view0.shape[1] + GAP
    canvas = np.full((top + max(len(view0), len(view1)), left1 + view1.shape[1], 3), 255, np.uint8)
    canvas[top:top + len(view0), :view0.shape[1]] = view0
    canvas[top:top + len(view1), left1:] = view1
    for row, line in enumerate(lines):
        _write_text(canvas, line, 6, TEXT_HEIGHT * (row + 1) - 4)

    # pixel centres keep their place under resizing; OpenCV draws to 1/16 pixel
    ends0 = (np.asarray(keypoints0, np.float64) + 0.5) * scale0 - 0.5 + [0, top]
    ends1 = (np.asarray(keypoints1, np.float64) + 0.5) * scale1 - 0.5 + [left1, top]
    ends0, ends1 = np.rint(ends0 * 16).astype(int).tolist(), np.rint(ends1 * 16).astype(int).tolist()
    colors = colors.tolist()
    for i in order:  # the wrong ones last: none is hidden under a right one
        cv2.line(canvas, ends0[i], ends1[i], colors[i], 1, cv2.LINE_AA, 4)
    for i in order:
        for end in (ends0[i], ends1[i]):
            cv2.circle(canvas, end, 2 * 16, colors[i], cv2.FILLED, cv2.LINE_AA, 4)
    return canvas


def plot_curves(path, curves: dict, xlabel: str, ylabel: str, title: str = "", ylim: tuple | None = None) -> None:
    """Write a PNG of curves {name: (x, y)} with a legend, atomically. ylim: (low, high), or None: all data."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=ylim)
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if curves:
        axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
