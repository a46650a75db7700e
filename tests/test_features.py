import cv2
import numpy as np
import pytest

from tools.cli import InputError
from tools.features import Extractor, Features, Sift, build_extractor


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    canvas = np.full((240, 320), 128, np.uint8)
    for x, y, r, v in zip(rng.integers(0, 320, 300), rng.integers(0, 240, 300), rng.integers(3, 12, 300),
                          rng.integers(0, 255, 300)):
        cv2.rectangle(canvas, (int(x), int(y)), (int(x + r), int(y + r)), int(v), -1)
    return cv2.GaussianBlur(canvas, (0, 0), 1)


def test_strongest_first_and_no_more_than_asked_for(image):
    many, few = Sift(max_keypoints=1000)(image), Sift(max_keypoints=50)(image)
    assert len(many.keypoints) > 150
    assert len(few.keypoints) == 50
    assert (np.diff(many.scores) <= 0).all()
    np.testing.assert_array_equal(few.scores, many.scores[:50])
    assert many.image_size == (320, 240)
    assert [array.dtype for array in (many.keypoints, many.scores, many.descriptors)] == [np.float32] * 3


def test_descriptors_are_rootsift(image):
    features = Sift(max_keypoints=1000)(image)
    np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-5)
    found, sift = cv2.SIFT_create(contrastThreshold=0.04).detectAndCompute(image, None)
    raw = {(*point.pt, point.response, tuple(np.round(vector / vector.sum(), 5)))
           for point, vector in zip(found, sift.astype(np.float64))}
    ours = {(*map(float, point), float(score), tuple(np.round(vector.astype(np.float64) ** 2, 5)))
            for point, score, vector in zip(features.keypoints, features.scores, features.descriptors)}
    close = [item[:3] for item in ours]
    assert sorted(close) == sorted(item[:3] for item in raw)
    squares = np.array([item[3] for item in sorted(ours, key=lambda item: item[:3])])
    np.testing.assert_allclose(squares.sum(axis=1), 1, atol=1e-3)


def test_one_keypoint_per_place_on_demand(image):
    plain = Sift(max_keypoints=1000)(image)
    unique = Sift(max_keypoints=1000, unique_locations=True)(image)
    places = {tuple(point) for point in plain.keypoints}
    assert len(places) < len(plain.keypoints)
    assert len(unique.keypoints) == len(places)
    assert {tuple(point) for point in unique.keypoints} == places
    # asked for n, it gives n different places, not n keypoints less the repeats
    assert len(Sift(max_keypoints=100, unique_locations=True)(image).keypoints) == 100


def test_contrast_threshold_is_used(image):
    assert len(Sift(1000, contrast_threshold=0.1)(image).keypoints) < len(Sift(1000, 0.01)(image).keypoints)


def test_image_without_texture():
    features = Sift()(np.full((50, 70), 100, np.uint8))
    assert features.keypoints.shape == (0, 2)
    assert features.descriptors.shape == (0, 128)
    assert features.scores.shape == (0,)


def test_unknown_feature_type():
    with pytest.raises(InputError, match="unknown feature type 'orb'"):
        build_extractor("orb")


class Centroid(Extractor):
    """One keypoint: the centre of what is bright."""

    def _extract(self, images):
        y, x = np.indices(images[0].shape).reshape(2, -1)
        weights = images[0].ravel() - 60.0
        keypoints = np.float32([[weights @ x, weights @ y]]) / weights.sum()
        return [Features(keypoints, np.ones(1, np.float32), np.ones((1, 1), np.float32), images[0].shape[::-1])]


@pytest.mark.parametrize("size", [(480, 640), (479, 637), (40, 15_000)])
def test_large_image_is_downscaled(monkeypatch, size):
    """It keeps its size, and its keypoints their places."""
    image = np.full(size, 60, np.uint8)
    place = (100, size[0] // 2)
    cv2.circle(image, place, 12, 220, -1)
    extractor, seen = Centroid(), []
    extractor.max_pixels = 40_000
    extract = extractor._extract
    monkeypatch.setattr(extractor, "_extract", lambda images: seen.extend(images) or extract(images))
    features = extractor(image)
    assert 20_000 < seen[0].size <= 40_000 and features.image_size == size[::-1]
    assert features.keypoints.dtype == np.float32
    np.testing.assert_allclose(features.keypoints[0], place, atol=0.25)


def test_large_image_of_sift(monkeypatch):
    image = np.full((480, 640), 60, np.uint8)
    cv2.circle(image, (400, 300), 12, 220, -1)
    monkeypatch.setattr(Sift, "max_pixels", 200_000)
    features = build_extractor("sift", device="cpu")(image)
    # OpenCV's keypoints are off by a quarter of a pixel, here of 1.24 times the size
    assert np.abs(features.keypoints - [400, 300]).max(axis=1).min() < 0.5 and features.image_size == (640, 480)
