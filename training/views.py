"""Random views of an image, for samples made on the fly: cameras, resampling, light.

A photograph is a plane in space, seen by a camera anywhere in front of it. An image with depth is seen by its own
camera, turned about its centre and with another focal length, which needs no depth and leaves the pose exact.
All K here are for OpenCV's pixel convention.
"""
import cv2
import numpy as np

from tools.geometry import make_pose, to_rays

MAX_ROLL = 45.0  # degrees in the image plane, either way ...
WILD_ROLL = 0.1  # ... but for this share of the views, which stand anyhow
PHOTO_TILT = 50.0  # degrees between the optical axis and the normal of a photograph, at most
PHOTO_SCALE = (0.5, 1.5)  # pixels of the view per pixel of the photograph, where 1 fills the view
PHOTO_SHIFT = 0.25  # what the camera looks at lies so far from the centre at most, in sides of the photograph
PHOTO_FOCAL = (0.8, 1.5)  # in longer sides of the view
SCENE_TILT = 15.0  # degrees that the optical axis of an image with depth turns, at most
SCENE_ZOOM = (0.8, 1.5)  # 1: the whole image fills the view


def _log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def random_rotation(max_tilt: float, rng: np.random.Generator) -> np.ndarray:
    """A rotation (3, 3) of a camera: a roll about the optical axis after a tilt of up to max_tilt degrees."""
    limit = 180.0 if rng.random() < WILD_ROLL else MAX_ROLL
    roll, direction = np.radians(rng.uniform(-limit, limit)), rng.uniform(0, 2 * np.pi)
    tilt = np.radians(rng.uniform(0, max_tilt))
    tilted, _ = cv2.Rodrigues(tilt * np.array([np.cos(direction), np.sin(direction), 0]))
    rolled, _ = cv2.Rodrigues(np.array([0, 0, roll]))
    return rolled @ tilted


def _camera_matrix(fx: float, fy: float, size: tuple[int, int]) -> np.ndarray:
    return np.array([[fx, 0, (size[0] - 1) / 2], [0, fy, (size[1] - 1) / 2], [0, 0, 1.0]])


def photo_camera(photo_size: tuple[int, int], view_size: tuple[int, int], rng: np.random.Generator):
    """A camera in front of a photograph: K (3, 3), pose (4, 4), and the homography (3, 3) of photo to view pixels.

    photo_size, view_size: (w, h). The photograph is the plane z = 0 of the world, centred at its origin, and larger
    than the view by nothing where camera and scale are the plain ones.
    """
    photo, view = np.array(photo_size, np.float64), np.array(view_size, np.float64)
    fit = (view / photo).max()
    focal = _log_uniform(PHOTO_FOCAL, rng) * max(view_size)
    K = _camera_matrix(focal, focal, view_size)
    R = random_rotation(PHOTO_TILT, rng)
    target = np.append(rng.uniform(-PHOTO_SHIFT, PHOTO_SHIFT, 2) * photo * fit, 0)
    t = [0, 0, focal / _log_uniform(PHOTO_SCALE, rng)] - R @ target
    to_plane = np.array([[fit, 0, -fit * (photo[0] - 1) / 2], [0, fit, -fit * (photo[1] - 1) / 2], [0, 0, 1]])
    return K, make_pose(R, t), K @ np.c_[R[:, :2], t] @ to_plane


def photo_depth(keypoints: np.ndarray, K: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Depth (N,) of the plane z = 0 at keypoints (N, 2) of a camera; 0 where their rays do not meet it."""
    R, t = pose[:3, :3], pose[:3, 3]
    along = to_rays(keypoints, K) @ R[:, 2]  # the normal of the plane in camera coordinates is R[:, 2]
    with np.errstate(divide="ignore"):
        depth = (R[:, 2] @ t) / along
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0)


def turned_camera(K: np.ndarray, image_size: tuple[int, int], view_size: tuple[int, int], rng: np.random.Generator):
    """A camera K of an image, turned and zoomed: new K (3, 3), rotation (3, 3), homography (3, 3) of image to view.

    The view's pose is the rotation after the image's pose. image_size, view_size: (w, h).
    """
    R = random_rotation(SCENE_TILT, rng)
    zoom = _log_uniform(SCENE_ZOOM, rng) * max(view_size) / max(image_size)
    view_K = _camera_matrix(K[0, 0] * zoom, K[1, 1] * zoom, view_size)
    return view_K, R, view_K @ R @ np.linalg.inv(K)


def transform(points: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) through a homography (3, 3)."""
    moved = np.c_[points, np.ones(len(points))] @ H.T
    return moved[:, :2] / moved[:, 2:]


def warp(image: np.ndarray, H: np.ndarray, view_size: tuple[int, int], background=None) -> np.ndarray:
    """An image (H, W) or (H, W, 3) uint8 through the homography of its pixels to the view's, of size (w, h).

    Around it is the background (h, w) uint8, or its own mirror image: an even border would be full of keypoints.
    """
    w, h = view_size
    centre = np.array([[0, 0], [1, 0], [0, 1]]) + [(w - 1) / 2, (h - 1) / 2]
    origin, right, down = transform(centre, np.linalg.inv(H))
    pixels = np.sqrt(abs(np.linalg.det([right - origin, down - origin])))  # of the image, for one of the view
    if pixels > 1.25:  # bilinear resampling alone would alias
        size = [max(round(side / pixels), 8) for side in image.shape[1::-1]]
        scale_x, scale_y = image.shape[1] / size[0], image.shape[0] / size[1]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        H = H @ np.array([[scale_x, 0, (scale_x - 1) / 2], [0, scale_y, (scale_y - 1) / 2], [0, 0, 1]])
    if background is None:
        return cv2.warpPerspective(image, H, view_size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.warpPerspective(image, H, view_size, background.copy(), cv2.INTER_LINEAR, cv2.BORDER_TRANSPARENT)


def change_light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W) or (H, W, 3) uint8 as another camera in another light takes it.

    A shadow that falls off across the image (half of the time), contrast, exposure and gamma (always), blur (a third),
    noise (half) and JPEG (a third).
    """
    h, w = image.shape[:2]
    if rng.random() < 0.5:
        angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.7)
        centre, width = rng.uniform(-0.3, 0.3), rng.uniform(0.05, 0.5)
        across = (np.cos(angle) * np.linspace(-0.5, 0.5, w, dtype=np.float32)
                  + np.sin(angle) * np.linspace(-0.5, 0.5, h, dtype=np.float32)[:, None])
        light = 1 - strength / (1 + np.exp((across - centre) * (4 / width)))
        channels = image.shape[2] if image.ndim == 3 else 1
        image = cv2.multiply(image, cv2.merge([light] * channels), dtype=cv2.CV_8U)
    values = np.linspace(0, 1, 256)
    mean = image.mean() / 255
    values = np.clip((values - mean) * rng.uniform(0.6, 1.4) + mean, 0, 1)
    values = np.clip(values ** np.exp(rng.uniform(-0.4, 0.4)) * np.exp(rng.uniform(-0.4, 0.3)), 0, 1)
    image = cv2.LUT(image, np.rint(255 * values).astype(np.uint8))
    if rng.random() < 1 / 3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.5:
        noise = rng.standard_normal(image.shape, np.float32)
        image = cv2.add(image, noise * np.float32(rng.uniform(1, 8)), dtype=cv2.CV_8U)
    if rng.random() < 1 / 3:
        _, packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 95))])
        image = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
    return image
