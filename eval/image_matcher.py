"""Two images of one's own -> matches and relative pose, with a model that is loaded once."""
import itertools
import json
import sys
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from eval.iterative import IterationStep
from eval.methods import MATCHERS, MatcherSettings, Method, PoseEstimator, PoseSetting, to_data
from eval.pair_sets import EvalPair
from eval.peers import lightglue_is_installed
from tools import checkpoint
from tools.cli import InputError
from tools.distributed import choose_device
from tools.exif import read_exif
from tools.features import FEATURE_TYPES, Features, build_extractor
from tools.files import atomic_path, read_image
from tools.geometry import (
    is_camera_matrix,
    make_pose,
    relative_pose,
    resize_K,
    resize_keypoints,
    turn_K,
    turn_keypoints,
    turn_pose,
)
from tools.metrics import match_errors, pose_error
from tools.pose import translation_is_determined
from tools.visualize import VIEW_SIDE, Stage, draw_iterations, draw_matches, iteration_frames, shrink, write_gif

VERSION = 1  # of the npz and of its content
DOUBTFUL_INLIERS = 15  # of the demo's 100 pairs 13 had fewer; 12 of their poses were more than 5 degrees off


@dataclass
class LoadedImage:
    """An image ready to be matched.

    image_size (w, h) and keypoints (N, 2) float32 are for the image as stored; features are those of the image as it
    is matched: downscaled to `matched_size` (w, h), then turned by np.rot90(image, turns). picture: that image, gray or
    BGR, small enough to draw, and picture_keypoints (N, 2) in its pixels. focal: pixels of the image as stored, guessed
    from EXIF, or None.
    """

    name: str
    image_size: tuple[int, int]
    matched_size: tuple[int, int]
    turns: int
    keypoints: np.ndarray
    features: Features
    picture: np.ndarray
    picture_keypoints: np.ndarray
    focal: float | None

    def matched_K(self, K: np.ndarray | None) -> np.ndarray | None:
        """K (3, 3) of the image as stored -> of the image as it is matched."""
        if K is None:
            return None
        return turn_K(resize_K(K, *np.divide(self.matched_size, self.image_size)), self.matched_size, self.turns)


@dataclass
class ImageMatches:
    """What is known of a pair after matching; all for the images as stored, at full size.

    matches (M, 2) int64: indices into keypoints0 and keypoints1; matching_scores (M,). K0, K1 (3, 3) or None;
    K_source0/1: "given", "EXIF" or "unknown". R (3, 3), t (3,) of unit length: x1 = R x0 + t, or None; inliers (M,)
    bool, all False without a pose. T_0to1 (4, 4): the true pose, where it was given. n_iterations: that a network ran,
    of n_layers that it has. stopped_early, steps: of iterative matching (eval.iterative), with poses for the images as
    stored; the matches are then the inliers alone if it stopped early. translation_determined: False where the camera
    turned on the spot, as far as the inliers tell, so that t means nothing.
    """

    view0: LoadedImage
    view1: LoadedImage
    matches: np.ndarray
    matching_scores: np.ndarray
    K0: np.ndarray | None
    K1: np.ndarray | None
    K_source0: str
    K_source1: str
    R: np.ndarray | None
    t: np.ndarray | None
    inliers: np.ndarray
    T_0to1: np.ndarray | None = None
    n_iterations: int | None = None
    n_layers: int | None = None
    stopped_early: bool = False
    steps: list[IterationStep] = field(default_factory=list)
    translation_determined: bool = True

    @property
    def keypoints0(self) -> np.ndarray:
        """(N0, 2) float32."""
        return self.view0.keypoints

    @property
    def keypoints1(self) -> np.ndarray:
        """(N1, 2) float32."""
        return self.view1.keypoints

    def draw(self) -> np.ndarray:
        """Picture of the matches, BGR (H, W, 3): by epipolar error where the true pose is known, else score."""
        title = [f"{self.view0.name}   {self.view1.name}", describe_pose(self)]
        errors, (rows0, rows1) = None, self.matches.T
        if self.T_0to1 is not None and self.K0 is not None:
            errors = match_errors(self.keypoints0[rows0], self.keypoints1[rows1], self.K0, self.K1, self.T_0to1)
        return draw_matches(self.view0.picture, self.view1.picture, self.view0.picture_keypoints[rows0],
                            self.view1.picture_keypoints[rows1], title, errors, self.matching_scores)

    def stages(self) -> list[Stage]:
        """The input, the iterations and the result, for tools.visualize; InputError if matching was not iterative."""
        if not self.steps:
            raise InputError(f"no iterations to draw of {self.view0.name} {self.view1.name}: they take a network, both "
                             "K, and keypoints in both images")
        stages = [Stage("two images", np.arange(len(self.keypoints0)), np.arange(len(self.keypoints1)))]
        reference = self.T_0to1
        for step in self.steps:
            title, matches, pose = f"iteration {step.iteration + 1}", step.matches, step.pose
            inliers = np.zeros(len(matches), bool) if pose is None else pose[2]
            if step is self.steps[-1]:
                title, matches, inliers = f"{title} of {self.n_layers}: result", self.matches, self.inliers
                pose = None if self.R is None else (self.R, self.t)
            errors = None if pose is not None else (np.inf, np.inf)
            if pose is not None and reference is not None:
                error_t, error_R = pose_error(reference, *pose[:2])
                errors = error_R, error_t
            stages.append(Stage(title, step.kept0, step.kept1, matches, inliers, errors))
            if self.T_0to1 is None:  # then the change from one pose to the next
                reference = None if pose is None else make_pose(*pose[:2])
        return stages

    def draw_iterations(self, max_stages: int | None = None) -> np.ndarray:
        """The strip of iterations (tools.visualize.draw_iterations), BGR; of max_stages, evenly chosen, at most."""
        stages = self.stages()
        if max_stages is not None and max_stages < len(stages):
            stages = [stages[i] for i in np.linspace(0, len(stages) - 1, max_stages).round().astype(int)]
        return draw_iterations(*self._pictures(), stages, self._error_name())

    def write_iterations_gif(self, path) -> None:
        """The iterations as an animated GIF, atomically."""
        write_gif(path, iteration_frames(*self._pictures(), self.stages(), self._error_name()))

    def _pictures(self) -> tuple:
        return self.view0.picture, self.view1.picture, self.view0.picture_keypoints, self.view1.picture_keypoints

    def _error_name(self) -> str:
        return "change" if self.T_0to1 is None else "error"

    def save(self, path, settings: dict | None = None) -> None:
        """Write the npz that docs/formats.md describes, atomically; settings: what made it."""
        unknown = np.full((3, 3), np.nan)
        arrays = {"version": VERSION, "matches": self.matches, "matching_scores": self.matching_scores,
                  "inliers": self.inliers, "R": unknown if self.R is None else self.R,
                  "t": unknown[0] if self.t is None else self.t,
                  "translation_determined": self.translation_determined, "settings": json.dumps(settings or {})}
        for v, view, K, source in (("0", self.view0, self.K0, self.K_source0),
                                   ("1", self.view1, self.K1, self.K_source1)):
            arrays |= {f"image{v}": view.name, f"image_size{v}": np.array(view.image_size), f"turns{v}": view.turns,
                       f"keypoints{v}": view.keypoints, f"scores{v}": view.features.scores,
                       f"K{v}": unknown if K is None else K, f"K_source{v}": source}
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **arrays)


def describe_pose(found: ImageMatches) -> str:
    """One line on the pose of a pair, and its errors where the truth is known."""
    if found.R is None:
        return "no pose found" if found.K0 is not None and found.K1 is not None else "no pose: K is not known"
    angle = np.degrees(np.linalg.norm(cv2.Rodrigues(found.R)[0]))
    direction = ", ".join(f"{value:.2f}" for value in found.t) if found.translation_determined else "not determined"
    n_inliers = int(np.sum(found.inliers))
    line = f"{n_inliers} inliers; rotation {angle:.1f} degrees, translation ({direction})"
    if found.T_0to1 is not None:
        error_t, error_R = pose_error(found.T_0to1, found.R, found.t)
        line += f"; {error_R:.1f}{f' and {error_t:.1f}' if found.translation_determined else ''} degrees off"
    if not found.translation_determined:
        line += "; a rotation alone explains the matches"
    elif found.T_0to1 is None and n_inliers < DOUBTFUL_INLIERS:
        line += "; doubtful, with so few inliers"
    return line


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
    there is one), cpu, cuda or cuda:N. feature_weights: a file for the network of the features.
    """

    def __init__(self, matching_method: str | None = None, feature_type: str | None = None, weights=None,
                 resize: int = 1600, max_keypoints: int = 2000, estimator: str = "poselib", threshold: float = 1.0,
                 one_shot: bool = False, seed: int = 0, device: str = "auto", feature_weights=None):
        device = str(choose_device(device))
        method, feature_type, weights = choose_model(matching_method, feature_type, weights)
        extractor = {**FEATURE_TYPES[feature_type].eval_settings, "max_keypoints": max_keypoints}
        extractor |= {key: True for key in ("unique_locations",) if key in extractor}
        self.matcher = MATCHERS[method](MatcherSettings(feature_type=feature_type, weights=weights, device=device))
        self.extractor = build_extractor(feature_type, feature_weights, device=device, **extractor)
        self.resize, self.one_shot, self.device = resize, one_shot, device
        self.pose_setting = PoseSetting(estimator, threshold, seed)
        self.settings = {"version": VERSION, "matching_method": method, "feature_type": feature_type,
                         "weights": weights, "resize": resize, "max_keypoints": max_keypoints, "estimator": estimator,
                         "threshold": threshold, "one_shot": one_shot, "seed": seed}
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
            image = image.reshape(image.shape[:2]) if one_channel else image
            if one_channel == self.extractor.color:
                image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR if one_channel else cv2.COLOR_BGR2GRAY)
            name, turns = name or "array", turns or 0
        else:
            image, exif, name = read_image(image, self.extractor.color), read_exif(image), name or str(image)
            turns, focal = exif.turns if turns is None else turns, exif.focal
        image_size = image.shape[1], image.shape[0]
        image = shrink(image, self.resize)
        matched_size = image.shape[1], image.shape[0]
        upright = np.ascontiguousarray(np.rot90(image, turns))
        picture, features = shrink(upright, VIEW_SIDE), self.extractor(upright)
        on_picture = resize_keypoints(features.keypoints, *np.divide(picture.shape[1::-1], features.image_size))
        keypoints = turn_keypoints(features.keypoints, features.image_size, -turns)
        keypoints = resize_keypoints(keypoints, *np.divide(image_size, matched_size)).astype(np.float32)
        return LoadedImage(name, image_size, matched_size, turns, keypoints, features, picture, on_picture, focal)

    def match(self, view0: LoadedImage, view1: LoadedImage, K0=None, K1=None, T_0to1=None) -> ImageMatches:
        """Match two images.

        K0, K1 (3, 3): of the images as stored; None: guessed from EXIF. T_0to1 (4, 4): the true pose, for pictures.
        """
        (K0, K_source0), (K1, K_source1) = _camera(view0, K0), _camera(view1, K1)
        pair = EvalPair(0, (view0.name, view1.name), (view0.name, view1.name), view0.features, view1.features,
                        view0.matched_K(K0), view1.matched_K(K1))
        has_cameras = K0 is not None and K1 is not None
        method = Method(self.matcher, iterative=self.matcher.iterates and has_cameras and not self.one_shot)
        (found,) = method.match(to_data(pair, self.device), [PoseEstimator(pair, self.pose_setting)])
        determined = True
        if found.pose is not None:
            inliers = pair.matched_keypoints(found.matches[found.pose[2]])
            determined = translation_is_determined(*inliers, pair.K0, pair.K1, found.pose[0],
                                                   self.pose_setting.threshold)
        R, t, inliers = _as_stored(found.pose, view0, view1) or (None, None, np.zeros(len(found.matches), bool))
        steps = [replace(step, pose=_as_stored(step.pose, view0, view1)) for step in found.steps]
        return ImageMatches(view0, view1, found.matches, found.scores, K0, K1, K_source0, K_source1, R, t, inliers,
                            T_0to1, found.n_iterations, self.matcher.n_layers, bool(found.stopped_early), steps,
                            determined)

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
