"""SuperPoint and the extractor built on it, with random weights."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.fill import fill_
from scipy.ndimage import maximum_filter

from nets import SuperPoint, build_matcher
from nets.superpoint import sample_descriptors
from tools import checkpoint
from tools.cli import InputError
from tools.features import Features, Spp, build_extractor

LAYERS = {"conv1a": (64, 1, 3), "conv1b": (64, 64, 3), "conv2a": (64, 64, 3), "conv2b": (64, 64, 3),
          "conv3a": (128, 64, 3), "conv3b": (128, 128, 3), "conv4a": (128, 128, 3), "conv4b": (128, 128, 3),
          "convPa": (256, 128, 3), "convPb": (65, 256, 1), "convDa": (256, 128, 3), "convDb": (256, 256, 1)}


def random_image(height, width, seed=0):
    """(H, W) uint8: noise at two scales."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 160, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8), int))
    return (coarse[:height, :width] + rng.integers(0, 96, (height, width))).astype(np.uint8)


def to_tensor(*images):
    return torch.from_numpy(np.stack(images)).unsqueeze(1).float() / 255


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the shape of the public one: a bare state dict."""
    path = tmp_path_factory.mktemp("weights") / "superpoint_v1.pth"
    torch.save(fill_(SuperPoint(), "random").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return checkpoint.load_superpoint(weights, keypoint_threshold=0.016)


def by_the_book(state, image, radius, threshold, border=4):
    """SuperPoint pixel by pixel: image (H, W) in [0, 1] -> {(x, y): (score, descriptor)}."""
    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=LAYERS[name][2] // 2)

    x = image[None, None]
    for level in "1234":
        x = F.relu(conv(f"conv{level}b", F.relu(conv(f"conv{level}a", x))))
        x = x if level == "4" else F.max_pool2d(x, 2)
    cells = conv("convPb", F.relu(conv("convPa", x))).softmax(dim=1)[0].numpy()
    coarse = F.normalize(conv("convDb", F.relu(conv("convDa", x))), dim=1)[0].numpy()
    rows, columns = cells.shape[1:]
    scores = np.zeros((8 * rows, 8 * columns), np.float32)
    for y, x in np.ndindex(*scores.shape):
        scores[y, x] = cells[8 * (y % 8) + x % 8, y // 8, x // 8]

    def dilated(values):
        return maximum_filter(values, size=2 * radius + 1, mode="constant", cval=-1)

    maxima = scores == dilated(scores)
    for _ in range(2):
        covered = dilated(maxima.astype(np.float32)) > 0
        rest = np.where(covered, 0, scores)
        maxima |= (rest == dilated(rest)) & ~covered
    found = {}
    for y, x in np.argwhere(maxima & (scores > threshold)):
        if border <= x < 8 * columns - border and border <= y < 8 * rows - border:
            # align_corners: the whole range is columns - 1 steps wide
            at_x = (x - 3.5) / (8 * columns - 4.5) * (columns - 1)
            at_y = (y - 3.5) / (8 * rows - 4.5) * (rows - 1)
            left, top = int(at_x), int(at_y)
            right, bottom = min(left + 1, columns - 1), min(top + 1, rows - 1)
            a, b = at_x - left, at_y - top
            mixed = ((1 - a) * (1 - b) * coarse[:, top, left] + a * (1 - b) * coarse[:, top, right]
                     + (1 - a) * b * coarse[:, bottom, left] + a * b * coarse[:, bottom, right])
            found[int(x), int(y)] = scores[y, x], mixed / np.linalg.norm(mixed)
    return found


def test_state_dict_is_the_public_one():
    shapes = {name: tuple(value.shape) for name, value in SuperPoint().state_dict().items()}
    assert shapes == {**{f"{name}.weight": (out, into, k, k) for name, (out, into, k) in LAYERS.items()},
                      **{f"{name}.bias": (out,) for name, (out, _, _) in LAYERS.items()}}


@pytest.mark.parametrize("radius, threshold", [(4, 0.016), (3, 0.001)])
@pytest.mark.parametrize("height, width", [(64, 88), (75, 53)])
def test_by_the_book(height, width, radius, threshold):
    network = fill_(SuperPoint(nms_radius=radius, keypoint_threshold=threshold), f"{height}")
    image = to_tensor(random_image(height, width))
    with torch.no_grad():
        out = network(image)
    expected = by_the_book(network.state_dict(), image[0, 0], radius, threshold)
    keypoints = [(int(x), int(y)) for x, y in out["keypoints"][0]]
    assert len(keypoints) == len(expected) > 10 and set(keypoints) == set(expected)
    assert keypoints == sorted(keypoints, key=lambda xy: xy[::-1])  # raster order where all are kept
    for xy, score, descriptor in zip(keypoints, out["scores"][0], out["descriptors"][0]):
        assert score == pytest.approx(expected[xy][0], abs=1e-6)
        np.testing.assert_allclose(descriptor, expected[xy][1], atol=1e-5)


@pytest.mark.parametrize("height, width", [(10, 14), (5, 30)])
def test_align_corners(height, width):
    """Without, descriptors are sampled elsewhere: by nothing at the centre, 4 px at the border, linearly between."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    coarse = torch.stack([8 * x, 8 * y, torch.ones_like(x)])
    part = torch.linspace(0.1, 0.9, 9)[:, None]
    keypoints = part * (torch.tensor([width, height]) * 8 - 4.5) + 3.5
    aligned, other = ((found / found[:, 2:])[:, :2] for found in (
        sample_descriptors(coarse, keypoints, align_corners) for align_corners in (True, False)))
    torch.testing.assert_close(other - aligned, (8 * (part - 0.5)).expand(-1, 2), rtol=0, atol=1e-3)


def test_align_corners_of_the_extractor(weights):
    image = random_image(64, 88)
    by_default, aligned, other = (
        build_extractor("spp", weights=weights, device="cpu", keypoint_threshold=0.016, **changed)(image)
        for changed in ({}, {"align_corners": True}, {"align_corners": False}))
    same(by_default, aligned)
    np.testing.assert_array_equal(other.keypoints, aligned.keypoints)
    assert np.abs(other.descriptors - aligned.descriptors).max() > 1e-3


def test_border(weights):
    """4 px of what the cells cover: without suppression and threshold every other pixel is a keypoint."""
    network = checkpoint.load_superpoint(weights, nms_radius=0, keypoint_threshold=0.0)
    with torch.no_grad():
        keypoints = network(to_tensor(random_image(29, 35)))["keypoints"][0]
    assert [tuple(xy) for xy in keypoints.int().tolist()] == [(x, y) for y in range(4, 20) for x in range(4, 28)]


def test_strongest_first(network, weights):
    image = to_tensor(random_image(64, 88))
    with torch.no_grad():
        every = network(image)
        best = checkpoint.load_superpoint(weights, keypoint_threshold=0.016, max_keypoints=7)(image)
        none = checkpoint.load_superpoint(weights, max_keypoints=0)(image)
    order = every["scores"][0].argsort(descending=True)[:7]
    for name in every:
        assert torch.equal(best[name][0], every[name][0][order])
        assert len(none[name][0]) == 0


def test_a_batch_equals_its_images(network):
    images = [random_image(64, 88, seed) for seed in range(3)] + [np.zeros((64, 88), np.uint8)]
    with torch.no_grad():
        batch = network(to_tensor(*images))
        for i, image in enumerate(images):
            alone = network(to_tensor(image))
            assert torch.equal(batch["keypoints"][i], alone["keypoints"][0])
            for name in ("scores", "descriptors"):
                torch.testing.assert_close(batch[name][i], alone[name][0], rtol=0, atol=1e-5)


# the extractor

def same(one: Features, other: Features):
    assert one.image_size == other.image_size
    np.testing.assert_array_equal(one.keypoints, other.keypoints)
    np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.descriptors, other.descriptors, rtol=0, atol=1e-5)


def test_features_of_an_image(weights):
    extractor = build_extractor("spp", max_keypoints=20, keypoint_threshold=0.016, nms_radius=3, device="cpu",
                                weights=weights)
    image = random_image(75, 93)
    features = extractor(image)
    assert features.image_size == (93, 75)
    n = len(features.keypoints)
    assert n == 20
    for array, shape in ((features.keypoints, (n, 2)), (features.scores, (n,)), (features.descriptors, (n, 256))):
        assert array.dtype == np.float32 and array.shape == shape
    assert (np.diff(features.scores) <= 0).all() and features.scores.min() > 0.016
    np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-5)

    book = by_the_book(extractor.network.state_dict(), to_tensor(image)[0, 0], 3, 0.016)
    strongest = sorted(book, key=lambda xy: -book[xy][0])[:20]
    assert [tuple(xy) for xy in features.keypoints.astype(int).tolist()] == strongest


def test_a_batch_of_images(weights):
    extractor = Spp(keypoint_threshold=0.016, weights=weights)
    images = [random_image(75, 93, seed) for seed in range(3)]
    found = extractor.extract_batch(images)
    assert len(found) == 3 and extractor.extract_batch([]) == []
    for image, features in zip(images, found):
        same(features, extractor(image))
    assert len({len(features.keypoints) for features in found}) > 1


@pytest.mark.parametrize("size", [(7, 7), (7, 200), (64, 5), (1, 1), (8, 8)])
def test_images_too_small_for_keypoints(weights, size):
    features = Spp(keypoint_threshold=0.0, weights=weights)(random_image(*size))
    assert features.image_size == size[::-1]
    assert [array.shape for array in (features.keypoints, features.scores, features.descriptors)] \
        == [(0, 2), (0,), (0, 256)]
    assert features.keypoints.dtype == features.scores.dtype == features.descriptors.dtype == np.float32


def test_no_keypoints(weights):
    features = Spp(keypoint_threshold=0.99, weights=weights)(random_image(64, 64))
    assert features.keypoints.shape == (0, 2) and features.descriptors.shape == (0, 256)


def test_weights_in_half_precision(weights, tmp_path):
    """Read as single precision; the file may also be a checkpoint with an entry `model`."""
    state = {name: value.half() for name, value in torch.load(weights).items()}
    torch.save({"model": state}, tmp_path / "half.pth")
    network = Spp(weights=tmp_path / "half.pth").network
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


def test_default_weights(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    with pytest.raises(InputError, match=r"no SuperPoint weights at .*: put superpoint_v1.pth.* at weights/superpoint"):
        Spp()
    (tmp_path / "superpoint_v1.pth").write_bytes(weights.read_bytes())
    assert Spp().network.max_keypoints == 2000


def test_wrong_weights(weights, tmp_path):
    torch.save({"model": build_matcher("imp", descriptor_dim=8, n_layers=5).state_dict()}, tmp_path / "imp.pth")
    with pytest.raises(InputError, match=r"imp.pth does not fit .* lacks conv1a.weight .*for network imp, "):
        Spp(weights=tmp_path / "imp.pth")
    state = torch.load(weights)
    torch.save({**state, "conv9.bias": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(InputError, match=r"it has conv9.bias, which the network does not have"):
        Spp(weights=tmp_path / "more.pth")


def test_batches_are_for_gpus(weights, monkeypatch):
    assert Spp(weights=weights, device="cpu").batch_pixels == 0
    monkeypatch.setattr("tools.distributed.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(checkpoint, "load_superpoint", lambda *arguments, **options: None)
    assert Spp().batch_pixels >= 1600 * 1200


def test_weights_hash(weights, tmp_path):
    """Of what the weights are, not of the file."""
    state = torch.load(weights)
    torch.save({"model": dict(reversed(state.items()))}, tmp_path / "same.pth")
    torch.save({**state, "convPb.bias": state["convPb.bias"] * 1.001}, tmp_path / "other.pth")
    hashes = [Spp(weights=path, device="cpu").weights_hash
              for path in (weights, tmp_path / "same.pth", tmp_path / "other.pth")]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 16


def test_bad_device(weights):
    with pytest.raises(InputError, match="unknown device 'tpu9'"):
        Spp(weights=weights, device="tpu9")
