import cv2
import numpy as np
import pytest

from tools.geometry import (
    colmap_to_opencv_K,
    essential_matrix,
    is_camera_matrix,
    is_rigid,
    lift,
    make_pose,
    opencv_to_colmap_K,
    project,
    relative_pose,
    resize_K,
    resize_keypoints,
    to_camera_coordinates,
    turn_K,
    turn_keypoints,
    turn_pose,
)

K0 = np.array([[500.0, 2, 310], [0, 520, 250], [0, 0, 1]])
K1 = np.array([[700.0, 0, 410], [0, 690, 200], [0, 0, 1]])
POSE0 = make_pose(cv2.Rodrigues(np.array([0.1, -0.2, 0.3]))[0], [0.5, -1, 2])
POSE1 = make_pose(cv2.Rodrigues(np.array([-0.2, 0.4, 0.1]))[0], [-1, 0.3, 1.5])
POINTS = np.random.default_rng(0).uniform(-1, 1, (50, 3)) + [0, 0, 6]


def test_projection_and_lifting_are_inverse():
    pixels, depth = project(POINTS, K0, POSE0)
    np.testing.assert_allclose(lift(pixels, depth, K0, POSE0), POINTS, atol=1e-9)


def test_projection_agrees_with_opencv():
    pixels, _ = project(POINTS, K1, POSE1)
    expected, _ = cv2.projectPoints(POINTS, cv2.Rodrigues(POSE1[:3, :3])[0], POSE1[:3, 3], K1, None)
    np.testing.assert_allclose(pixels, expected[:, 0], atol=1e-6)


def test_relative_pose_and_essential_matrix():
    T_0to1 = relative_pose(POSE0, POSE1)
    x0 = to_camera_coordinates(project(POINTS, K0, POSE0)[0], K0)
    x1 = to_camera_coordinates(project(POINTS, K1, POSE1)[0], K1)
    E = essential_matrix(T_0to1)
    x0, x1 = np.c_[x0, np.ones(50)], np.c_[x1, np.ones(50)]
    np.testing.assert_allclose(np.einsum("ni,ij,nj->n", x1, E, x0), 0, atol=1e-9)
    assert np.abs(np.einsum("ni,ij,nj->n", x0, E, x1)).max() > 0.01


def test_conventions_of_the_principal_point():
    K = colmap_to_opencv_K(K0)
    assert K[0, 2] == 309.5
    assert K[1, 2] == 249.5
    np.testing.assert_array_equal(opencv_to_colmap_K(K), K0)


@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.3, 0.7)])
def test_resizing_moves_keypoints_as_it_moves_the_camera(scale):
    pixels, _ = project(POINTS, K0, POSE0)
    resized, _ = project(POINTS, resize_K(K0, *scale), POSE0)
    np.testing.assert_allclose(resize_keypoints(pixels, *scale), resized, atol=1e-9)


def test_resizing_agrees_with_opencv():
    image = np.zeros((60, 80), np.float32)
    image[20, 30] = 1
    image = cv2.GaussianBlur(image, (0, 0), 3)
    small = cv2.resize(image, (40, 30), interpolation=cv2.INTER_AREA)
    y, x = np.nonzero(small > 0)
    center = np.average(np.stack([x, y], 1), axis=0, weights=small[y, x])
    np.testing.assert_allclose(center, resize_keypoints(np.array([[30.0, 20.0]]), 0.5, 0.5)[0], atol=0.01)


@pytest.mark.parametrize("turns", range(4))
def test_turning_an_image_turns_keypoints_camera_and_pose(turns):
    image = np.zeros((40, 60), np.uint8)
    image[7, 13] = 255
    y, x = np.argwhere(np.rot90(image, turns))[0]
    np.testing.assert_array_equal(turn_keypoints(np.array([[13, 7]]), (60, 40), turns), [[x, y]])

    K = np.array([[500.0, 0, 310], [0, 520, 250], [0, 0, 1]])
    pixels, _ = project(POINTS, K, POSE0)
    turned, _ = project(POINTS, turn_K(K, (640, 480), turns), turn_pose(POSE0, turns))
    np.testing.assert_allclose(turn_keypoints(pixels, (640, 480), turns), turned, atol=1e-9)


def test_what_is_no_camera_and_no_motion(recwarn):
    K, pose = np.array([[500, 0, 320], [0, 500, 240], [0, 0, 1.0]]), np.eye(4)
    assert is_camera_matrix(K) and is_rigid(pose)
    for i, j, value in ((0, 0, 0), (1, 1, -500), (0, 2, np.nan), (2, 2, 2), (0, 0, 1e200), (0, 2, np.inf)):
        bad = K.copy()
        bad[i, j] = value
        assert not is_camera_matrix(bad)
    assert not is_camera_matrix(np.array([[1, 2, 0], [2, 4, 0], [0, 0, 1.0]]))
    for i, j, value in ((0, 0, -1), (0, 0, 1e200), (0, 3, np.nan), (3, 3, 2), (0, 1, 0.1), (0, 3, 1e200)):
        bad = pose.copy()
        bad[i, j] = value
        assert not is_rigid(bad)
    assert not recwarn.list
