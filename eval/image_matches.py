"""Images ready to be matched, and what is known of a pair after matching: its verdict, pictures and file."""
import json
from dataclasses import dataclass, field

import cv2
import numpy as np

from eval.iterative import IterationStep
from tools.cli import InputError
from tools.features import Features
from tools.files import atomic_path
from tools.geometry import make_pose, resize_K, resize_keypoints, turn_K, turn_keypoints
from tools.metrics import match_errors, pose_error
from tools.visualize import Stage, draw_iterations, draw_matches, iteration_frames, write_gif

VERSION = 3  # of the npz and of its content
# of unrelated images, 26 was the most; of many random matches, 1% agree with some pose and 2% with some F
# (docs/own_images.md)
TRUSTED_INLIERS, TRUSTED_SHARE = 30, 0.05
KNOWN = 10.0  # degrees: a rotation, or the direction of a translation, that is more uncertain is not made use of


@dataclass
class LoadedImage:
    """An image ready to be matched.

    image_size (w, h) and keypoints (N, 2) float32 are for the image as stored; features are those of the image as it
    is matched: downscaled to `matched_size` (w, h), then turned by np.rot90(image, turns). picture: the turned image,
    gray or BGR, small enough to draw, and picture_keypoints (N, 2) in its pixels. focal: pixels of the image as stored,
    guessed from EXIF, or None.
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

    def to_matched(self) -> np.ndarray:
        """(3, 3): homogeneous pixels of the image as stored -> of the image as it is matched."""
        axes = np.array([[0.0, 0], [1, 0], [0, 1]])
        axes = resize_keypoints(axes, *np.divide(self.matched_size, self.image_size))
        origin, x, y = turn_keypoints(axes, self.matched_size, self.turns)
        return np.vstack([np.c_[x - origin, y - origin, origin], [0, 0, 1]])


@dataclass
class ImageMatches:
    """What is known of a pair after matching; all for the images as stored, at full size.

    matches (M, 2) int64: indices into keypoints0 and keypoints1; matching_scores (M,). K0, K1 (3, 3) or None;
    K_source0/1: "given", "EXIF" or "unknown". R (3, 3), t (3,) of unit length: x1 = R x0 + t, or None; without both K a
    fundamental matrix F (3, 3) instead, x1^T F x0 = 0, or None. inliers (M,) bool, of either. T_0to1 (4, 4): the true
    pose, where it was given. n_iterations: that a network ran, of n_layers that it has. stopped_early, steps: of
    iterative matching (eval.iterative), with poses for the images as stored; the matches are then the inliers alone if
    it stopped early. planar: one homography explains the inliers, which lie on a plane, or the camera turned on the
    spot; without K there is no F then. translation_determined: False where the camera turned on the spot, as far as the
    inliers tell, so that t means nothing. rotation_uncertainty, direction_uncertainty: degrees that R and the direction
    of t may be off, of a pose (`tools.pose.pose_uncertainty`). seconds: of matching and estimation. trusted_share: of
    the matcher (`eval.methods.Matcher`).
    """

    view0: LoadedImage
    view1: LoadedImage
    matches: np.ndarray
    matching_scores: np.ndarray
    K0: np.ndarray | None
    K1: np.ndarray | None
    K_source0: str
    K_source1: str
    inliers: np.ndarray
    R: np.ndarray | None = None
    t: np.ndarray | None = None
    F: np.ndarray | None = None
    T_0to1: np.ndarray | None = None
    n_iterations: int | None = None
    n_layers: int | None = None
    stopped_early: bool = False
    steps: list[IterationStep] = field(default_factory=list)
    translation_determined: bool = True
    rotation_uncertainty: float | None = None
    direction_uncertainty: float | None = None
    planar: bool = False
    seconds: float = 0.0
    trusted_share: float = 0.0

    @property
    def keypoints0(self) -> np.ndarray:
        """(N0, 2) float32."""
        return self.view0.keypoints

    @property
    def keypoints1(self) -> np.ndarray:
        """(N1, 2) float32."""
        return self.view1.keypoints

    @property
    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Matches (M, 2) with those that were rejected, also where `matches` has none of them, and inliers (M,)."""
        return (self.steps[-1].matches, self.steps[-1].pose[2]) if self.stopped_early else (self.matches, self.inliers)

    @property
    def verdict(self) -> str:
        """"trusted", "doubtful", or "none" where nothing was found; `remark` says why."""
        if not self.inliers.any():
            return "none"
        unknown_pose = self.R is not None and not self.knows_rotation
        return "doubtful" if unknown_pose or self._has_few_inliers() else "trusted"

    @property
    def knows_rotation(self) -> bool:
        """Whether there is a pose that the inliers determine, but maybe for the direction of translation."""
        two_poses = self.planar and self.translation_determined
        return self.R is not None and not two_poses and self.rotation_uncertainty <= KNOWN

    @property
    def knows_direction(self) -> bool:
        """Whether there is a pose of which the direction of translation means something, too."""
        return self.knows_rotation and self.translation_determined and self.direction_uncertainty <= KNOWN

    @property
    def remark(self) -> str:
        """What to know of the verdict, or an empty string."""
        if not self.inliers.any():
            return "no pose found" if self.K0 is not None and self.K1 is not None else "no fundamental matrix found"
        remarks = ["so few inliers may agree by chance"] if self._has_few_inliers() else []
        if not self.translation_determined and self.R is not None:
            remarks.append("a rotation alone explains the matches")
        elif self.planar and not remarks:  # a plane explains few inliers in any case
            remarks.append("a plane, or a rotation alone, explains the matches: the translation is not determined"
                           if self.R is None else
                           "a plane explains the matches: two poses fit, and this is one of them")
        if self.R is not None and self.rotation_uncertainty > KNOWN:
            remarks.append(f"the rotation may be {self.rotation_uncertainty:.0f} degrees off")
        elif self.knows_rotation and self.translation_determined and not self.knows_direction:
            remarks.append(f"the direction of the translation may be {self.direction_uncertainty:.0f} degrees off")
        return "; ".join(remarks)

    @property
    def least_inliers(self) -> float:
        """Fewer inliers may agree by chance."""
        n_keypoints = min(len(self.keypoints0), len(self.keypoints1))
        return max(TRUSTED_INLIERS, TRUSTED_SHARE * len(self.candidates[0]), self.trusted_share * n_keypoints)

    def _has_few_inliers(self) -> bool:
        return np.sum(self.inliers) < self.least_inliers

    def summary(self) -> dict:
        """The pair's line of pairs.csv."""
        matches, inliers = self.candidates
        errors = (None, None) if self.R is None or self.T_0to1 is None else pose_error(self.T_0to1, self.R, self.t)
        return {"image0": self.view0.name, "image1": self.view1.name, "verdict": self.verdict, "remark": self.remark,
                "keypoints0": len(self.keypoints0), "keypoints1": len(self.keypoints1), "matches": len(matches),
                "inliers": int(np.sum(inliers)), "K_source0": self.K_source0, "K_source1": self.K_source1,
                "rotation": None if self.R is None else round(rotation_angle(self.R), 2),
                "translation_determined": None if self.verdict == "none" else self.translation_determined,
                "rotation_uncertainty": self.rotation_uncertainty and round(self.rotation_uncertainty, 1),
                "direction_uncertainty": self.direction_uncertainty and round(self.direction_uncertainty, 1),
                "error_R": errors[1], "error_t": errors[0],
                "iterations": self.n_iterations, "layers": self.n_layers, "seconds": round(self.seconds, 3)}

    def draw(self) -> np.ndarray:
        """Picture of the matches, BGR (H, W, 3): by epipolar error where the true pose is known, else inliers."""
        title = [f"{self.view0.name}   {self.view1.name}", describe_pose(self)]
        matches, inliers = self.candidates
        errors, (rows0, rows1) = None, matches.T
        if self.T_0to1 is not None and self.K0 is not None:
            errors = match_errors(self.keypoints0[rows0], self.keypoints1[rows1], self.K0, self.K1, self.T_0to1)
        return draw_matches(self.view0.picture, self.view1.picture, self.view0.picture_keypoints[rows0],
                            self.view1.picture_keypoints[rows1], title, errors, inliers)

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
                  "t": unknown[0] if self.t is None else self.t, "F": unknown if self.F is None else self.F,
                  "translation_determined": self.translation_determined, "planar": self.planar,
                  "verdict": self.verdict, "summary": json.dumps(self.summary()),
                  "settings": json.dumps(settings or {})}
        for v, view, K, source in (("0", self.view0, self.K0, self.K_source0),
                                   ("1", self.view1, self.K1, self.K_source1)):
            arrays |= {f"image{v}": view.name, f"image_size{v}": np.array(view.image_size), f"turns{v}": view.turns,
                       f"keypoints{v}": view.keypoints, f"scores{v}": view.features.scores,
                       f"K{v}": unknown if K is None else K, f"K_source{v}": source}
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **arrays)


def rotation_angle(R: np.ndarray) -> float:
    """Of a rotation (3, 3), in degrees."""
    return float(np.degrees(np.linalg.norm(cv2.Rodrigues(R)[0])))


def describe_pose(found: ImageMatches) -> str:
    """One line on the pose of a pair, and its errors where the truth is known."""
    parts = [f"{found.verdict}: {int(np.sum(found.inliers))} inliers"]
    if found.R is not None:
        direction = ", ".join(f"{value:.2f}" for value in found.t) if found.translation_determined else "not determined"
        parts.append(f"rotation {rotation_angle(found.R):.1f} degrees, translation ({direction})")
        if found.T_0to1 is not None:
            error_t, error_R = pose_error(found.T_0to1, found.R, found.t)
            parts.append(f"{error_R:.1f}{f' and {error_t:.1f}' if found.translation_determined else ''} degrees off")
    elif found.K0 is None or found.K1 is None:
        parts.append("no pose: K is not known")
    return "; ".join(filter(None, [*parts, found.remark]))
