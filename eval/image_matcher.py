"""Two images of one's own -> matches and relative pose, with a model that is loaded once."""
import itertools
import sys
import time
from dataclasses import replace

import cv2
import numpy as np

from eval.image_matches import VERSION, ImageMatches, LoadedImage
from eval.methods import MATCHERS, MatcherSettings, Method, PoseEstimator, PoseSetting, to_data
from eval.pair_sets import EvalPair
from eval.peers import lightglue_is_installed
from tools import checkpoint
from tools.cli import InputError
from tools.distributed import choose_device
from tools.exif import read_exif
from tools.features import FEATURE_TYPES, build_extractor
from tools.files import read_image
from tools.geometry import is_camera_matrix, make_pose, relative_pose, resize_keypoints, turn_keypoints, turn_pose
from tools.pose import pose_uncertainty, translation_is_determined
from tools.precision import check_precision
from tools.two_view import estimate_fundamental, homography_explains
from tools.visualize import VIEW_SIDE, shrink


def choose_model(matching_method: str | None, feature_type: str | None, weights) -> tuple[str, str, str | None]:
    """The method, the features and the weights that stand for what was left open (None): the best on hand.

    Published weights first: IMP before EIMP; SuperPoint, where its weights and a matcher's for it are there, before
    SIFT. Then LightGlue with ALIKED, if both are installed, and then our own weights. Weights of the user's say which
    features they are for. InputError if there are none on hand.
    """
    if matching_method is not None and not MATCHERS[matching_method].takes_weights:
        return matching_method, feature_type or "sift", None
    if matching_method is not None and MATCHERS[matching_method].feature_types:  # those of others
        return matching_method, feature_type or MATCHERS[matching_method].default_feature_type, weights
    if weights is not None:
        content = checkpoint.load_checkpoint(weights)
        described = checkpoint.describe_weights(content["model"])
        dims = {kind.dim: name for name, kind in reversed(FEATURE_TYPES.items())}
        feature_type = feature_type or dims.get(described.get("descriptor_dim"), "sift")
        if matching_method is None:
            config = content.get("config")
            trained = str((config if isinstance(config, dict) else content).get("network"))
            names = {"gm": "GM", "eimp": "EIMP", "adagmn": "EIMP"}
            matching_method = names.get(trained) or names.get(described.get("network"), "IMP")
        return matching_method, feature_type, str(weights)
    features = [name for name, kind in reversed(FEATURE_TYPES.items())
                if not kind.weights_file or checkpoint.find_weights(kind.weights_file).is_file()]
    features = features if feature_type is None else [feature_type]
    methods = ["IMP", "EIMP"] if matching_method is None else [matching_method]
    pairs = list(itertools.product(features, methods))
    if matching_method is None and feature_type is None:
        published = [(feature, method) for feature, method in pairs
                     if checkpoint.find_weights(f"{method.lower()}_{feature}.pth").is_file()]
        if not published and lightglue_is_installed():
            print("no published weights of IMP in weights/: taking LightGlue with ALIKED", file=sys.stderr)
            return "LightGlue", "aliked", None
        pairs = published or pairs
    reasons = []
    for feature, method in pairs:
        try:
            return method, feature, str(checkpoint.default_weights(method, feature))
        except InputError as error:
            reasons.append(str(error))
    raise InputError(f"{reasons[-len(methods)]}; --matching_method NN_ratio needs none")


class ImageMatcher:
    """Matches images with one method, loaded once.

    matching_method, feature_type, weights: None is the best on hand (`choose_model`). resize: longer side at which
    images are matched, at most; no image is enlarged. max_keypoints: of an image. estimator: of the pose, a key of
    tools.pose.ESTIMATORS; threshold: of its inliers, in pixels of the images as they are matched. one_shot: no poses on
    the way, and all matches of the last iteration returned, rather than iterative matching. device: auto (a GPU if
    there is one), cpu, cuda or cuda:N. feature_weights: a file for the network of the features. precision: of the
    matching network's layers, one of tools.precision.PRECISIONS.
    """

    def __init__(self, matching_method: str | None = None, feature_type: str | None = None, weights=None,
                 resize: int = 1600, max_keypoints: int = 2000, estimator: str = "poselib", threshold: float = 1.0,
                 one_shot: bool = False, seed: int = 0, device: str = "auto", feature_weights=None,
                 precision: str = "float32"):
        device = choose_device(device)
        method, feature_type, weights = choose_model(matching_method, feature_type, weights)
        extractor = {**FEATURE_TYPES[feature_type].eval_settings, "max_keypoints": max_keypoints}
        extractor |= {key: True for key in ("unique_locations",) if key in extractor}
        precision = check_precision(precision, device) if MATCHERS[method].takes_weights else "float32"
        device = str(device)
        self.matcher = MATCHERS[method](MatcherSettings(feature_type=feature_type, weights=weights, device=device,
                                                        precision=precision))
        self.extractor = build_extractor(feature_type, feature_weights, device=device, **extractor)
        self.resize, self.one_shot, self.device = resize, one_shot, device
        self.pose_setting = PoseSetting(estimator, threshold, seed)
        self.settings = {"version": VERSION, "matching_method": method, "feature_type": feature_type,
                         "weights": weights, "resize": resize, "max_keypoints": max_keypoints, "estimator": estimator,
                         "threshold": threshold, "one_shot": one_shot, "seed": seed, "precision": precision}
        if feature_weights is not None:
            self.settings["feature_weights"] = str(feature_weights)

    def load(self, image, turns: int | None = None, name: str | None = None) -> LoadedImage:
        """Read an image and extract its features.

        image: a path, or an array (H, W) or (H, W, 3) BGR uint8. turns: np.rot90 turns that make it upright; None: as
        the EXIF data of the file say. name: what to call it, if not by its path. InputError if it cannot be read.
        """
        focal = None
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.size == 0 or image.ndim < 2 or image.shape[2:] not in ((), (1,), (3,)):
                raise InputError(f"an image is an array (H, W) or (H, W, 3) BGR of uint8, not {image.shape} of "
                                 f"{image.dtype}")
            one_channel = image.shape[2:] != (3,)
            image = picture = image.reshape(image.shape[:2]) if one_channel else image
            if one_channel == self.extractor.color:
                image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR if one_channel else cv2.COLOR_BGR2GRAY)
            name, turns = name or "array", turns or 0
        else:
            path, exif, name = image, read_exif(image), name or str(image)
            image = read_image(path, self.extractor.color)
            picture = image if self.extractor.color else read_image(path, color=True)
            turns, focal = exif.turns if turns is None else turns, exif.focal
        image_size = image.shape[1], image.shape[0]
        image = shrink(image, self.resize)
        matched_size = image.shape[1], image.shape[0]
        upright = np.ascontiguousarray(np.rot90(image, turns))
        picture, features = np.ascontiguousarray(np.rot90(shrink(picture, VIEW_SIDE), turns)), self.extractor(upright)
        on_picture = resize_keypoints(features.keypoints, *np.divide(picture.shape[1::-1], features.image_size))
        keypoints = turn_keypoints(features.keypoints, features.image_size, -turns)
        keypoints = resize_keypoints(keypoints, *np.divide(image_size, matched_size)).astype(np.float32)
        return LoadedImage(name, image_size, matched_size, turns, keypoints, features, picture, on_picture, focal)

    def match(self, view0: LoadedImage, view1: LoadedImage, K0=None, K1=None, T_0to1=None) -> ImageMatches:
        """Match two images.

        K0, K1 (3, 3): of the images as stored; None: guessed from EXIF. T_0to1 (4, 4): the true pose, for pictures.
        """
        start = time.perf_counter()
        (K0, K_source0), (K1, K_source1) = _camera(view0, K0), _camera(view1, K1)
        pair = EvalPair(0, (view0.name, view1.name), (view0.name, view1.name), view0.features, view1.features,
                        view0.matched_K(K0), view1.matched_K(K1))
        has_cameras = K0 is not None and K1 is not None
        method = Method(self.matcher, iterative=self.matcher.iterates and has_cameras and not self.one_shot)
        (found,) = method.match(to_data(pair, self.device), [PoseEstimator(pair, self.pose_setting)])
        result = ImageMatches(
            view0, view1, found.matches, found.scores, K0, K1, K_source0, K_source1,
            np.zeros(len(found.matches), bool), T_0to1=T_0to1, n_iterations=found.n_iterations,
            n_layers=self.matcher.n_layers, trusted_share=self.matcher.trusted_share,
            stopped_early=bool(found.stopped_early),
            steps=[replace(step, pose=_as_stored(step.pose, view0, view1)) for step in found.steps])
        threshold, seed = self.pose_setting.threshold, self.pose_setting.seed
        fundamental = None
        if found.pose is not None:
            result.R, result.t, result.inliers = _as_stored(found.pose, view0, view1)
        elif not has_cameras:
            fundamental = estimate_fundamental(*pair.matched_keypoints(found.matches), threshold, seed)
            result.inliers = result.inliers if fundamental is None else fundamental[1]
        if result.inliers.any():
            points = pair.matched_keypoints(found.matches[result.inliers])
            result.planar = homography_explains(*points, threshold, seed)
            if fundamental is None:
                R, t, _ = found.pose
                result.translation_determined = translation_is_determined(*points, pair.K0, pair.K1, R, threshold)
                result.rotation_uncertainty, result.direction_uncertainty = pose_uncertainty(
                    *points, pair.K0, pair.K1, R, t)
            else:
                result.translation_determined = not result.planar
                F = view1.to_matched().T @ fundamental[0] @ view0.to_matched()
                result.F = None if result.planar else F / np.linalg.norm(F)
        result.seconds = time.perf_counter() - start
        return result

    def __call__(self, image0, image1, K0=None, K1=None) -> ImageMatches:
        """Match two images: paths or arrays, see `load` and `match`."""
        return self.match(self.load(image0), self.load(image1), K0, K1)


def _camera(view: LoadedImage, K) -> tuple[np.ndarray | None, str]:
    """K (3, 3) of an image and where it comes from: as given, or guessed from EXIF, or None."""
    if K is None:
        return (None, "unknown") if view.focal is None else (focal_K(view.focal, view.image_size), "EXIF")
    try:
        K = np.asarray(K, np.float64)
    except (TypeError, ValueError):
        K = np.zeros(0)
    if K.shape != (3, 3) or not is_camera_matrix(K):
        raise InputError("K is not a camera matrix: expected (3, 3) with fx 0 cx, 0 fy cy, 0 0 1 and fx, fy > 0; shape "
                         f"{K.shape}")
    return K, "given"


def focal_K(focal: float, image_size: tuple[int, int]) -> np.ndarray:
    """K (3, 3) of a focal length in pixels, with the principal point in the middle of an image (w, h)."""
    w, h = image_size
    return np.array([[focal, 0, (w - 1) / 2], [0, focal, (h - 1) / 2], [0, 0, 1.0]])


def _as_stored(pose: tuple | None, view0: LoadedImage, view1: LoadedImage) -> tuple | None:
    """A pose R, t, ... of the upright views -> of the images as stored."""
    if pose is None:
        return None
    T_0to1 = relative_pose(turn_pose(np.eye(4), -view0.turns), turn_pose(make_pose(*pose[:2]), -view1.turns))
    return T_0to1[:3, :3], T_0to1[:3, 3], *pose[2:]
