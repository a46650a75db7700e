"""A town square of textured rectangles, and cameras all round that look inwards."""
import numpy as np

from dump.scenes.render import Rectangle, look_at
from dump.scenes.textures import make_texture


class World:
    """Rectangles and textures of a scene in the making; metres, z up, the ground at 0."""

    def __init__(self, rng, scale, photographs=()):
        """scale: texels per metre."""
        self.rng, self.scale, self.photographs = rng, scale, photographs
        self.rectangles, self.textures, self.solids = [], [], []

    def texture(self, kind, width, height, scale=None) -> int:
        """Make a texture for a surface of width x height metres; returns its number."""
        scale = scale or self.scale
        w, h = max(round(width * scale), 8), max(round(height * scale), 8)
        self.textures.append(make_texture(self.rng, kind, h, w, scale, self.photographs))
        return len(self.textures) - 1

    def ground(self, half, texture, hole=0.0):
        """A square of side 2 * half at height 0; with `hole`, four strips round a square of side 2 * hole."""
        for turn in range(4 if hole else 1):
            c, s = (1, 0, -1, 0)[turn], (0, 1, 0, -1)[turn]
            R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
            right, down = (half + hole, half - hole) if hole else (2 * half, 2 * half)
            self.rectangles.append(Rectangle(R @ [-half, half, 0], R @ [right, 0, 0], R @ [0, -down, 0], texture))

    def box(self, center, size, yaw, textures, tilt=0.0):
        """A box that stands with the middle of its foot at `center`; size (width, depth, height).

        textures: of the front (which looks along +x at yaw 0), left, back, right side and top. tilt: radians about
        the vertical's normal, to lean boards and crates.
        """
        c, s, ct, st = np.cos(yaw), np.sin(yaw), np.cos(tilt), np.sin(tilt)
        R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[ct, 0, -st], [0, 1, 0], [st, 0, ct]])
        width, depth, height = size
        middle = np.asarray(center, float) + R @ [0, 0, height / 2]
        out, side, up = R[:, 0] * depth / 2, R[:, 1] * width / 2, R[:, 2] * height / 2
        for towards, right, texture in zip((out, side, -out, -side), (side, -out, -side, out), textures):
            self.rectangles.append(Rectangle(middle + towards - right + up, 2 * right, -2 * up, texture))
        self.rectangles.append(Rectangle(middle + up - side - out, 2 * side, 2 * out, textures[4]))
        self.solids.append((middle, R, np.array([depth, width, height]) / 2))

    def house(self, center, size, yaw, sides):
        """A box with a front of its own and things that stand out from it, which give parallax on the wall.

        sides: textures of the sides and the top.
        """
        rng, (width, depth, height) = self.rng, size
        front = self.texture("front", width, height)
        self.box(center, size, yaw, [front, sides[0], sides[1], sides[0], sides[1]])
        R = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        for _ in range(int(rng.integers(2, 6))):
            relief = rng.uniform(0.15, 0.9)
            w, h = (rng.uniform(0.25, 0.6), height) if rng.random() < 0.3 else rng.uniform(0.5, 2.5, 2)
            x, z = rng.uniform(-0.5, 0.5) * (width - w), rng.uniform(0, 1) * (height - h)
            texture = self.texture("crate", w, h)
            self.box(np.asarray(center) + R @ [depth / 2 + relief / 2 - 0.05, x, z], (w, relief, h), yaw,
                     [texture, sides[0], texture, sides[0], sides[1]])


def build_world(rng, scale, photographs=()) -> World:
    """A town square. scale: texels per metre; photographs: paths of pictures to cut the textures from."""
    world = World(rng, scale, photographs)
    world.ground(19, world.texture("ground", 38, 38, 0.75 * scale))
    world.ground(40, world.texture("ground", 59, 21, 0.4 * scale), hole=19)
    walls = [world.texture("wall", 6, 8, 0.7 * scale) for _ in range(5)]

    n_houses, turn = int(rng.integers(9, 14)), rng.uniform(0, 2 * np.pi)
    for k in range(n_houses):
        angle, distance = turn + 2 * np.pi * (k + rng.uniform(-0.15, 0.15)) / n_houses, rng.uniform(21, 27)
        size = (rng.uniform(8, 14), 5, rng.uniform(5, 13))
        world.house(distance * np.array([np.cos(angle), np.sin(angle), 0]), size, angle + np.pi + rng.normal(0, 0.12),
                    rng.choice(walls, 2))

    reach = 2.0
    if rng.random() < 0.6:  # a landmark, two of its sides alike
        width, depth, height = rng.uniform(3, 6), rng.uniform(3, 6), rng.uniform(4, 9)
        front, side = world.texture("front", width, height), world.texture("front", depth, height)
        world.box((0, 0, 0), (width, depth, height), rng.uniform(0, 2 * np.pi),
                  [front, side, front, world.texture("front", depth, height), walls[0]])
        reach = 0.7 * np.hypot(width, depth)
    for _ in range(int(rng.integers(9, 16))):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(reach, 13)
        foot, yaw = distance * np.array([np.cos(angle), np.sin(angle), 0]), rng.uniform(0, 2 * np.pi)
        size = rng.uniform(0.7, 2.4, 3)
        for _ in range(int(rng.integers(1, 4))):  # a stack
            sides = world.texture("crate", size[0], size[2]), world.texture("crate", size[1], size[2])
            top = world.texture("crate", size[0], size[1])
            world.box(foot, size, yaw, [sides[0], sides[1], sides[0], sides[1], top])
            foot, yaw, size = foot + [0, 0, size[2]], yaw + rng.normal(0, 0.4), size * rng.uniform(0.5, 0.95, 3)
            if rng.random() < 0.5:
                break
    for _ in range(int(rng.integers(4, 8))):  # boards with a poster on either side, leaning a little
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(reach, 14)
        size = (rng.uniform(1.2, 3.5), 0.12, rng.uniform(1.2, 3))
        front, back = (world.texture("poster", size[0], size[2]) for _ in range(2))
        world.box(distance * np.array([np.cos(angle), np.sin(angle), 0]), size, rng.uniform(0, 2 * np.pi),
                  [front, walls[1], back, walls[1], walls[1]], tilt=rng.normal(0, 0.12))
    return world


def place_cameras(rng, world, rectangles, n, size):
    """n cameras round the square that look inwards: a list of (K (3, 3) in OpenCV's convention, pose (4, 4)).

    They stand on an arc: views from opposite sides share ground that no descriptor recognises. Few cameras stand on
    a short one, so that they still see the same things.
    """
    w, h = size
    arc = np.deg2rad(np.clip(3.5 * n, 40, rng.uniform(70, 120)))
    start = rng.uniform(0, 2 * np.pi)
    cameras = []
    for i in range(n):
        for _ in range(60):
            angle = start + arc * (i + rng.uniform(-0.5, 0.5)) / n
            distance = rng.uniform(6, 18)
            height = rng.uniform(1.3, 3.5) if rng.random() < 0.75 else rng.uniform(3.5, 8)
            center = np.array([distance * np.cos(angle), distance * np.sin(angle), height])
            target = np.append(rng.normal(0, 1.8, 2), rng.uniform(0.8, 3.5))
            roll = rng.normal(0, 0.06) if rng.random() < 0.8 else rng.uniform(-0.6, 0.6)
            f = w * np.exp(rng.uniform(np.log(0.7), np.log(1.35)))
            K = np.array([[f, 0, (w - 1) / 2], [0, f, (h - 1) / 2], [0, 0, 1]])
            pose = look_at(center, target, roll)
            if any((np.abs((center - middle) @ R) < half + 0.8).all() for middle, R, half in world.solids):
                continue
            small = K * [[32 / w], [24 / h], [1]]
            _, inverse, _ = rectangles.rasterise(small, pose, (32, 24))
            # a wall before the lens or much sky shows nothing that another view could share
            if np.mean(inverse > 1 / 3) < 0.15 and np.mean(inverse == 0) < 0.35:
                break
        cameras.append((K, pose))
    return cameras
