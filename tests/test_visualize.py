import cv2
import numpy as np

from tools.files import read_image
from tools.visualize import VIEW_SIDE, draw_matches, error_colors, plot_curves, score_colors


def near(pixel, color, tolerance=25):
    return np.abs(pixel.astype(int) - np.asarray(color)).max() <= tolerance


def test_matches_are_drawn_where_they_are_in_their_colours():
    image0, image1 = np.full((100, 150), 128, np.uint8), np.full((80, 120, 3), 128, np.uint8)
    keypoints0, keypoints1 = np.array([[20.0, 30], [100, 70]]), np.array([[60.0, 40], [10, 20]])
    picture = draw_matches(image0, image1, keypoints0, keypoints1, ["a title"], errors=np.array([0.0, 1.0]))
    assert picture.dtype == np.uint8 and picture.ndim == 3
    top, left1 = picture.shape[0] - 100, picture.shape[1] - 120
    green, red = error_colors([0, 1], 0.005)
    for (x0, y0), (x1, y1), color in zip(keypoints0.astype(int), keypoints1.astype(int), (green, red)):
        assert near(picture[top + y0, x0], color) and near(picture[top + y1, left1 + x1], color)
    # nothing else is coloured but two lines and their ends
    colored = np.ptp(picture[top:].astype(int), axis=2) > 60
    assert 150 < colored.sum() < 1200


def test_the_wrong_match_is_on_top():
    image = np.full((60, 60), 128, np.uint8)
    keypoints = np.array([[30.0, 30], [30, 30]])
    for errors in ([0.0, 1.0], [1.0, 0.0]):
        picture = draw_matches(image, image, keypoints, keypoints, errors=np.array(errors))
        assert near(picture[len(picture) - 30, 30], error_colors([1], 0.005)[0])


def test_large_images_are_made_small_and_keypoints_with_them():
    image0, image1 = np.full((3000, 2000), 128, np.uint8), np.full((600, 1200), 128, np.uint8)
    picture = draw_matches(image0, image1, np.array([[1500.0, 600]]), np.array([[300.0, 450]]))
    assert picture.shape[0] < VIEW_SIDE + 60 and picture.shape[1] < 2 * VIEW_SIDE
    width0 = picture.shape[1] - VIEW_SIDE  # of view 0 and the gap
    assert 420 < width0 < 450
    top = picture.shape[0] - VIEW_SIDE
    green = error_colors([0], 1)[0]
    assert near(picture[top + 128, 320], green)
    assert near(picture[top + 240, width0 + 160], green)


def test_no_matches_and_long_titles_are_no_problem():
    image = np.zeros((40, 50), np.uint8)
    picture = draw_matches(image, image, np.zeros((0, 2)), np.zeros((0, 2)), ["x" * 400], errors=np.zeros(0))
    assert picture.shape[0] < 120 and picture.shape[1] < 120
    assert (picture[:50, -3:] == 255).all()  # the title ends inside


def test_inputs_are_not_modified():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
    keypoints = rng.uniform(0, 50, (9, 2)).astype(np.float32)
    copies = image.copy(), keypoints.copy()
    draw_matches(image, image, keypoints, keypoints, scores=np.linspace(0, 1, 9))
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(keypoints, copies[1])


def test_colours_go_from_green_over_yellow_to_red():
    blue, green, red = error_colors([0, 0.005, 0.01, 1, np.inf], 0.005).T
    assert green[0] > 150 > red[0] and red[1] > 200 and green[1] > 150 and red[2] > 200 > 60 > green[2]
    np.testing.assert_array_equal(np.c_[blue, green, red][2:], np.tile([blue[2], green[2], red[2]], (3, 1)))
    np.testing.assert_array_equal(score_colors([1, 0.5, 0]), error_colors([0, 0.005, 0.01], 0.005))


def test_curves_are_written_as_a_picture(tmp_path):
    path = tmp_path / "new" / "curves.png"
    x = np.linspace(0, 20, 50)
    plot_curves(path, {"one": (x, x), "two": (x, 2 * x)}, "x", "y", "title")
    both = read_image(path, color=True)
    assert 200 < both.shape[0] < 1000 and 300 < both.shape[1] < 1500
    plot_curves(path, {"one": (x, x)}, "x", "y", "title")
    assert (cv2.absdiff(read_image(path, color=True), both).sum(axis=2) > 100).sum() > 300
    assert [item.name for item in path.parent.iterdir()] == ["curves.png"]
