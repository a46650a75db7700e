"""Textures of the procedural scenes: pictures of walls, pavings, crates and posters, drawn from a generator.

Every texture function takes (rng, h, w, scale) and returns (h, w, 3) float32 BGR in about 0..255; `scale` is texels
per metre, so that a brick keeps its size in the world whatever the resolution. Structure is repeated where it is in
a town (windows, bricks, tiles), so that matching by descriptor has real ambiguity, and marks that occur once
(posters, stains, writing) lie between.
"""
import colorsys

import cv2
import numpy as np

from tools.files import read_image

LARGEST_CUT = 1024  # texels


def noise(rng, h, w, cell, octaves=4, falloff=0.65) -> np.ndarray:
    """Smooth noise (h, w) float32 with a standard deviation of about 1; `cell` is the coarsest octave in texels."""
    total, power = np.zeros((h, w), np.float32), 0.0
    for octave in range(octaves):
        size, gain = max(cell / 2 ** octave, 1.5), falloff ** octave
        grid = rng.standard_normal((int(h / size) + 3, int(w / size) + 3), dtype=np.float32)
        total += gain * cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)
        power += gain ** 2
    return total / np.float32(0.75 * np.sqrt(power))


def color(rng, saturation=(0.1, 0.5), value=(80, 215)) -> np.ndarray:
    """A random BGR colour (3,) float32: mostly between red and sand, as building materials are."""
    hue = rng.normal(0.08, 0.04) % 1 if rng.random() < 0.6 else rng.random()
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb[::-1], np.float32)


def weather(rng, image, scale, strength=0.12) -> np.ndarray:
    """Stains from large to fine, which make repeated structure differ a little from place to place."""
    h, w = image.shape[:2]
    stains = noise(rng, h, w, 1.5 * scale, 3) + 0.7 * noise(rng, h, w, 0.12 * scale, 3, 0.9)
    return image * np.clip(1 + strength * stains, 0.3, 1.7)[..., None]


def scribble(rng, image, count, scale, size=(0.15, 0.8)) -> None:
    """Thick random polylines, like cracks and graffiti, drawn into `image`."""
    h, w = image.shape[:2]
    for _ in range(count):
        steps = rng.normal(0, rng.uniform(*size) * scale, (int(rng.integers(3, 7)), 2))
        points = np.cumsum(steps, axis=0) + rng.uniform(0, 1, 2) * (w, h)
        cv2.polylines(image, [np.round(points * 16).astype(np.int32)], bool(rng.random() < 0.3),
                      color(rng, (0.2, 0.9), (20, 240)).tolist(), max(1, round(rng.uniform(0.02, 0.07) * scale)),
                      cv2.LINE_AA, 4)


def write_text(rng, image, x0, y0, x1, y1, height, ink) -> None:
    """Fill a box of `image` with lines of glyphs from a small random alphabet; `height` of a line in texels."""
    alphabet = [rng.integers(0, [4, 5], (int(rng.integers(3, 6)), 2)) / (3, 4) for _ in range(12)]
    glyph = np.array([0.55 * height, 0.7 * height])
    thickness = max(1, round(height / 9))
    for y in np.arange(y0, y1 - height + 1, height):
        x = x0
        while x < x1 - glyph[0]:
            if rng.random() > 0.15:
                points = alphabet[rng.integers(len(alphabet))] * glyph + (x, y + 0.15 * height)
                cv2.polylines(image, [np.round(points * 16).astype(np.int32)], False, ink, thickness, cv2.LINE_AA, 4)
            x += 0.8 * height


def plaster(rng, h, w, scale) -> np.ndarray:
    image = np.empty((h, w, 3), np.float32)
    image[:] = color(rng)
    for _ in range(2):
        patch = noise(rng, h, w, rng.uniform(0.4, 1.2) * scale) > rng.uniform(0.7, 1.4)
        image[patch] = 0.4 * image[patch] + 0.6 * color(rng)
    scribble(rng, image, int(h * w / (4 * scale ** 2)) + 1, scale, (0.1, 0.4))
    return weather(rng, image, scale, 0.14)


def masonry(rng, h, w, scale, block_h, block_w, shift) -> np.ndarray:
    """Rows of blocks with mortar between; every second row is shifted by `shift` of a block. Sizes in metres."""
    bh, bw = max(block_h * scale, 4), max(block_w * scale, 4)
    y = np.arange(h, dtype=np.float32)[:, None] / bh
    row = y.astype(np.int32)
    x = np.arange(w, dtype=np.float32)[None] / bw + shift * (row % 2)
    column = x.astype(np.int32)
    tones = rng.normal(1, 0.22, (row.max() + 1, column.max() + 1)).astype(np.float32).clip(0.35, 1.6)
    mortar = np.float32(max(0.02 * scale, 1.2))
    joint = ((y - row) * bh < mortar) | ((x - column) * bw < mortar)
    image = tones[row, column][..., None] * color(rng, (0.1, 0.45), (100, 200))
    if rng.random() < 0.5:  # an inlay in some of the blocks
        inlay = np.abs(x - column - 0.5) + np.abs(y - row - 0.5) < rng.uniform(0.2, 0.4)
        chosen = (rng.random(tones.shape) < rng.uniform(0.2, 0.7))[row, column]
        image[inlay & chosen] = color(rng)
    image[joint] = color(rng, (0, 0.2), (60, 200))
    return weather(rng, image, scale, 0.16)


def bricks(rng, h, w, scale) -> np.ndarray:
    block_h = rng.uniform(0.12, 0.25)
    return masonry(rng, h, w, scale, block_h, block_h * rng.uniform(1.8, 3), 0.5)


def tiles(rng, h, w, scale) -> np.ndarray:
    side = rng.uniform(0.3, 0.9)
    return masonry(rng, h, w, scale, side, side * rng.choice([1, 1, 2]), rng.choice([0, 0.5]))


def cobbles(rng, h, w, scale) -> np.ndarray:
    """Cells round jittered seeds, each with its own tone, dark in the joints."""
    cell = max(rng.uniform(0.18, 0.45) * scale, 4)
    gy, gx = np.mgrid[0:h:cell, 0:w:cell]
    seeds = np.stack([gy, gx]).reshape(2, -1) + rng.uniform(0, 0.8 * cell, (2, gy.size))
    sy, sx = np.minimum(seeds.astype(np.int32), [[h - 1], [w - 1]])
    free = np.full((h, w), 255, np.uint8)
    free[sy, sx] = 0
    distance, label = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    tones = rng.normal(1, 0.25, label.max() + 1).astype(np.float32).clip(0.4, 1.7)
    shade = tones[label] * np.clip(1.25 - 0.9 * (distance / cell) ** 2, 0.3, None)
    return weather(rng, shade[..., None] * color(rng, (0.05, 0.4), (90, 190)), scale, 0.14)


def planks(rng, h, w, scale) -> np.ndarray:
    width = max(rng.uniform(0.12, 0.3) * scale, 3)
    x = np.arange(w, dtype=np.float32) / np.float32(width)
    column = x.astype(np.int32)
    tones = rng.normal(1, 0.25, column.max() + 1).clip(0.4, 1.6).astype(np.float32)[column]
    tones[(x - column) * width < max(0.02 * scale, 1)] = 0.3
    grain = cv2.resize(rng.standard_normal((max(h // 24, 2), max(w // 2, 2)), dtype=np.float32), (w, h),
                       interpolation=cv2.INTER_LINEAR)
    image = (tones * (1 + 0.12 * grain))[..., None] * color(rng, (0.2, 0.6), (100, 190))
    for _ in range(int(6 * h * w / scale ** 2) + 1):  # knots
        center = (int(rng.integers(w)), int(rng.integers(h)))
        radius = max(1, round(rng.uniform(0.015, 0.05) * scale))
        cv2.circle(image, center, radius, color(rng, (0.2, 0.5), (20, 90)).tolist(), -1, cv2.LINE_AA)
    return weather(rng, image, scale, 0.1)


def stripes(rng, h, w, scale) -> np.ndarray:
    """Two-coloured bands in a random direction, as on awnings and barriers."""
    period, angle = max(rng.uniform(0.25, 0.9) * scale, 4), rng.uniform(0, np.pi)
    phase = (np.arange(w)[None] * np.cos(angle) + np.arange(h)[:, None] * np.sin(angle)) / period % 1
    band = np.clip((np.abs(phase - 0.5) - 0.25) * period + 0.5, 0, 1).astype(np.float32)[..., None]
    image = band * color(rng, (0.3, 0.8)) + (1 - band) * color(rng, (0, 0.3), (120, 230))
    scribble(rng, image, int(h * w / (2 * scale ** 2)) + 1, scale)
    return weather(rng, image, scale, 0.14)


def poster(rng, h, w, scale) -> np.ndarray:
    """Shapes and writing on a plain sheet with a border."""
    image = np.empty((h, w, 3), np.float32)
    image[:] = color(rng, (0.1, 0.8), (60, 235))
    image += 14 * noise(rng, h, w, max(h, w) / 4)[..., None]
    side = min(h, w)
    for _ in range(int(rng.integers(6, 14))):
        center, radius = rng.uniform(0, 1, 2) * (w, h), rng.uniform(0.05, 0.3) * side
        ink = color(rng, (0.2, 0.9), (20, 245)).tolist()
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
        corners = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        if rng.random() < 0.35:
            cv2.circle(image, (int(center[0]), int(center[1])), int(radius), ink,
                       int(rng.choice([-1, max(1, side // 40)])), cv2.LINE_AA)
        else:
            cv2.fillPoly(image, [np.round(corners * 16).astype(np.int32)], ink, cv2.LINE_AA, 4)
    for _ in range(int(rng.integers(2, 5))):
        x0, y0 = rng.uniform(0.04, 0.5, 2) * (w, h)
        x1, y1 = (x0, y0) + rng.uniform(0.25, 0.5, 2) * (w, h)
        if rng.random() < 0.5:
            cv2.rectangle(image, (int(x0), int(y0)), (int(x1), int(y1)), color(rng, (0, 0.3), (180, 250)).tolist(), -1)
        write_text(rng, image, x0, y0, x1, y1, max(rng.uniform(0.06, 0.16) * side, 4),
                   color(rng, (0.2, 0.9), (10, 90)).tolist())
    border = max(1, round(rng.uniform(0.01, 0.04) * side))
    cv2.rectangle(image, (0, 0), (w - 1, h - 1), color(rng).tolist(), 2 * border)
    return weather(rng, image, scale, 0.07)


def _window(rng, h, w) -> np.ndarray:
    """One window (h, w, 3): frame, panes and a sill. Pasted many times over a facade."""
    image = np.empty((h, w, 3), np.float32)
    image[:] = color(rng, (0, 0.3), (120, 240))
    rows, columns = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    frame = max(1, round(0.07 * min(h, w)))
    glass = color(rng, (0.1, 0.4), (25, 90))
    for i in range(rows):
        for j in range(columns):
            y0, y1 = i * h // rows + frame, (i + 1) * h // rows - frame
            x0, x1 = j * w // columns + frame, (j + 1) * w // columns - frame
            image[y0:y1, x0:x1] = glass * rng.uniform(0.7, 1.5)
    image[-frame * 2:] = color(rng, (0, 0.3), (60, 160))
    return image


def facade(rng, h, w, scale) -> np.ndarray:
    """A house front: storeys of alike windows, ledges, doors, shop signs and bills, on one of the materials."""
    image = (plaster, bricks, bricks, planks, tiles)[rng.integers(5)](rng, h, w, scale)
    storeys = max(1, round(h / scale / rng.uniform(2.4, 3.4)))
    bays = max(1, round(w / scale / rng.uniform(1.5, 2.6)))
    storey_h, bay_w = h / storeys, w / bays
    wh, ww = max(int(storey_h * rng.uniform(0.45, 0.65)), 4), max(int(bay_w * rng.uniform(0.4, 0.65)), 4)
    window, ledge = _window(rng, wh, ww), color(rng, (0, 0.3), (100, 220))
    blind = color(rng, (0.1, 0.6), (90, 220))
    for storey in range(storeys):
        y = int(storey * storey_h + 0.25 * (storey_h - wh))
        image[int(storey * storey_h):int(storey * storey_h + max(1, 0.12 * scale))] = ledge * rng.uniform(0.9, 1.1)
        for bay in range(bays):
            x, kind = int((bay + 0.5) * bay_w - ww / 2), rng.random()
            if storey == storeys - 1 and kind < 0.35:
                bill = (poster, planks, stripes)[rng.integers(3)](rng, wh, ww, scale)
                image[y:y + wh, x:x + ww] = bill
                continue
            pane = window * rng.uniform(0.75, 1.2)
            if kind > 0.6:
                drawn = int(wh * rng.uniform(0.2, 0.8))
                pane[:drawn, ww // 8:-max(ww // 8, 1)] = blind * rng.uniform(0.8, 1.1)
            image[y:y + wh, x:x + ww] = pane
    for _ in range(int(rng.integers(1, 4))):  # signs
        sw, sh = int(rng.uniform(0.15, 0.4) * w), max(int(rng.uniform(0.4, 0.9) * scale), 4)
        x, y = int(rng.uniform(0, w - sw)), int(rng.uniform(0.1, 0.9) * (h - sh))
        image[y:y + sh, x:x + sw] = color(rng, (0.2, 0.8), (60, 230))
        write_text(rng, image, x + 0.15 * sh, y + 0.1 * sh, x + sw, y + sh, 0.8 * sh,
                   color(rng, (0, 0.5), (10, 250)).tolist())
    scribble(rng, image, int(rng.integers(2, 8)), scale)
    return weather(rng, image, scale, 0.08)


def photograph(rng, paths, h, w) -> np.ndarray:
    """A random cut of the texture's shape out of one of the pictures at `paths`. (h, w, 3) float32.

    The ground is a patchwork of several: one picture over all of it would be a blur.
    """
    if max(h, w) > LARGEST_CUT:
        axis = int(w > h)
        sides = [(h, w // 2), (h, w - w // 2)] if axis else [(h // 2, w), (h - h // 2, w)]
        return np.concatenate([photograph(rng, paths, *side) for side in sides], axis=axis)
    image = read_image(paths[rng.integers(len(paths))], color=True)
    factor = rng.uniform(0.5, 1) * min(image.shape[0] / h, image.shape[1] / w)
    cut_h, cut_w = max(int(h * factor), 1), max(int(w * factor), 1)
    y, x = rng.integers(image.shape[0] - cut_h + 1), rng.integers(image.shape[1] - cut_w + 1)
    cut = image[y:y + cut_h, x:x + cut_w]
    return cv2.resize(cut, (w, h), interpolation=cv2.INTER_AREA if factor > 1 else cv2.INTER_CUBIC).astype(np.float32)


KINDS = {
    "ground": (cobbles, tiles, tiles, bricks),
    "front": (facade,),
    "wall": (plaster, bricks, planks, tiles),
    "crate": (planks, poster, poster, stripes, tiles, bricks, plaster, cobbles),
    "poster": (poster,),
}


def make_texture(rng, kind: str, h: int, w: int, scale: float, photographs=()) -> np.ndarray:
    """A texture (h, w, 3) uint8 for a surface of a `kind` of KINDS, or a cut of one of the `photographs` (paths)."""
    if photographs:
        image = photograph(rng, photographs, h, w)
    else:
        recipes = KINDS[kind]
        image = recipes[rng.integers(len(recipes))](rng, h, w, scale)
    return np.clip(image, 0, 255).astype(np.uint8)
