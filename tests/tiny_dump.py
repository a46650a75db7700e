"""A dump of random keypoints with known matches, made in a moment, for the tests of training."""
import cv2
import numpy as np

from tools.files import write_json
from tools.geometry import lift, make_pose, project
from tools.records import read_record, write_record


def make_tiny_dump(path, scenes=("0000", "0001"), pairs=6, images=4, n_keypoints=96, n_matches=40, dim=128, seed=0,
                   feature="sift"):
    """Write a dump in the format of dump.dump_megadepth: descriptors of true matches agree, those of others do not."""
    rng = np.random.default_rng(seed)
    write_json(path / "dump.json", {"format": "imp-dump", "version": 1, "feature_type": feature,
                                    "settings": {"min_keypoints": n_keypoints}})
    for scene in scenes:
        K = np.array([[500, 0, 320.5], [0, 500, 240.5], [0, 0, 1.0]])
        shared = rng.standard_normal((n_matches, dim))
        names = [f"Undistorted_SfM/{scene}/images/{i}.jpg" for i in range(images)]
        poses = [make_pose(cv2.Rodrigues(np.array([0, 0, 0.2 * i]))[0], [0.3 * i, 0.1, 0]) for i in range(images)]
        places = []
        for name, pose in zip(names, poses):
            place = rng.permutation(n_keypoints)[:n_matches]
            descriptors = rng.standard_normal((n_keypoints, dim))
            descriptors[place] = shared + 0.3 * rng.standard_normal(shared.shape)
            descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
            places.append(place)
            write_record(path / "keypoints" / scene / f"{name.split('/')[-1]}_{feature}.npy", {
                "image_path": name, "depth_path": None, "image_size": np.array([640, 480]), "intrinsics": K,
                "pose": pose, "keypoints": rng.uniform(0, 480, (n_keypoints, 2)).astype("f4"),
                "scores": rng.uniform(0, 0.1, n_keypoints).astype("f4"), "descriptors": descriptors.astype("f2"),
                "depth": np.ones(n_keypoints, "f4")})
        for i in range(pairs):
            a, b = rng.permutation(images)[:2]
            write_record(path / "matches" / scene / f"{i}.npy", {
                "image_path0": names[a], "image_path1": names[b], "intrinsics0": K, "intrinsics1": K,
                "pose0": poses[a], "pose1": poses[b],
                "matches": np.stack([places[a], places[b]], axis=1).astype("i4"), "overlap": 0.5})
        write_json(path / "scenes" / f"{scene}.json", {"pairs": pairs, "images": images})
    return path


def make_consistent(dump) -> None:
    """Let the keypoints of a tiny dump's true matches be where its poses see them, and as far away."""
    rng = np.random.default_rng(0)
    for folder in sorted((dump / "matches").iterdir()):
        pairs = [read_record(path) for path in sorted(folder.glob("*.npy"))]
        places = {}  # of a scene's shared points, in the same order for every image
        for pair in pairs:
            places.update({pair[f"image_path{v}"]: pair["matches"][:, int(v)] for v in "01"})
        K, n_points = pairs[0]["intrinsics0"], len(pairs[0]["matches"])
        points = lift(rng.uniform(100, 400, (n_points, 2)), rng.uniform(2, 5, n_points), K, np.eye(4))
        for path in (dump / "keypoints" / folder.name).glob("*.npy"):
            record = read_record(path)
            if record["image_path"] in places:
                rows = places[record["image_path"]]
                keypoints, depth = record["keypoints"].copy(), record["depth"].copy()
                pixels, depth[rows] = project(points, K, record["pose"])
                keypoints[rows] = pixels - 0.5
                write_record(path, {**record, "keypoints": keypoints, "depth": depth})
