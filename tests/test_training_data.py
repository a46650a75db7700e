import numpy as np
import pytest
import torch

from tests.tiny_dump import make_tiny_dump
from tools.cli import InputError
from tools.geometry import colmap_to_opencv_K
from tools.records import read_record
from training.data import DumpDataset, DumpPairs, StepBatches, choose_keypoints, make_loader, matching_mask


@pytest.fixture
def dump(tmp_path):
    return make_tiny_dump(tmp_path / "dump")


def make_dataset(dump, **options):
    return DumpDataset(dump, **{"max_keypoints": 64, "min_inliers": 8, "max_inliers": 24, **options})


def test_number_of_true_matches_is_drawn_in_range_and_filled_up():
    rng = np.random.default_rng(0)
    matches = np.stack([rng.permutation(200)[:90], rng.permutation(150)[:90]], axis=1)
    counts = []
    for seed in range(200):
        rows0, rows1, target = choose_keypoints(matches, 200, 150, 100, 20, 70, True, np.random.default_rng(seed))
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
    _, _, target = choose_keypoints(matches, 80, 80, 50, 10, 20, True, np.random.default_rng(0))
    assert np.sum(target >= 0) == 2


def test_without_random_inliers_the_most_are_taken():
    matches = np.stack([np.arange(40), np.arange(40)], axis=1)
    _, _, target = choose_keypoints(matches, 90, 90, 60, 5, 30, False, np.random.default_rng(0))
    assert np.sum(target >= 0) == 30


def test_both_sides_are_shuffled():
    matches = np.stack([np.arange(40), np.arange(40)], axis=1)
    target = choose_keypoints(matches, 90, 90, 60, 30, 30, True, np.random.default_rng(0))[2]
    assert np.mean(np.flatnonzero(target >= 0) < 30) < 0.8
    assert np.mean(target[target >= 0] < 30) < 0.8


def test_matching_mask():
    mask = matching_mask(np.array([1, -1, 0]), 4)
    assert mask.tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]


def test_sample_agrees_with_the_records(dump):
    dataset = make_dataset(dump)
    scene, index = dataset.pairs.draw(3)
    sample = dataset[3]
    pair = read_record(dump / "matches" / scene / f"{index}.npy")
    records = [read_record(dump / "keypoints" / scene / f"{pair[f'image_path{v}'].split('/')[-1]}_sift.npy")
               for v in "01"]
    rows = [[int(np.flatnonzero((record["keypoints"] == point).all(axis=1))[0]) for point in sample[f"keypoints{v}"]]
            for v, record in zip("01", records)]
    found = {(rows[0][i], rows[1][j]) for i, j in zip(*np.nonzero(sample["matching_mask"][:-1, :-1]))}
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
    np.testing.assert_allclose(sample["E"], [[0, -z, y], [z, 0, -x], [-y, x, 0]], atol=1e-6)


def test_a_draw_takes_its_share_of_each_scene_and_the_next_draw_differs():
    pairs = DumpPairs({"a": 100, "b": 3}, pairs_per_scene=10, seed=0)
    assert pairs.draw_size == 13
    draws = [[pairs.draw(k) for k in range(start, start + 13)] for start in (0, 13)]
    for draw in draws:
        assert len(set(draw)) == 13
        assert sorted(pair for pair in draw if pair[0] == "b") == [("b", 0), ("b", 1), ("b", 2)]
    assert draws[0] != draws[1]
    assert [scene for scene, _ in draws[0]] != sorted(scene for scene, _ in draws[0])
    assert [DumpPairs({"a": 100, "b": 3}, 10, seed=1).draw(k) for k in range(13)] != draws[0]


def test_same_samples_for_any_number_of_workers(dump):
    dataset = make_dataset(dump)
    runs = [list(make_loader(dataset, StepBatches(0, 3, 4), workers, False)) for workers in (0, 2)]
    assert len(runs[0]) == 3
    for one, other in zip(*runs):
        assert set(one) == set(other)
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert not torch.equal(runs[0][0]["keypoints0"], runs[0][1]["keypoints0"])


def test_a_run_goes_on_with_the_samples_it_would_have_had(dump):
    dataset = make_dataset(dump)
    whole, rest = (list(make_loader(dataset, StepBatches(first, 4, 2), 0, False)) for first in (0, 2))
    assert torch.equal(whole[2]["keypoints0"], rest[0]["keypoints0"])
    assert torch.equal(whole[3]["keypoints0"], rest[1]["keypoints0"])


def test_processes_share_a_batch():
    shares = [list(StepBatches(5, 7, 6, rank, 3)) for rank in range(3)]
    for step, parts in enumerate(zip(*shares)):
        assert all(len(part) == 2 for part in parts)
        assert sorted(k for part in parts for k in part) == list(range((5 + step) * 6, (6 + step) * 6))


def test_dump_with_too_few_keypoints_is_refused(dump):
    with pytest.raises(InputError, match="--min_keypoints 128"):
        make_dataset(dump, max_keypoints=128)


def test_damaged_record_is_named(dump):
    path = next((dump / "keypoints" / "0000").iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    dataset = make_dataset(dump, scenes=["0000"])
    with pytest.raises(InputError, match=path.name):
        for k in range(12):
            dataset[k]
