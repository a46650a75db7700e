"""A COLMAP database, filled an image and a pair at a time, and read back."""
import os

import cv2
import numpy as np

from eval.image_matches import ImageMatches, LoadedImage
from tools.cli import InputError
from tools.extras import import_pycolmap
from tools.features import FEATURE_TYPES, Features
from tools.geometry import colmap_to_opencv_K, essential_matrix, make_pose, opencv_to_colmap_K, resize_keypoints


def known_K(camera) -> np.ndarray | None:
    """K (3, 3) of a pycolmap.Camera in OpenCV's convention; None if its focal length is a guess, or it is distorted."""
    distortion = np.asarray(camera.params)[list(camera.extra_params_idxs())]
    if not camera.has_prior_focal_length or distortion.any():
        return None
    return colmap_to_opencv_K(camera.calibration_matrix())


class Database:
    """A COLMAP database that is filled an image and a pair at a time, each whole or not at all.

    folder and all that makes a camera -> camera id: `cameras`; name -> image id: `ids`.
    """

    def __init__(self, path):
        self.colmap = import_pycolmap()
        self.db = self.colmap.Database.open(path)
        images = sorted(self.db.read_all_images(), key=lambda image: image.image_id)
        self.ids = {image.name: image.image_id for image in images}
        self.camera_ids = {image.name: image.camera_id for image in images}
        self.cameras = {camera.camera_id: camera for camera in self.db.read_all_cameras()}
        self.shared = {self._key(image.name, self.cameras[image.camera_id]): image.camera_id for image in images}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.db.close()

    @staticmethod
    def _key(name: str, camera) -> tuple:
        return (os.path.dirname(name), camera.model, camera.width, camera.height, tuple(camera.params),
                camera.has_prior_focal_length)

    def camera(self, name: str):
        return self.cameras[self.camera_ids[name]]

    def add_image(self, view: LoadedImage, camera, feature_type: str) -> None:
        """Write an image; it shares its camera with those of its folder that have the same."""
        colmap, db, name, image_id = self.colmap, self.db, view.name, len(self.ids) + 1
        key = self._key(name, camera)
        with colmap.DatabaseTransaction(db):
            if key not in self.shared:
                camera.camera_id = self.shared[key] = db.write_camera(camera)
                self.cameras[camera.camera_id] = camera
                rig = colmap.Rig(rig_id=camera.camera_id)
                rig.add_ref_sensor(camera.sensor_id)
                db.write_rig(rig, use_rig_id=True)
            camera_id = self.shared[key]
            image = colmap.Image(name=name, camera_id=camera_id, image_id=image_id)
            db.write_image(image, use_image_id=True)
            frame = colmap.Frame(rig_id=camera_id, frame_id=image_id)
            frame.add_data_id(image.data_id)
            db.write_frame(frame, use_frame_id=True)
            db.write_keypoints(image_id, view.keypoints + np.float32(0.5))
            db.write_descriptors(image_id, self._stored_descriptors(view.features.descriptors, feature_type))
        self.ids[name], self.camera_ids[name] = image_id, camera_id

    def _stored_descriptors(self, descriptors: np.ndarray, feature_type: str):
        kinds = self.colmap.FeatureExtractorType
        if feature_type == "sift":  # as COLMAP's L1_ROOT
            return self.colmap.FeatureDescriptors(
                type=kinds.SIFT, data=np.clip(np.round(512 * descriptors), 0, 255).astype(np.uint8))
        data = np.ascontiguousarray(descriptors, np.float32)
        return self.colmap.FeatureDescriptors(type=kinds.UNDEFINED, data=data.view(np.uint8))

    def descriptors(self, name: str, dim: int) -> np.ndarray:
        """(N, dim) float32 of unit length; InputError if the database holds none of this width."""
        stored = self.db.read_descriptors(self.ids[name])
        data = np.ascontiguousarray(stored.data)
        is_sift = stored.type == self.colmap.FeatureExtractorType.SIFT
        if data.shape[1] != (dim if is_sift else 4 * dim):
            raise InputError(f"its descriptors have {data.shape[1]} bytes and are of type {stored.type.name}: see "
                             "--feature_type")
        values = data.astype(np.float32) if is_sift else data.view(np.float32)
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    def load(self, name: str, feature_type: str, resize: int) -> LoadedImage:
        """An image with the keypoints and descriptors that are there, for matching. Their scores are not: they are 0.

        resize: as the `ImageMatcher`'s, so that thresholds in pixels mean the same.
        """
        if name not in self.ids:
            raise InputError("it is not in the database")
        camera = self.camera(name)
        size = camera.width, camera.height
        scale = min(1.0, resize / max(size))
        matched_size = tuple(max(1, round(side * scale)) for side in size)
        keypoints = np.ascontiguousarray(self.db.read_keypoints(self.ids[name])[:, :2]) - np.float32(0.5)
        descriptors = self.descriptors(name, FEATURE_TYPES[feature_type].dim)
        if len(keypoints) != len(descriptors):
            raise InputError(f"it has {len(keypoints)} keypoints and {len(descriptors)} descriptors")
        matched = resize_keypoints(keypoints, *np.divide(matched_size, size)).astype(np.float32)
        features = Features(matched, np.zeros(len(keypoints), np.float32), descriptors, matched_size)
        return LoadedImage(name, size, matched_size, 0, keypoints, features, np.zeros((1, 1), np.uint8), matched, None)

    def has_keypoints(self, view: LoadedImage) -> bool:
        """Whether the keypoints of an image are those that are stored."""
        stored = self.db.read_keypoints(self.ids[view.name])[:, :2]
        return np.array_equal(stored, view.keypoints + np.float32(0.5))

    def counts(self) -> list[int]:
        """Numbers of images and of pairs, which tell states of a growing database apart."""
        return [len(self.ids), len(self.db.read_num_matches()[0])]

    def has_pair(self, name0: str, name1: str) -> bool:
        return self.db.exists_matches(self.ids[name0], self.ids[name1])

    def add_pair(self, name0: str, name1: str, matches: np.ndarray, geometry) -> None:
        """Write a pair; geometry: pycolmap.TwoViewGeometry or None. The matches come last and say that it is done."""
        ids = self.ids[name0], self.ids[name1]
        with self.colmap.DatabaseTransaction(self.db):
            if geometry is not None:
                self.db.write_two_view_geometry(*ids, geometry)
            self.db.write_matches(*ids, matches.astype(np.uint32))


def two_view_geometry(found: ImageMatches, camera0, camera1, min_inliers: int, seed: int):
    """The pycolmap.TwoViewGeometry of a matched pair, or None if it has too few inliers.

    From our pose where both cameras are known: without one where the inliers do not determine it, and with a
    translation of 0 where they do not determine its direction. Else as COLMAP verifies matches.
    """
    colmap = import_pycolmap()
    K0, K1 = known_K(camera0), known_K(camera1)
    points = [keypoints.astype(np.float64) + 0.5 for keypoints in (found.keypoints0, found.keypoints1)]
    if K0 is None or K1 is None:
        options = colmap.TwoViewGeometryOptions(min_num_inliers=min_inliers)
        options.ransac.random_seed = seed
        geometry = colmap.estimate_two_view_geometry(camera0, points[0], camera1, points[1],
                                                     found.matches.astype(np.uint32), options)
        return geometry if len(geometry.inlier_matches) >= min_inliers else None
    if found.R is None or np.sum(found.inliers) < min_inliers:
        return None
    K0, K1 = opencv_to_colmap_K(K0), opencv_to_colmap_K(K1)
    kinds = colmap.TwoViewGeometryConfiguration
    geometry = colmap.TwoViewGeometry(inlier_matches=found.matches[found.inliers].astype(np.uint32))
    if not found.translation_determined:
        geometry.config, geometry.H = kinds.PANORAMIC, K1 @ found.R @ np.linalg.inv(K0)
    elif found.planar:
        rows0, rows1 = found.matches[found.inliers].T
        geometry.config = kinds.PLANAR
        geometry.H = cv2.findHomography(points[0][rows0], points[1][rows1], cv2.LMEDS)[0]
    else:
        E = essential_matrix(make_pose(found.R, found.t))
        geometry.config, geometry.F = kinds.UNCALIBRATED, np.linalg.inv(K1).T @ E @ np.linalg.inv(K0)
        if found.knows_direction:
            geometry.config, geometry.E = kinds.CALIBRATED, E
    if found.knows_rotation:
        geometry.cam2_from_cam1 = colmap.Rigid3d(np.c_[found.R, found.t * found.knows_direction])
    return geometry
