import multiprocessing

import numpy as np
import pytest
import torch

from tests.tiny_dump import make_consistent, make_tiny_dump
from tools.geometry import colmap_to_opencv_K
from tools.records import read_record, write_record
from training.data import (
    Choice,
    Draws,
    DumpSource,
    Labels,
    Samples,
    choose_keypoints,
    collate,
    end_workers,
    make_loader,
    padded_targets,
    step_batches,
)


@pytest.fixture
def dump(tmp_path):
    return make_tiny_dump(tmp_path / "dump")


def make_dataset(dump, **options):
    return Samples([DumpSource(dump)], Choice(**{"max_keypoints": 64, "min_inliers": 8, "max_inliers": 24, **options}))


def test_number_of_true_matches_is_drawn_in_range_and_filled_up():
    rng = np.random.default_rng(0)
    matches = np.stack([rng.permutation(200)[:90], rng.permutation(150)[:90]], axis=1)
    counts = []
    for seed in range(200):
        rows0, rows1, target = choose_keypoints(matches, 200, 150, Choice(100, 20, 70), np.random.default_rng(seed))
        assert len(set(rows0)) == len(set(rows1)) == 100
        counts.append(np.sum(target >= 0))
        true = {tuple(m) for m in matches}
        chosen = {(rows0[i], rows1[j]) for i, j in enumerate(target) if j >= 0}
        assert chosen <= true
        # what has no target is in no true match at all
        assert not set(rows0[target < 0]) & set(matches[:, 0])
        assert not set(np.delete(rows1, target[target >= 0])) & set(matches[:, 1])
    # 150 - 90 = 60 unmatched keypoints of view 1 leave 40 places that only true matches can fill
    assert min(counts) == 40
    assert max(counts) == 70
    assert len(set(counts)) > 15


def test_all_matches_are_taken_where_there_are_few():
    matches = np.array([[0, 1], [5, 2]])
    _, _, target = choose_keypoints(matches, 80, 80, Choice(50, 10, 20), np.random.default_rng(0))
    assert np.sum(target >= 0) == 2


def test_without_random_inliers_all_are_taken():
    matches = np.stack([np.arange(40), np.arange(40)], axis=1)
    _, _, target = choose_keypoints(matches, 90, 90, Choice(60, 5, 30, random_inliers=False), np.random.default_rng(0))
    assert np.sum(target >= 0) == 40


def test_both_sides_are_shuffled():
    matches = np.stack([np.arange(40), np.arange(40)], axis=1)
    target = choose_keypoints(matches, 90, 90, Choice(60, 30, 30), np.random.default_rng(0))[2]
    assert np.mean(np.flatnonzero(target >= 0) < 30) < 0.8
    assert np.mean(target[target >= 0] < 30) < 0.8


def test_targets():
    target0, target1 = padded_targets(np.array([1, -1, 0]), 3, 3)
    assert target0.tolist() == [1, 3, 0] and target1.tolist() == [2, 0, 3]


def test_what_is_neither_matched_nor_unmatched_is_left_out():
    matches = np.stack([np.arange(40), np.arange(40)], axis=1)
    unmatched = np.arange(90) >= 50, np.arange(80) >= 60
    rows0, rows1, target = choose_keypoints(matches, 90, 80, Choice(60, 5, 30), np.random.default_rng(0), unmatched)
    n = np.sum(target >= 0)
    assert n == 40  # 20 unmatched keypoints of view 1 leave 40 places
    assert set(rows0) < {*range(40), *range(50, 90)} and set(rows1) == {*range(40), *range(60, 80)}
    assert len(rows0) == len(rows1) == 60


def test_labels_of_a_dump_by_distance(dump):
    """What is between a true match and none, or has no depth, is neither."""
    make_consistent(dump)
    source = DumpSource(dump, ["0000"])
    shared0, shared1 = source.pair(0, 0).matches.T
    assert source.pair(0, 0).unmatched is None
    name = source.pair(0, 0).image_paths[0].split("/")[-1]
    path = dump / "keypoints" / "0000" / f"{name}_sift.npy"
    record = read_record(path)
    keypoints, depth = record["keypoints"].copy(), record["depth"].copy()
    keypoints[shared0[:5]] += [4, 0]
    depth[shared0[5:8]] = 0
    keypoints[shared0[8:12]] += [60, 0]
    write_record(path, {**record, "keypoints": keypoints, "depth": depth})
    pair = DumpSource(dump, ["0000"], labels=Labels(3.0, 6.0)).pair(0, 0)
    matches = {tuple(match) for match in pair.matches.tolist()}
    shared = list(zip(shared0.tolist(), shared1.tolist()))
    assert not matches & set(shared[:12])
    assert set(shared[12:]) <= matches
    assert not pair.unmatched[0][shared0[:8]].any() and not pair.unmatched[0][pair.matches[:, 0]].any()
    assert not pair.unmatched[1][shared1[:5]].any() and not pair.unmatched[1][pair.matches[:, 1]].any()
    assert pair.unmatched[0][shared0[8:12]].sum() >= 3  # unless others happen to be where they land now


def test_padding_is_unlabelled():
    target0, target1 = padded_targets(np.array([1, -1]), 3, 4)
    assert target0.tolist() == [1, 4, -1, -1] and target1.tolist() == [4, 0, 4, -1]


def test_sample_agrees_with_the_records(dump):
    dataset = make_dataset(dump)
    scene, index = dataset.sources[0].draws.draw(3)
    sample = dataset[3]
    pair = read_record(dump / "matches" / scene / f"{index}.npy")
    records = [read_record(dump / "keypoints" / scene / f"{pair[f'image_path{v}'].split('/')[-1]}_sift.npy")
               for v in "01"]
    rows = [[int(np.flatnonzero((record["keypoints"] == point).all(axis=1))[0]) for point in sample[f"keypoints{v}"]]
            for v, record in zip("01", records)]
    found = {(rows[0][i], rows[1][j]) for i, j in enumerate(sample["target0"]) if 0 <= j < len(rows[1])}
    assert 8 <= len(found) <= 40
    assert found <= {tuple(match) for match in pair["matches"].tolist()}
    for v, record in zip("01", records):
        np.testing.assert_array_equal(sample[f"descriptors{v}"], record["descriptors"][rows[int(v)]].astype("f4"))
        np.testing.assert_array_equal(sample[f"scores{v}"], record["scores"][rows[int(v)]])
        from_center = sample[f"keypoints{v}"] - [320, 240]
        np.testing.assert_allclose(sample[f"norm_keypoints{v}"], from_center / 448, atol=1e-6)
        np.testing.assert_allclose(sample[f"K{v}"], colmap_to_opencv_K(record["intrinsics"]))
        np.testing.assert_allclose(sample[f"camera_keypoints{v}"], from_center / 500, atol=1e-6)
    np.testing.assert_allclose(sample["T_0to1"], pair["pose1"] @ np.linalg.inv(pair["pose0"]), atol=1e-6)
    assert sample["has_pose"] == 1
    x, y, z = sample["T_0to1"][:3, 3]
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    np.testing.assert_allclose(sample["E"], cross @ sample["T_0to1"][:3, :3], atol=1e-6)


def test_a_draw_takes_its_share_of_each_scene_and_the_next_draw_differs():
    pairs = Draws({"a": 100, "b": 3}, per_group=10, seed=0)
    assert pairs.size == 13
    draws = [[pairs.draw(k) for k in range(start, start + 13)] for start in (0, 13)]
    for draw in draws:
        assert len(set(draw)) == 13
        assert sorted(pair for pair in draw if pair[0] == "b") == [("b", 0), ("b", 1), ("b", 2)]
    assert draws[0] != draws[1]
    assert [scene for scene, _ in draws[0]] != sorted(scene for scene, _ in draws[0])
    assert [Draws({"a": 100, "b": 3}, 10, seed=1).draw(k) for k in range(13)] != draws[0]


def assert_same_batches(runs):
    for batches in zip(*runs, strict=True):
        for name, value in batches[0].items():
            for other in batches[1:]:
                assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name
        assert len({frozenset(batch) for batch in batches}) == 1


def test_same_samples_for_any_number_of_workers(dump):
    dataset = make_dataset(dump)
    runs = [list(make_loader(dataset, step_batches(0, 3, 4), workers, False)) for workers in (0, 2)]
    assert len(runs[0]) == 3
    assert_same_batches(runs)
    assert not torch.equal(runs[0][0]["keypoints0"], runs[0][1]["keypoints0"])


def test_sample_making_processes_outlive_sigterm_and_end_with_the_run(dump):
    batches = iter(make_loader(make_dataset(dump), step_batches(0, 100, 1), 1, False))
    next(batches)
    (process,) = multiprocessing.active_children()
    process.terminate()
    process.join(0.5)
    assert process.is_alive()
    end_workers(batches)
    process.join(5)
    assert not process.is_alive()


def test_a_run_goes_on_with_the_samples_it_would_have_had(dump):
    dataset = make_dataset(dump)
    whole, rest = (list(make_loader(dataset, step_batches(first, 4, 2), 0, False)) for first in (0, 2))
    assert_same_batches([whole[2:], rest])


def test_processes_share_a_batch():
    shares = [list(step_batches(5, 7, 6, rank, 3)) for rank in range(3)]
    for step, parts in enumerate(zip(*shares)):
        assert all(len(part) == 2 for part in parts)
        assert [k for part in parts for k in part] == list(range((5 + step) * 6, (6 + step) * 6))


def test_views_with_few_keypoints_are_padded(dump):
    dataset = make_dataset(dump, max_keypoints=128)  # of 96 that there are
    sample = dataset[0]
    assert sample["mask0"].tolist() == sample["mask1"].tolist() == [True] * 96 + [False] * 32
    assert sample["descriptors0"].shape == (128, 128)
    for v in "01":
        for name in ("keypoints", "norm_keypoints", "camera_keypoints", "scores", "descriptors"):
            assert not sample[name + v][96:].any()
    for v in "01":
        target = sample[f"target{v}"]
        assert (target[:96] >= 0).all() and (target[96:] == -1).all()
        assert (target[:96] < 128).sum() == 40  # all, as nothing else could fill the rest


def test_only_a_batch_with_padding_has_masks(dump):
    full = make_dataset(dump)[0]
    short = {**full, "mask0": np.arange(64) < 50, "mask1": np.arange(64) < 60}
    assert "mask0" not in collate([full, full])
    batch = collate([full, short])
    assert batch["mask0"].dtype == torch.bool
    assert batch["mask0"].sum(dim=1).tolist() == [64, 50]
    assert batch["mask1"].sum(dim=1).tolist() == [64, 60]
    assert batch["names"] == [full["name"]] * 2


def test_descriptors_of_two_precisions_make_one_batch(dump):
    half = make_dataset(dump)[0]
    single = {**half, "descriptors0": half["descriptors0"].astype("f4") + 1e-6}
    assert collate([half, half])["descriptors0"].dtype == torch.float16
    batch = collate([half, single])
    assert batch["descriptors0"].dtype == torch.float32 and batch["descriptors1"].dtype == torch.float16
    np.testing.assert_array_equal(batch["descriptors0"][1], single["descriptors0"])


def test_sources_are_drawn_from_by_weight_and_a_group_from_one(tmp_path):
    sources = [DumpSource(make_tiny_dump(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    dataset = Samples(sources, Choice(64, 8, 24), weights=[3, 1], group=4)
    names = [dataset[k]["name"] for k in range(160)]
    from_b = [str(tmp_path / "b") in name for name in names]
    assert all(len(set(from_b[k:k + 4])) == 1 for k in range(0, 160, 4))
    assert 0.1 < np.mean(from_b) < 0.4
    assert dataset.scenes == ["0000", "0001"] * 2
    assert dataset.draw_size == 24


def test_a_damaged_record_is_replaced_and_told(dump):
    path = next((dump / "keypoints" / "0000").iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    dataset = make_dataset(dump)
    samples = [dataset[k] for k in range(24)]
    told = [sample["skipped"] for sample in samples if sample["skipped"]]
    assert told and all(source == str(dump) and path.name in reason for skips in told for source, reason in skips)
    assert all("descriptors0" in sample for sample in samples)
    assert collate(samples[:12])["skipped"] == [skip for sample in samples[:12] for skip in sample["skipped"]]


@pytest.mark.parametrize("folder, name, damage, said", [
    ("matches", "matches", lambda matches: np.full_like(matches, -1), "keypoints that view 0, of 96, does not have"),
    ("matches", "matches", lambda matches: matches + [0, 96], "keypoints that view 1, of 96, does not have"),
    ("matches", "matches", lambda matches: matches[:, 0], "its matches are (40,), not (40, 2)"),
    ("matches", "pose1", None, "it lacks pose1"),
    ("matches", "matches", lambda matches: matches[[0, 0]], "a keypoint of view 0 is matched twice"),
    ("matches", "matches", lambda matches: matches.astype("f4"), "its matches is of type float32"),
    ("matches", "pose0", np.zeros_like, "its pose0 is not a rotation and translation"),
    ("matches", "pose1", lambda pose: np.nan * pose, "its pose1 has values that are not finite"),
    ("matches", "image_path1", lambda name: "../" + name, "its image_path1 is refused: name '../Undist"),
    ("matches", "image_path0", lambda name: 5, "its image_path0 is of type int64"),
    ("keypoints", "scores", None, "it lacks scores"),
    ("keypoints", "scores", lambda scores: scores[:50], "its scores are (50,), not (96,)"),
    ("keypoints", "keypoints", lambda keypoints: keypoints[:, :1], "its keypoints are (96, 1), not (96, 2)"),
    ("keypoints", "descriptors", lambda values: values[:, :64], "its descriptors are (96, 64), not (96, 128)"),
    ("keypoints", "descriptors", lambda values: values.astype(np.longdouble), "its descriptors is of type float128"),
    ("keypoints", "descriptors", lambda values: values.astype(">f2"), "its descriptors is of type >f2"),
    ("keypoints", "depth", lambda depth: depth * np.inf, "its depth has values that are not finite"),
    ("keypoints", "intrinsics", np.zeros_like, "its intrinsics is not a camera matrix"),
    ("keypoints", "image_size", np.zeros_like, "its image_size is [0, 0], not positive"),
])
def test_a_record_that_says_something_else_is_damaged(dump, folder, name, damage, said):
    """It is whole, and would end training with a traceback, or be trained on."""
    for path in (dump / folder).rglob("*.npy"):
        record = read_record(path)
        value = record.pop(name)
        write_record(path, record if damage is None else {**record, name: damage(value)})
    failed = make_dataset(dump)[0]["failed"]
    assert ".npy is damaged" in failed and said in failed


def test_a_sample_names_the_images_of_the_pair_that_it_is_made_of(dump):
    for path in sorted((dump / "matches" / "0000").glob("*.npy"))[1:]:
        path.write_bytes(b"")
    dataset = make_dataset(dump)
    samples = [dataset[k] for k in range(12)]
    assert any(sample["skipped"] for sample in samples)
    for sample in samples:
        pair = read_record(sample["name"])
        assert sample["image_paths"] == (pair["image_path0"], pair["image_path1"])
    assert collate(samples)["image_paths"] == [sample["image_paths"] for sample in samples]


def test_when_no_pair_can_be_used_it_says_why(dump):
    assert "96 keypoints in a view, 97 are needed" in make_dataset(dump, min_keypoints=97)[0]["failed"]
    assert "40 true matches, 41 are needed" in make_dataset(dump, min_matches=41)[0]["failed"]
    for path in (dump / "matches").rglob("*.npy"):
        path.write_bytes(b"")
    failed = make_dataset(dump)[0]
    assert "is not a whole record" in failed["failed"]
    assert collate([failed]) == failed
