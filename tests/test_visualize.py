import cv2
import numpy as np
import pytest
from PIL import Image

from tools.files import read_image
from tools.visualize import (
    DROPPED,
    GIF_WIDTH,
    GREEN,
    KEPT,
    RED,
    STRIP_COLUMNS,
    STRIP_WIDTH,
    VIEW_SIDE,
    Stage,
    draw_iterations,
    draw_matches,
    error_colors,
    iteration_frames,
    plot_curves,
    plot_panels,
    write_gif,
    write_strip,
)


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


def test_inliers_are_green_and_on_top_of_rejected_matches():
    image = np.full((60, 60), 128, np.uint8)
    keypoints = np.array([[30.0, 30], [30, 30], [10, 10]])
    picture = draw_matches(image, image, keypoints, keypoints, inliers=np.array([True, False, False]))
    assert near(picture[len(picture) - 30, 30], GREEN) and near(picture[len(picture) - 50, 10], RED)


def test_large_images_are_made_small_and_keypoints_with_them():
    image0, image1 = np.full((3000, 2000), 128, np.uint8), np.full((600, 1200), 128, np.uint8)
    picture = draw_matches(image0, image1, np.array([[1500.0, 600]]), np.array([[300.0, 450]]))
    assert picture.shape[0] < VIEW_SIDE + 60 and picture.shape[1] < 2 * VIEW_SIDE
    width0 = picture.shape[1] - VIEW_SIDE  # of view 0 and the gap
    assert 640 < width0 < 650
    top = picture.shape[0] - VIEW_SIDE
    assert near(picture[top + 192, 480], GREEN)
    assert near(picture[top + 360, width0 + 240], GREEN)


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
    draw_matches(image, image, keypoints, keypoints, inliers=np.arange(9) < 4)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(keypoints, copies[1])


def test_colours_go_from_green_over_yellow_to_red():
    blue, green, red = error_colors([0, 0.005, 0.01, 1, np.inf], 0.005).T
    assert green[0] > 150 > red[0] and red[1] > 200 and green[1] > 150 and red[2] > 200 > 60 > green[2]
    np.testing.assert_array_equal(np.c_[blue, green, red][2:], np.tile([blue[2], green[2], red[2]], (3, 1)))


def test_curves_are_written_as_a_picture(tmp_path):
    path = tmp_path / "new" / "curves.png"
    x = np.linspace(0, 20, 50)
    plot_curves(path, {"one": (x, x), "two": (x, 2 * x)}, "x", "y", "title")
    both = read_image(path, color=True)
    assert 200 < both.shape[0] < 1000 and 300 < both.shape[1] < 1500
    plot_curves(path, {"one": (x, x)}, "x", "y", "title")
    assert (cv2.absdiff(read_image(path, color=True), both).sum(axis=2) > 100).sum() > 300
    assert [item.name for item in path.parent.iterdir()] == ["curves.png"]
    plot_panels(path, {"y": {"one": (x, x)}, "z": {}}, "x")
    assert read_image(path).shape == (both.shape[0], 2 * both.shape[1])


# the iterations of a pair: two views of 200x150, four keypoints each, of which the last is dropped at the end

IMAGES = np.full((150, 200), 100, np.uint8), np.full((150, 200, 3), 100, np.uint8)
KEYPOINTS = (np.array([[50.0, 40], [150, 40], [50, 110], [150, 110]]),
             np.array([[60.0, 50], [140, 60], [20, 100], [180, 130]]))
ALL = np.arange(4)
MATCHES, INLIERS = np.array([[0, 1], [2, 2]]), np.array([True, False])


def stages(n=2):
    begin = [Stage("two images", ALL, ALL)]
    between = [Stage(f"iteration {i}", ALL, ALL, MATCHES, INLIERS, (9.0, np.inf)) for i in range(n - 2)]
    return [*begin, *between, Stage("result", ALL[:3], ALL[:3], MATCHES, INLIERS, (0.5, 5.0))]


def check_colors(seen, drawn):
    """Few colours, but near: white is white, and what is coloured has its colour."""
    difference = np.abs(seen.astype(int) - drawn)
    assert difference.mean() < 2 and not difference[drawn.min(axis=2) == 255].any()
    assert difference[np.ptp(drawn.astype(int), axis=2) > 60].mean() < 12


def count(picture, color, tolerance=25):
    return int((np.abs(picture.astype(int) - np.asarray(color)).max(axis=2) <= tolerance).sum())


def test_a_strip_shows_what_each_stage_kept_and_matched():
    picture = draw_iterations(*IMAGES, *KEYPOINTS, stages())
    width = (STRIP_WIDTH - 24) // 2
    assert picture.shape[1] == STRIP_WIDTH
    scale, left = width / 200, STRIP_WIDTH - width
    top = next(y for y in range(len(picture)) if picture[y, width // 2].max() < 200)
    height = round(150 * scale)
    expected = {"first": [[KEPT] * 4, [KEPT] * 4],
                "last": [[GREEN, KEPT, RED, DROPPED], [KEPT, GREEN, RED, DROPPED]]}
    for x_offset, stage_colors in ((0, expected["first"]), (left, expected["last"])):
        for y_offset, keypoints, colors in zip((top, top + height + 6), KEYPOINTS, stage_colors):
            for (x, y), color in zip((keypoints + 0.5) * scale - 0.5, colors):
                assert near(picture[round(y) + y_offset, round(x) + x_offset], color), (x_offset, y_offset, color)
    # half way, the line of the inlier is green, and that of the other red
    for match, color in ((0, GREEN), (1, RED)):
        i, j = MATCHES[match]
        ends = (KEYPOINTS[0][i] + 0.5) * scale - 0.5, (KEYPOINTS[1][j] + 0.5) * scale - 0.5 + [0, height + 6]
        x, y = np.rint((ends[0] * 0.9 + ends[1] * 0.1) + [left, top]).astype(int)
        around = picture[y - 2:y + 3, x - 2:x + 3].reshape(-1, 3).astype(int)
        channel = np.argmax(color)
        assert (around[:, channel] - around.min(axis=1)).max() > 60
    assert count(picture[top:top + 2 * height, :width], GREEN) == count(picture[top:top + 2 * height, :width], RED) == 0


def test_bars_are_as_long_as_the_numbers_say():
    picture = draw_iterations(*IMAGES, *KEYPOINTS, stages())
    width = (STRIP_WIDTH - 24) // 2
    below = picture[-4 * 55 - 90:-60, -width:]
    rows = {name: np.flatnonzero((below == color).all(axis=2).sum(axis=1) > 20) for name, color in
            (("green", GREEN), ("red", RED))}
    inliers, errors = below[rows["green"][0]], error_colors([0.5, 5.0], 5.0).round()
    assert (inliers == GREEN).all(axis=1).sum() == (inliers == RED).all(axis=1).sum() == width // 2
    for color, share in zip(errors, (0.05, 0.5)):
        lengths = (np.abs(below - color).max(axis=2) <= 1).sum(axis=1)
        assert lengths.max() == pytest.approx(share * width, abs=2)


def test_many_stages_take_rows_of_equal_width():
    one, two = (draw_iterations(*IMAGES, *KEYPOINTS, stages(n)) for n in (STRIP_COLUMNS, STRIP_COLUMNS + 3))
    assert one.shape[1] == two.shape[1] == STRIP_WIDTH
    assert len(two) > 2 * len(one)  # of four columns, not five
    # nothing is written over the gaps between the columns
    width = (STRIP_WIDTH - 4 * 24) // 5
    for column in range(1, 5):
        x = column * (width + 24)
        assert (one[:-50, x - 20:x - 4] == 255).all()


def test_no_keypoints_no_matches_and_no_pose_can_be_drawn():
    nothing = np.zeros((0, 2))
    empty = [Stage("x" * 90, np.zeros(0, int), np.zeros(0, int), errors=(np.inf, np.inf))]
    tall = np.zeros((60, 50), np.uint8)
    for error_name in ("error", "change"):
        picture = draw_iterations(tall, np.full((30, 90), 7, np.uint8), nothing, nothing, empty, error_name)
        assert picture.shape[1] == STRIP_WIDTH
        assert count(picture, RED) > 1000  # the bars of both errors
    (frame,) = iteration_frames(tall, IMAGES[0], nothing, nothing, empty)
    assert frame.shape[1] == GIF_WIDTH


def test_few_lines_stand_for_many_matches():
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(0, [20, 150], (2, 3000, 2)) + [[[0, 0]], [[180, 0]]]  # at the outer edges
    every = np.arange(3000)
    crowd = Stage("", every[:0], every[:0], np.stack([every, every], axis=1), np.ones(3000, bool))
    (frame,) = iteration_frames(*IMAGES, *keypoints, [crowd])
    covered = (frame[100:300, 300:400, 1] > 110).mean()
    assert 0.1 < covered < 0.7


def test_frames_make_an_animation(tmp_path):
    frames = iteration_frames(*IMAGES, *KEYPOINTS, stages(4))
    assert len(frames) == 4 and len({frame.shape for frame in frames}) == 1 and frames[0].shape[1] == GIF_WIDTH
    path = tmp_path / "new" / "a.gif"
    write_gif(path, frames)
    assert [item.name for item in path.parent.iterdir()] == ["a.gif"]
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append((gif.info["duration"], np.asarray(gif.convert("RGB"))[..., ::-1]))
    # equal pictures one after the other may be stored as one, for as long as both
    assert sum(duration for duration, _ in shown) == 3 * 1200 + 3000
    for drawn, (_, seen) in ((frames[0], shown[0]), (frames[-1], shown[-1])):
        check_colors(seen, drawn)


def test_a_strip_is_written_in_few_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 200), dtype=np.uint8)
    picture = draw_iterations(noise, noise, *KEYPOINTS, stages())
    write_strip(tmp_path / "strip.png", picture)
    seen = read_image(tmp_path / "strip.png", color=True)
    check_colors(seen, picture)
    assert len(np.unique(seen.astype(int) @ [1 << 16, 1 << 8, 1])) < 256
    cv2.imwrite(str(tmp_path / "all.png"), picture)
    assert (tmp_path / "strip.png").stat().st_size < 0.6 * (tmp_path / "all.png").stat().st_size
