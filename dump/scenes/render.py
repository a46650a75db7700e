"""Textured rectangles seen by a pinhole camera: exact z-buffer, prefiltered textures, sun and shadow, sensor.

K is in OpenCV's pixel convention, poses are world-to-camera. In the plane of a rectangle, (s, t, 1) divided
by depth is linear in the pixel (s, t: place in the rectangle, 0..1): coverage, depth and texture coordinates are exact.
"""
from dataclasses import dataclass

import cv2
import numpy as np

from tools.geometry import make_pose, resize_K

SUPERSAMPLING = 2  # samples per pixel and side


@dataclass(frozen=True, eq=False)
class Rectangle:
    """A one-sided rectangle in the world (metres): its picture's top left corner, the way right and the way down."""

    corner: np.ndarray  # (3,)
    right: np.ndarray  # (3,) as long as the rectangle is wide
    down: np.ndarray  # (3,)
    texture: int


class Atlas:
    """All textures of a scene in one image, each at `LEVELS` x `LEVELS` reductions, by powers of 2 in u and v apart.

    Reduced separately, a wall seen at a slant is smoothed along the wall only.
    """

    LEVELS = 6

    def __init__(self, textures):
        """textures: list of (h, w, 3) uint8."""
        sizes = np.array([texture.shape[1::-1] for texture in textures])
        level_sizes = np.maximum(sizes[:, :, None] >> np.arange(self.LEVELS), 1)  # (n, 2, LEVELS), (w, h)
        blocks = level_sizes.sum(axis=2)
        atlas_w = max(int(blocks[:, 0].max()), int(np.sqrt(blocks.prod(axis=1).sum())))
        corners, x, y, shelf = np.zeros_like(blocks), 0, 0, 0
        for i in np.argsort(-blocks[:, 1], kind="stable"):
            if x + blocks[i, 0] > atlas_w:
                x, y, shelf = 0, y + shelf, 0
            corners[i] = x, y
            x, shelf = x + blocks[i, 0], max(shelf, int(blocks[i, 1]))
        self.image = np.zeros((y + shelf, atlas_w, 3), np.uint8)
        before = np.cumsum(level_sizes, axis=2) - level_sizes
        self.offsets = (corners[:, :, None] + before).astype(np.float32)  # (n, 2, LEVELS)
        self.sizes = level_sizes.astype(np.float32)
        for i, texture in enumerate(textures):
            for v in range(self.LEVELS):
                h = level_sizes[i, 1, v]
                reduced = texture = cv2.resize(texture, (texture.shape[1], h), interpolation=cv2.INTER_AREA)
                for u in range(self.LEVELS):
                    reduced = cv2.resize(reduced, (level_sizes[i, 0, u], h), interpolation=cv2.INTER_AREA)
                    x, y = corners[i] + (before[i, 0, u], before[i, 1, v])
                    self.image[y:y + reduced.shape[0], x:x + reduced.shape[1]] = reduced


class Rectangles:
    """The rectangles of a scene as arrays."""

    def __init__(self, rectangles):
        self.frames = np.array([np.stack([r.right, r.down, r.corner], axis=1) for r in rectangles])  # (n, 3, 3)
        into = np.cross(self.frames[:, :, 0], self.frames[:, :, 1])
        self.normals = -into / np.linalg.norm(into, axis=1, keepdims=True)
        self.textures = np.array([r.texture for r in rectangles])

    def rasterise(self, K, pose, size):
        """Which rectangle each pixel centre sees. Returns index (h, w) int16 (-1: none), inverse depth (h, w) float32
        (0: none), and the rectangles' linear functions (n, 3, 3): times (x, y, 1) they give (s, t, 1) / depth."""
        w, h = size
        frames = pose[:3, :3] @ self.frames
        frames[:, :, 2] += pose[:3, 3]
        # a positive determinant: seen from the front; next to 0: edge-on, which covers nothing
        area = np.linalg.norm(np.cross(frames[:, :, 0], frames[:, :, 1]), axis=1)
        facing = np.flatnonzero(np.linalg.det(frames) > 1e-6 * area)
        linear = np.linalg.inv(K @ frames[facing])

        # 0 <= s, t <= 1 over depth, which nothing behind the camera meets. Within a row each bounds x from one side, so
        # a row's span is exact and no polygon needs clipping
        s, t, inverse = linear[:, 0], linear[:, 1], linear[:, 2]
        edges = np.stack([s, inverse - s, t, inverse - t], axis=1)
        slope, rest = edges[..., :1], edges[..., 1:2] * np.arange(h) + edges[..., 2:]  # (m, 4, 1), (m, 4, h)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = -rest / slope
        # the small widening closes the cracks that rounding leaves between neighbours
        low = np.where(slope > 0, crossing, np.where((slope == 0) & (rest < 0), np.inf, -np.inf)).max(axis=1) - 1e-6
        high = np.where(slope < 0, crossing, np.inf).min(axis=1) + 1e-6
        first, last = np.ceil(np.maximum(low, 0)), np.floor(np.minimum(high, w - 1))

        index, nearest = np.full((h, w), -1, np.int16), np.zeros((h, w), np.float32)
        columns = np.arange(w, dtype=np.float32)
        for k, rectangle in enumerate(facing):
            rows = np.flatnonzero(first[k] <= last[k])
            if not len(rows):
                continue
            y0, y1 = rows[0], rows[-1] + 1
            x0, x1 = int(first[k, rows].min()), int(last[k, rows].max()) + 1
            box, x = (slice(y0, y1), slice(x0, x1)), columns[x0:x1]
            depth = evaluate(inverse[k], x, np.arange(y0, y1)[:, None])
            seen = depth > nearest[box]
            seen &= x >= first[k, y0:y1, None].astype(np.float32)
            seen &= x <= last[k, y0:y1, None].astype(np.float32)
            np.copyto(nearest[box], depth, where=seen)
            np.copyto(index[box], np.int16(rectangle), where=seen)
        functions = np.zeros_like(frames)
        functions[facing] = linear
        return index, nearest, functions

    def paint(self, atlas, index, linear) -> np.ndarray:
        """Texture colours (h, w, 3) uint8 for the index and linear functions of `rasterise`; black where nothing is."""
        h, w = index.shape
        linear = linear.astype(np.float32)
        order = np.argsort(index, axis=None, kind="stable")
        x = np.tile(np.arange(w, dtype=np.float32), h)[order]
        y = np.repeat(np.arange(h, dtype=np.float32), w)[order]
        places = np.full((2, h * w), -10, np.float32)  # outside the atlas
        ends = np.cumsum(np.bincount(index.ravel() + 1, minlength=len(linear) + 1))
        for k in np.flatnonzero(np.diff(ends)):
            pixels = slice(ends[k], ends[k + 1])
            depth = 1 / evaluate(linear[k, 2], x[pixels], y[pixels])
            for axis in range(2):
                place = evaluate(linear[k, axis], x[pixels], y[pixels]) * depth
                # texels that one sample spans along this axis of the texture; the level whose texel is nearest to it
                dx, dy = (np.abs(linear[k, axis, i] - place * linear[k, 2, i]) for i in range(2))
                span = np.maximum(dx, dy) * depth
                sizes, offsets = atlas.sizes[self.textures[k], axis], atlas.offsets[self.textures[k], axis]
                level = np.frexp(span * (sizes[0] * np.float32(np.sqrt(2))))[1] - 1
                size = sizes.take(level, mode="clip")
                inside = np.minimum(np.maximum(place * size - np.float32(0.5), 0), size - 1)
                places[axis][pixels] = offsets.take(level, mode="clip") + inside
        maps = np.empty_like(places)
        for axis in range(2):
            maps[axis][order] = places[axis]
        return cv2.remap(atlas.image, *maps.reshape(2, h, w), cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def evaluate(linear, x, y):
    """a x + b y + c; the smaller array is taken first, so that a row and a column broadcast cheaply."""
    return linear[0].astype(np.float32) * x + (linear[1] * y + linear[2]).astype(np.float32)


def look_at(center, target, roll=0.0) -> np.ndarray:
    """World-to-camera pose (4, 4) of a camera at `center` that looks at `target`, turned by `roll` radians."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    turn = np.array([[np.cos(roll), np.sin(roll), 0], [-np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    R = turn @ np.stack([right, np.cross(forward, right), forward])
    return make_pose(R, -R @ center)


def sunlight(rectangles, sun, index, depth, K, pose, radius, resolution=1024) -> np.ndarray:
    """Direct light (h, w) float32 in 0..1: cosine of incidence where nothing stands between the pixel and the sun.

    sun: direction to it (3,), unit length; radius: metres round the origin within which things cast shadows.
    """
    distance = 30 * radius  # far enough for parallel rays, near enough for single precision
    f = 0.5 * resolution * distance / radius
    K_sun = np.array([[f, 0, 0.5 * resolution], [0, f, 0.5 * resolution], [0, 0, 1]])
    pose_sun = look_at(distance * sun, np.zeros(3))
    _, nearest, _ = rectangles.rasterise(K_sun, pose_sun, (resolution, resolution))

    h, w = index.shape
    to_sun = pose_sun @ np.linalg.inv(pose)
    A, b = K_sun @ to_sun[:3, :3] @ np.linalg.inv(K), K_sun @ to_sun[:3, 3]
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    u, v, z = (evaluate(A[i], x, y) * depth + np.float32(b[i]) for i in range(3))
    z = 1 / z
    # the verdicts, not the depths, of the four nearest samples are interpolated: outlines of shadows without steps
    left, top = np.floor(u * z), np.floor(v * z)
    right_share, bottom_share = u * z - left, v * z - top
    lit = np.zeros((h, w), np.float32)
    for dx, x_share in ((0, 1 - right_share), (1, right_share)):
        for dy, y_share in ((0, 1 - bottom_share), (1, bottom_share)):
            blocker = cv2.remap(nearest, left + dx, top + dy, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
            # the margin: a surface must not shade itself through the coarse steps of the map
            lit += (z > blocker * np.float32(1 - 0.2 / distance)) * x_share * y_share
    incidence = np.append(np.maximum(rectangles.normals @ sun, 0), 0).astype(np.float32)
    return incidence[index] * cv2.GaussianBlur(lit, (5, 5), 1)


def sky(rng, K, pose, size) -> np.ndarray:
    """Background (h, w, 3) float32: a gradient from the horizon up, with faint clouds."""
    w, h = size
    up = pose[:3, :3] @ [0, 0, 1.0]
    K_inv = np.linalg.inv(K)
    height = evaluate(up @ K_inv, np.arange(w, dtype=np.float32), np.arange(h)[:, None])
    zenith = np.array([rng.uniform(190, 240), rng.uniform(130, 190), rng.uniform(80, 160)], np.float32)
    horizon = np.array([rng.uniform(215, 240), rng.uniform(205, 235), rng.uniform(195, 230)], np.float32)
    share = np.clip(1.2 * height, 0, 1)[..., None]
    clouds = cv2.resize(rng.standard_normal((5, 6), dtype=np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
    return horizon + share * (zenith - horizon) + 5 * clouds[..., None]


def expose(rng, image) -> np.ndarray:
    """What a camera makes of a picture (h, w, 3) float32: blur, exposure, white balance, gamma, vignetting, noise."""
    h, w = image.shape[:2]
    focus = rng.uniform(0.25, 0.9) if rng.random() < 0.8 else rng.uniform(0.9, 1.6)
    image = cv2.GaussianBlur(image, (0, 0), focus * max(w, h) / 640 + 0.05)
    gain = rng.uniform(75, 145) / max(float(image.mean()), 1)
    balance = np.exp(rng.normal(0, 0.05, 3)) * gain / 255
    corner = rng.uniform(0, 0.3)
    x, y = np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    image *= (1 - np.float32(corner / 2) * (x * x + y * y))[..., None] * balance.astype(np.float32)
    image = cv2.pow(np.clip(image, 0, 1), float(np.exp(rng.normal(0, 0.2))))
    grain = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 5))
    return np.clip(image * 255 + grain + np.float32(0.5), 0, 255).astype(np.uint8)


def render(rng, rectangles, atlas, K, pose, size, shadow_radius) -> tuple[np.ndarray, np.ndarray]:
    """One photograph: image (h, w, 3) uint8 BGR, and depth at the pixel centres (h, w) float32 metres, 0 = sky.

    rng draws the light and the camera's settings; shadow_radius: as `radius` of `sunlight`.
    """
    fine = (SUPERSAMPLING * size[0], SUPERSAMPLING * size[1])
    index, _, linear = rectangles.rasterise(resize_K(K, SUPERSAMPLING, SUPERSAMPLING), pose, fine)
    colors = rectangles.paint(atlas, index, linear)
    covered = cv2.resize((index >= 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)[..., None]
    colors = cv2.resize(colors, size, interpolation=cv2.INTER_AREA).astype(np.float32)

    index, inverse, _ = rectangles.rasterise(K, pose, size)
    depth = np.where(inverse > 0, 1 / np.maximum(inverse, np.float32(1e-6)), np.float32(0))
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(25, 65))
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    direct = sunlight(rectangles, sun, index, depth, K, pose, shadow_radius)
    ambient = rng.uniform(0.35, 0.8)  # overcast at the upper end
    light = cv2.GaussianBlur(ambient + (1.1 - ambient) * direct, (3, 3), 0.7)
    return expose(rng, colors * light[..., None] + (1 - covered) * sky(rng, K, pose, size)), depth
