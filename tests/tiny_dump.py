"""A dump of random keypoints with known matches, made in a moment, for the tests of training."""
import numpy as np

from tools.files import write_json
from tools.geometry import make_pose
from tools.records import write_record


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
        poses = [make_pose(np.eye(3), [0.3 * i, 0.1, 0]) for i in range(images)]
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
