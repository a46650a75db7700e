"""Covisibility from depth maps, against scenes whose overlaps can be computed by hand."""
import numpy as np
import pytest

from tools import covisibility
from tools.covisibility import MAX_POINTS, is_seen, pair_matrices, scene_info_from_depth
from tools.geometry import lift, make_pose, project
from tools.scene_info import load_scene_info, write_scene_info

W, H, F = 80, 60, 80.0
K = np.array([[F, 0, W / 2], [0, F, H / 2], [0, 0, 1]])  # COLMAP's convention: the image's centre is (w/2, h/2)
WALL = (4.0, -100, 100)  # at this depth an image is 4 wide and 3 high
GRID = 0.02  # one column of the sampling grid, as a share of the image


def camera(x=0.0, z=0.0, yaw=0.0):
    """World-to-camera pose of a camera at (x, 0, z), turned by `yaw` degrees about its vertical axis."""
    a = np.deg2rad(yaw)
    R = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    return make_pose(R, -R @ [x, 0, z])


def render(pose, strips=(WALL,), K=K):
    """Depth map of vertical strips (z, x_min, x_max), infinitely high, that face the z axis; 0 where there is none."""
    x, y = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(K).T @ pose[:3, :3]
    centre = -pose[:3, :3].T @ pose[:3, 3]
    nearest = np.full((H, W), np.inf)
    for z, x_min, x_max in strips:
        with np.errstate(divide="ignore"):
            depth = (z - centre[2]) / rays[..., 2]
        hit_x = centre[0] + depth * rays[..., 0]
        nearest = np.where((depth > 0) & (hit_x >= x_min) & (hit_x <= x_max), np.minimum(nearest, depth), nearest)
    return np.where(np.isfinite(nearest), nearest, 0).astype(np.float32)


def scene(poses, depths, Ks=None):
    names = [f"{i}" for i in range(len(poses))]
    return scene_info_from_depth(names, names, Ks or [K] * len(poses), poses, lambda i: depths[i])


def shared_ids(info, i, j):
    return info["points3D_id_to_2D"][i].keys() & info["points3D_id_to_2D"][j].keys()


def test_sideways_shift_over_a_wall():
    poses = [camera(), camera(x=1)]
    info = scene(poses, [render(pose) for pose in poses])
    # the second image spans -1..3 of the wall, the first -2..2
    np.testing.assert_allclose(info["overlap_matrix"], [[1, 0.75], [0.75, 1]], atol=GRID)
    assert np.array_equal(np.diag(info["overlap_matrix"]), [1, 1])
    np.testing.assert_allclose(info["scale_ratio_matrix"], np.ones((2, 2)), atol=1e-6)
    np.testing.assert_allclose(info["angles"], 0, atol=1e-4)


def test_twice_as_far_is_scale_two_and_overlap_is_directed():
    poses = [camera(), camera(z=-4)]
    info = scene(poses, [render(pose) for pose in poses])
    np.testing.assert_allclose(info["overlap_matrix"], [[1, 1], [0.25, 1]], atol=GRID)
    np.testing.assert_allclose(info["scale_ratio_matrix"], [[1, 2], [2, 1]], rtol=1e-5)


def test_scale_is_of_depth_over_focal_length():
    poses, long_K = [camera(), camera(z=-4)], K * [[2], [2], [1]] - [[0, 0, W / 2], [0, 0, H / 2], [0, 0, 0]]
    info = scene(poses, [render(poses[0]), render(poses[1], K=long_K)], [K, long_K])
    np.testing.assert_allclose(info["scale_ratio_matrix"], np.ones((2, 2)), rtol=1e-5)
    np.testing.assert_allclose(info["overlap_matrix"], np.ones((2, 2)), atol=GRID)


def test_occluder_hides_what_is_behind_it():
    poses = [camera(), camera(x=1)]
    # at depth 2 the first camera sees x up to 1, so only the second has the strip in view; its shadow on the wall,
    # seen from x = 1, is 1.1..2
    info = scene(poses, [render(pose, [WALL, (2.0, 1.05, 1.5)]) for pose in poses])
    np.testing.assert_allclose(info["overlap_matrix"], [[1, 2.1 / 4], [2.1 / 4, 1]], atol=GRID)


def test_unknown_depth_is_not_seen_and_does_not_count():
    poses = [camera(), camera(x=1)]
    depths = [render(pose) for pose in poses]
    depths[1][:, :W // 2] = 0  # knows 1..3 of the wall only
    overlap = scene(poses, depths)["overlap_matrix"]
    np.testing.assert_allclose(overlap, [[1, 0.25], [0.5, 1]], atol=GRID)


def test_image_without_depth_is_unknown():
    poses = [camera(), camera(), camera(x=1)]
    depths = [render(pose) for pose in poses]
    depths[1][:] = 0
    info = scene(poses, depths)
    assert np.array_equal(info["overlap_matrix"][1], [-1, 1, -1])
    assert np.array_equal(info["overlap_matrix"][:, 1], [-1, 1, -1])
    assert info["overlap_matrix"][0, 2] > 0.7
    assert info["n_points3D"][1] == 0 and np.array_equal(info["scale_ratio_matrix"][1], [-1, -1, -1])
    assert info["scale_ratio_matrix"][0, 2] == pytest.approx(1)
    nothing = scene(poses, [np.zeros((H, W), np.float32)] * 3)
    assert np.array_equal(nothing["overlap_matrix"], 2 * np.eye(3) - 1)
    assert (nothing["scale_ratio_matrix"] == -1).all()


def test_back_to_back_cameras_share_nothing():
    poses = [camera(), camera(yaw=180), camera(yaw=30)]
    walls = [WALL, (-4.0, -100, 100)]
    info = scene(poses, [render(pose, walls) for pose in poses])
    assert info["overlap_matrix"][0, 1] == info["overlap_matrix"][1, 0] == 0
    assert info["scale_ratio_matrix"][0, 1] == info["scale_ratio_matrix"][1, 0] == -1
    assert not shared_ids(info, 0, 1)
    np.testing.assert_allclose(info["angles"], [[0, 180, 30], [180, 0, 150], [30, 150, 0]], atol=1e-4)


def test_rolling_the_camera_turns_no_axis():
    poses = [camera(yaw=20), make_pose([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], [0, 0, 0]) @ camera(yaw=30)]
    info = scene(poses, [render(pose) for pose in poses])
    np.testing.assert_allclose(info["angles"], [[0, 10], [10, 0]], atol=1e-4)


def test_point_ids_name_the_same_place_in_every_image():
    poses = [camera(), camera(x=0.8, yaw=-10), camera(x=-0.5, z=-1, yaw=5)]
    depths = [render(pose) for pose in poses]
    info = scene(poses, depths)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shared = sorted(shared_ids(info, i, j))
        assert len(shared) >= 100
        places = []
        for k in (i, j):
            pixels = np.array([info["points3D_id_to_2D"][k][point] for point in shared])
            depth = np.array([info["points3D_id_to_ndepth"][k][point] for point in shared]) * F
            assert (pixels >= 0).all() and (pixels < [W, H]).all()
            places.append(lift(pixels, depth, K, poses[k]))
        np.testing.assert_allclose(places[0], places[1], atol=1e-9)
        np.testing.assert_allclose(places[0][:, 2], WALL[0], atol=1e-5)
        ratios = np.array([info["points3D_id_to_ndepth"][i][p] / info["points3D_id_to_ndepth"][j][p] for p in shared])
        assert info["scale_ratio_matrix"][i, j] == pytest.approx(np.maximum(ratios, 1 / ratios).min())
    assert info["n_points3D"] == [len(points) for points in info["points3D_id_to_2D"]]
    assert info["points3D_id_to_2D"][1].keys() == info["points3D_id_to_ndepth"][1].keys()


def test_points_are_in_colmap_convention():
    """A pixel's centre is at +0.5 there, and the points of a single image are centres of its own pixels."""
    info = scene([camera()], [render(camera())])
    pixels = np.array(list(info["points3D_id_to_2D"][0].values()))
    np.testing.assert_allclose(pixels % 1, 0.5, atol=1e-6)
    # half a pixel of error in reading depth shows at an edge: the strip ends at the boundary between two pixels
    edge = 4.0 * 10 / F
    depth = render(camera(), [(4.0, -100, edge)])
    x = (np.array([W / 2 + 9.6, W / 2 + 10.4]) - W / 2) / F * 4.0
    points = np.c_[x, [0.0, 0.0], [4.0, 4.0]]
    assert is_seen(points, depth, K, camera()).tolist() == [True, False]


def test_voxel_size_and_the_limit_of_points(monkeypatch):
    def points_of(voxel_size):
        monkeypatch.setattr(covisibility, "VOXELS_PER_DEPTH", 4 / voxel_size)
        return scene([camera()] * 2, [np.full((240, 320), 4, np.float32)] * 2,
                     [np.array([[320.0, 0, 160], [0, 320, 120], [0, 0, 1]])] * 2)

    assert points_of(0.5)["n_points3D"] == [8 * 6, 8 * 6]  # the wall in view is 4 x 3
    fine = points_of(1e-3)
    assert fine["n_points3D"] == [MAX_POINTS, MAX_POINTS]
    assert len(shared_ids(fine, 0, 1)) == MAX_POINTS
    pixels = np.array(list(fine["points3D_id_to_2D"][0].values()))
    assert (np.ptp(pixels, axis=0) > [310, 230]).all(), "the points kept must not come from one part of the image"


def test_pairs_that_share_nothing():
    overlap, scale_ratio = pair_matrices(
        [np.array([0, 1]), np.array([2]), np.array([1, 2, 3]), np.zeros(0, int)],
        [np.array([1.0, 2.0]), np.array([1.0]), np.array([1.0, 4.0, 1.0]), np.zeros(0)], 4)
    np.testing.assert_allclose(overlap, [[1, 0, 1 / 2, -1], [0, 1, 1, -1], [1 / 3, 1 / 3, 1, -1], [-1] * 4])
    np.testing.assert_allclose(scale_ratio, [[1, -1, 2, -1], [-1, 1, 4, -1], [2, 4, 1, -1], [-1] * 4])


@pytest.mark.parametrize("offset, seen", [(0.96, True), (1.04, True), (0.92, False), (1.08, False)])
def test_occlusion_test_admits_five_percent(offset, seen):
    point = np.array([[0.1, 0.2, 4.0]])
    assert is_seen(point, np.full((H, W), 4 * offset, np.float32), K, camera()).tolist() == [seen]


def test_is_seen_inside_and_in_front_only():
    depth = np.full((H, W), 4, np.float32)
    points = np.array([[1.999, 0, 4], [2.001, 0, 4], [-1.999, 0, 4], [-2.001, 0, 4], [0, 1.499, 4], [0, 1.501, 4],
                       [0, -1.501, 4], [0, 0, -4], [0, 0, 0]])
    pixels, _ = project(points[:2], K, camera())
    assert (pixels[:, 0] < W).tolist() == [True, False]
    assert is_seen(points, depth, K, camera()).tolist() == [True, False, True, False, True] + [False] * 4


def test_survives_the_file(tmp_path):
    poses = [camera(), camera(x=1)]
    info = scene(poses, [render(pose) for pose in poses])
    write_scene_info(tmp_path / "s.0.npz", info)
    loaded = load_scene_info(tmp_path / "s.0.npz")
    assert list(loaded["image_paths"]) == ["0", "1"]
    for name in ("overlap_matrix", "scale_ratio_matrix", "angles"):
        assert np.array_equal(loaded[name], info[name]) and loaded[name].dtype == np.float64
    assert loaded["points3D_id_to_2D"][1] == info["points3D_id_to_2D"][1]
    assert loaded["points3D_id_to_ndepth"][1] == info["points3D_id_to_ndepth"][1]
    assert np.array_equal(loaded["poses"][1], poses[1]) and np.array_equal(loaded["intrinsics"][1], K)
