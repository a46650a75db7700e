"""Drawing only: matches between two images, the iterations of a pair, and curves."""
import contextlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image
from scipy.spatial import KDTree

from tools.files import atomic_path
from tools.geometry import resize_keypoints

# a notebook names its backend to the processes that it starts, where that may not be installed
_SCHEME, _, _MODULE = os.environ.get("MPLBACKEND", "").partition("://")
if "matplotlib" not in sys.modules and _SCHEME == "module" and not importlib.util.find_spec(_MODULE.split(".")[0]):
    del os.environ["MPLBACKEND"]
from matplotlib.figure import Figure  # noqa: E402

VIEW_SIDE = 960  # pixels, the longer side of a view in a picture at most: two fill a screen
VIEW_BRIGHTNESS = 0.75
GAP = 8
TEXT_HEIGHT = 22
INK = (40, 40, 40)
# BGR, from certain to wrong: green, yellow, red, even in lightness on photographs
GREEN, YELLOW, RED = (60, 190, 40), (0, 200, 240), (40, 40, 230)
KEPT, DROPPED = (255, 255, 255), (130, 130, 130)  # keypoints, on a photograph made darker than either
BAR, TRACK = (110, 110, 110), (228, 228, 228)
LEGEND = ((KEPT, "keypoint kept"), (DROPPED, "dropped"), (GREEN, "match, inlier of the pose"), (RED, "other match"))
FONT = "sans"  # OpenCV's own
STRIP_WIDTH, STRIP_COLUMNS = 1660, 5  # twice the width of a README, for screens of high density
GIF_WIDTH = 830
MAX_LINES = 120  # more would hide the photographs
SURE_ERROR = 5.0  # degrees, where the colour of a pose error is yellow; the bar is full at twice that


def _ramp(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] -> BGR (N, 3): 0 green, 0.5 yellow, 1 red."""
    anchors = np.array([GREEN, YELLOW, RED], np.float64)
    return np.stack([np.interp(values, [0, 0.5, 1], anchors[:, channel]) for channel in range(3)], axis=1)


def error_colors(errors: np.ndarray, threshold: float) -> np.ndarray:
    """Errors (N,) >= 0 -> BGR (N, 3): green at 0, yellow at the threshold, red from twice the threshold on."""
    return _ramp(np.clip(np.asarray(errors, np.float64) / (2 * threshold), 0, 1))


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """An image downscaled for its longer side to be `side`; as it is if it is no larger."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _as_view(image: np.ndarray, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) or (H, W, 3) as a view of a picture, darker so that lines show; its keypoints (N, 2) there."""
    view = shrink(image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), VIEW_SIDE)
    keypoints = resize_keypoints(np.asarray(keypoints, np.float64), *np.divide(view.shape[1::-1], image.shape[1::-1]))
    return cv2.convertScaleAbs(view, alpha=VIEW_BRIGHTNESS), keypoints


def _text_width(line: str, size: int, weight: int = 400) -> int:
    x, _, width, _ = cv2.getTextSize((1, 1), line, (0, 0), cv2.FontFace(FONT), size, weight)
    return x + width


def _write_text(canvas: np.ndarray, line: str, x: int, baseline: int, size: int = 15, weight: int = 400, room=None,
                right: bool = False) -> None:
    """Write a line on the canvas from x on, or with `right` up to x, in smaller letters if it is wider than `room`."""
    room = canvas.shape[1] - x - 4 if room is None else room
    while size > 1 and _text_width(line, size, weight) > room:
        size -= 1
    if right:
        x -= _text_width(line, size, weight)
    cv2.putText(canvas, line, (x, baseline), INK, cv2.FontFace(FONT), size, weight)


def draw_matches(image0: np.ndarray, image1: np.ndarray, keypoints0: np.ndarray, keypoints1: np.ndarray,
                 title=(), errors=None, inliers=None, error_threshold: float = 0.005) -> np.ndarray:
    """Two images side by side with lines between matched keypoints -> BGR picture (H, W, 3) uint8.

    image0/1: (H, W) or (H, W, 3) BGR; keypoints0/1: (M, 2), row i of one matches row i of the other, in pixels of the
    images given; title: lines of text above. Coloured by errors (M,), else by inliers (M,) bool, else all green. A
    legend with counts ends the text.
    """
    (view0, ends0), (view1, ends1) = _as_view(image0, keypoints0), _as_view(image1, keypoints1)
    lines = list(title)
    if errors is not None:
        colors = error_colors(errors, error_threshold)
        good = int(np.sum(np.asarray(errors) < error_threshold))
        lines.append(f"{len(errors)} matches: {good} with an error below {error_threshold:g} (green to "
                     f"yellow), {len(errors) - good} above (to red)")
        order = np.argsort(errors, kind="stable")  # wrong ones on top: none is hidden under a right one
    elif inliers is not None:
        colors = np.where(np.asarray(inliers)[:, None], GREEN, RED)
        n_inliers = int(np.sum(inliers))
        lines.append(f"{len(inliers)} matches: {n_inliers} inliers (green), {len(inliers) - n_inliers} rejected (red)")
        order = np.argsort(inliers, kind="stable")
    else:
        colors = np.tile(GREEN, (len(keypoints0), 1))
        lines.append(f"{len(keypoints0)} matches")
        order = np.arange(len(keypoints0))

    top = TEXT_HEIGHT * len(lines) + 8
    left1 = view0.shape[1] + GAP
    canvas = np.full((top + max(len(view0), len(view1)), left1 + view1.shape[1], 3), 255, np.uint8)
    canvas[top:top + len(view0), :view0.shape[1]] = view0
    canvas[top:top + len(view1), left1:] = view1
    for row, line in enumerate(lines):
        _write_text(canvas, line, 6, TEXT_HEIGHT * (row + 1) - 4)

    ends0, ends1 = ends0 + [0, top], ends1 + [left1, top]
    ends0, ends1 = (np.rint(ends * 16).astype(int).tolist() for ends in (ends0, ends1))  # OpenCV draws to 1/16 pixel
    colors = colors.tolist()
    for i in order:
        cv2.line(canvas, ends0[i], ends1[i], colors[i], 1, cv2.LINE_AA, 4)
    for i in order:
        for end in (ends0[i], ends1[i]):
            cv2.circle(canvas, end, 2 * 16, colors[i], cv2.FILLED, cv2.LINE_AA, 4)
    return canvas


@dataclass
class Stage:
    """One picture of a series that shows how a pair is matched.

    kept0 (K0,), kept1 (K1,): indices of the keypoints still present; matches (M, 2): indices into the keypoints;
    inliers (M,) bool: those that agree with the pose. errors: of the pose's rotation and translation in degrees, inf
    without a pose; None: not known.
    """

    title: str
    kept0: np.ndarray
    kept1: np.ndarray
    matches: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    inliers: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    errors: tuple[float, float] | None = None


def _fit(image: np.ndarray, keypoints: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image as wide as a picture's panel, gray, dark and even in contrast; and its keypoints (N, 2) there."""
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
    scale = width / gray.shape[1]
    size = width, max(round(gray.shape[0] * scale), 1)
    gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    low, high = np.percentile(gray, [1, 99])
    gray = np.interp(gray, [low, max(high, low + 1)], [15, 125])
    keypoints = resize_keypoints(np.asarray(keypoints, np.float64), scale, scale)
    return cv2.cvtColor(gray.astype(np.uint8), cv2.COLOR_GRAY2BGR), keypoints


def _draw_stage(views, ends, stage: Stage, gap: int, beside: bool) -> np.ndarray:
    """Both views with a stage's keypoints and matches -> BGR picture.

    views: two darkened images; ends: keypoints (N, 2) of each in its pixels; beside: the views stand side by side,
    otherwise one above the other. All matches have their ends drawn; lines join MAX_LINES of them at most, every so
    many in the order given.
    """
    (h0, w0), (h1, w1) = (view.shape[:2] for view in views)
    offset = np.array([w0 + gap, 0]) if beside else np.array([0, h0 + gap])
    panel = np.full((max(h0, h1) if beside else h0 + gap + h1, w0 + gap + w1 if beside else max(w0, w1), 3), 255,
                    np.uint8)
    panel[:h0, :w0] = views[0]
    panel[offset[1]:offset[1] + h1, offset[0]:offset[0] + w1] = views[1]
    ends = ends[0], ends[1] + offset
    points = [np.rint(xy * 16).astype(int).tolist() for xy in ends]
    for centers, kept in zip(points, (stage.kept0, stage.kept1)):
        is_kept = np.zeros(len(centers), bool)
        is_kept[kept] = True
        for color, chosen in ((DROPPED, ~is_kept), (KEPT, is_kept)):
            for i in np.flatnonzero(chosen):
                cv2.circle(panel, centers[i], 20, color, cv2.FILLED, cv2.LINE_AA, 4)
    lines, joined = panel.copy(), np.zeros(len(stage.matches), bool)
    joined[::max(1, -(-len(joined) // MAX_LINES))] = True
    for color, chosen in ((RED, ~stage.inliers), (GREEN, stage.inliers)):
        for i, j in stage.matches[chosen & joined].tolist():
            cv2.line(lines, points[0][i], points[1][j], color, 1, cv2.LINE_AA, 4)
    panel = cv2.addWeighted(panel, 0.3, lines, 0.7, 0)
    for color, chosen in ((RED, ~stage.inliers), (GREEN, stage.inliers)):
        for i, j in stage.matches[chosen].tolist():
            for point in (points[0][i], points[1][j]):
                cv2.circle(panel, point, 28, color, cv2.FILLED, cv2.LINE_AA, 4)
    return panel


def _rows(stage: Stage, stages: list[Stage], error_name: str) -> list[tuple | None]:
    """What is written under a stage: label, value and a bar as (share, colour) of its parts, which sum to 1 at most.

    None keeps a place free, where there is nothing to say.
    """
    n_kept = len(stage.kept0) + len(stage.kept1)
    n_matches, n_inliers = len(stage.matches), int(np.sum(stage.inliers))
    most = max(1, *(len(other.matches) for other in stages))
    rows = [("keypoints", f"{len(stage.kept0)} + {len(stage.kept1)}",
             [(n_kept / max(1, *(len(other.kept0) + len(other.kept1) for other in stages)), BAR)])]
    rows.append(("inliers", f"{n_inliers} of {n_matches}",
                 [(n_inliers / most, GREEN), ((n_matches - n_inliers) / most, RED)]) if n_matches else None)
    for name, error in zip(("rotation", "translation"), stage.errors or ()):
        value = f"{error:.1f}\u00b0" if np.isfinite(error) else "no pose"
        color = tuple(error_colors([error], SURE_ERROR)[0].tolist())
        rows.append((f"{name} {error_name}", value, [(min(error / (2 * SURE_ERROR), 1.0), color)]))
    return rows


def _write_row(canvas: np.ndarray, row: tuple | None, x: int, top: int, width: int, size: int) -> None:
    """Write a row of `_rows`: label and value, and below them the bar."""
    if row is None:
        return
    label, value, bar = row
    _write_text(canvas, label, x, top + size, size, room=width - _text_width(value, size, 600) - size // 2)
    _write_text(canvas, value, x + width, top + size, size, 600, width, right=True)
    y0, y1 = top + round(1.45 * size), top + round(1.75 * size)
    canvas[y0:y1, x:x + width] = TRACK
    left = 0.0
    for share, color in bar:
        canvas[y0:y1, x + round(left * width):x + round((left + share) * width)] = color
        left += share


def draw_iterations(image0: np.ndarray, image1: np.ndarray, keypoints0: np.ndarray, keypoints1: np.ndarray,
                    stages: list[Stage], error_name: str = "error") -> np.ndarray:
    """How a pair is matched, stage by stage from left to right -> BGR picture, STRIP_WIDTH pixels wide.

    image0/1: (H, W) or (H, W, 3) BGR; keypoints0/1: (N, 2) in pixels of the images given; error_name: what the stages'
    errors are, "error" where the true pose is known, "change" if they compare with the pose before.
    """
    size, gap = 25, 24
    n_rows = -(-len(stages) // STRIP_COLUMNS)
    columns = -(-len(stages) // n_rows)
    width = (STRIP_WIDTH - gap * (columns - 1)) // columns
    views, ends = zip(_fit(image0, keypoints0, width), _fit(image1, keypoints1, width))
    above, row_height = round(1.7 * size), round(2.2 * size)
    panel_height = len(views[0]) + 6 + len(views[1])
    height = above + panel_height + size // 2 + 4 * row_height
    canvas = np.full((n_rows * (height + gap) + 2 * size, STRIP_WIDTH, 3), 255, np.uint8)
    for number, stage in enumerate(stages):
        x, y = (number % columns) * (width + gap), (number // columns) * (height + gap)
        _write_text(canvas, stage.title, x, y + size, size, 600, width)
        canvas[y + above:y + above + panel_height, x:x + width] = _draw_stage(views, ends, stage, 6, beside=False)
        for i, row in enumerate(_rows(stage, stages, error_name)):
            _write_row(canvas, row, x, y + above + panel_height + size // 2 + i * row_height, width, size)
    _write_legend(canvas, 0, len(canvas) - size // 2, size)
    return canvas


def _legend_width(size: int) -> int:
    return sum(round(2.6 * size) + _text_width(name, size) for _, name in LEGEND) - round(1.2 * size)


def _write_legend(canvas: np.ndarray, x: int, baseline: int, size: int) -> None:
    for color, name in LEGEND:
        center = x + size // 2, baseline - round(0.36 * size)
        cv2.circle(canvas, center, size // 2, (90, 90, 90), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(canvas, center, size // 4, color, cv2.FILLED, cv2.LINE_AA)
        _write_text(canvas, name, x + round(1.4 * size), baseline, size, room=canvas.shape[1])
        x += round(2.6 * size) + _text_width(name, size)


def iteration_frames(image0: np.ndarray, image1: np.ndarray, keypoints0: np.ndarray, keypoints1: np.ndarray,
                     stages: list[Stage], error_name: str = "error") -> list[np.ndarray]:
    """The same as `draw_iterations`, one BGR picture a stage, GIF_WIDTH pixels wide, for an animation."""
    size, gap = 15, 6
    # both views as high as each other, and together as wide as the frame
    aspect = sum(image.shape[1] / image.shape[0] for image in (image0, image1))
    view_height = (GIF_WIDTH - gap) / aspect
    width0 = round(view_height * image0.shape[1] / image0.shape[0])
    views, ends = zip(_fit(image0, keypoints0, width0), _fit(image1, keypoints1, GIF_WIDTH - gap - width0))
    above, panel_height = round(1.7 * size), max(len(view) for view in views)
    column = (GIF_WIDTH - 3 * 20) // 4
    frames = []
    for stage in stages:
        canvas = np.full((above + panel_height + round(3.2 * size), GIF_WIDTH, 3), 255, np.uint8)
        _write_text(canvas, stage.title, 0, size, size, 600, GIF_WIDTH - _legend_width(size) - size)
        _write_legend(canvas, GIF_WIDTH - _legend_width(size), size, size)
        canvas[above:above + panel_height] = _draw_stage(views, ends, stage, gap, beside=True)
        for i, row in enumerate(_rows(stage, stages, error_name)):
            _write_row(canvas, row, i * (column + 20), above + panel_height + round(0.6 * size), column, size)
        frames.append(canvas)
    return frames


def _palette() -> np.ndarray:
    """The colours of the pictures above: grays, and what is drawn over them, also half transparent; BGR (244, 3)."""
    grays = np.repeat(np.linspace(0, 255, 52)[:, None], 3, axis=1)
    inks = np.array([GREEN, RED, *_ramp(np.linspace(0.1, 0.9, 6))])
    blends = [ink * alpha + ground * (1 - alpha) for ink in inks for alpha in (0.25, 0.5, 0.75, 1.0)
              for ground in (20.0, 60.0, 100.0, 140.0, 200.0, 255.0)]
    return np.rint(np.concatenate([grays, blends])).astype(np.uint8)


def _with_palette(picture: np.ndarray) -> Image.Image:
    """A BGR picture in the nearest colours of the palette, which makes its file a third as large."""
    palette = _palette()
    codes = picture.astype(np.int32) @ [1 << 16, 1 << 8, 1]
    found, where = np.unique(codes, return_inverse=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    nearest = KDTree(palette).query(colors)[1].astype(np.uint8)
    indexed = Image.fromarray(nearest[where].reshape(codes.shape))
    indexed.putpalette(palette[:, ::-1].tobytes())
    return indexed


def write_strip(path, picture: np.ndarray) -> None:
    """Write what `draw_iterations` returns as a PNG of few colours, atomically."""
    with atomic_path(path) as temporary:
        _with_palette(picture).save(temporary, optimize=True)


def write_gif(path, frames: list[np.ndarray]) -> None:
    """Write what `iteration_frames` returns as an animated GIF that repeats and rests on the last one, atomically."""
    first, *others = map(_with_palette, frames)
    with atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, loop=0, duration=[*[1200] * len(others), 3000])


@contextlib.contextmanager
def plot(path, n_panels: int = 1, legend_above: bool = False):
    """Give axes (n_panels,) beside each other to draw into; then add legends and write them as a PNG, atomically."""
    figure = Figure(figsize=(6 * n_panels, 4), layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    yield panels
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2} if legend_above else {}
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, **place)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_curves(path, curves: dict, xlabel: str, ylabel: str, title: str = "", ylim: tuple | None = None) -> None:
    """Write a PNG of curves {name: (x, y)} with a legend, atomically. ylim: (low, high), or None: all data."""
    plot_panels(path, {ylabel: curves}, xlabel, title, ylim)


def plot_panels(path, panels: dict[str, dict], xlabel: str, title: str = "", ylim: tuple | None = None) -> None:
    """Write a PNG of panels {ylabel: curves} beside each other, curves and ylim as in `plot_curves`, atomically."""
    with plot(path, len(panels)) as all_axes:
        for axes, (ylabel, curves) in zip(all_axes, panels.items()):
            for name, (x, y) in curves.items():
                axes.plot(x, y, label=name, linewidth=1.5)
            axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=ylim)
            axes.margins(x=0)
