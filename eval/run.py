"""Methods over the pairs of a set: poses in other processes if wished, and resumed after an interruption."""
import contextlib
import itertools
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from eval.iterative import PairMatches
from eval.journal import Journal
from eval.methods import Method, PoseEstimator, PoseSetting, to_data
from eval.pair_sets import EvalPair
from eval.results import STAGES, PairResult, score_pair, true_correspondences
from tools.cli import InputError, reason
from tools.metrics import pose_auc
from tools.pose import timed_estimate_pose
from tools.processes import WorkerPool

Results = dict[PoseSetting, dict[str, list[PairResult]]]


def run_pair(pair: EvalPair, methods: dict[str, Method], settings: list[PoseSetting], device="cpu", pool=None,
             network=None) -> dict[PoseSetting, dict[str, PairMatches]]:
    """All methods on one pair with all estimators: {setting: {method: PairMatches}}.

    pool: processes that estimate poses, or None. network: a lock held while the methods compute here, so that they
    share the network with other threads; it is open while a pose is estimated in the pool.
    """
    network = network or threading.Lock()

    def estimate_in_pool(*arguments):
        network.release()
        try:
            return pool.submit(timed_estimate_pose, *arguments).result()
        finally:
            network.acquire()

    data, found = to_data(pair, device), {setting: {} for setting in settings}
    compute = timed_estimate_pose if pool is None else estimate_in_pool
    with network:
        for name, method in methods.items():
            estimates = [PoseEstimator(pair, setting, compute) for setting in settings]
            for setting, matches in zip(settings, method.match(data, estimates)):
                found[setting][name] = matches
    return found


def choose_positions(n_pairs: int, limit: int | None) -> np.ndarray:
    """Which pairs of a set to take: `limit` of them, spread evenly, or all."""
    if limit is None or limit >= n_pairs:
        return np.arange(n_pairs)
    return np.unique(np.linspace(0, n_pairs - 1, limit).round().astype(int))


def _to_json(rows: list) -> list[dict]:
    return [{"method": name, "estimator": setting.estimator, "threshold": setting.threshold, "seed": setting.seed,
             "result": result.to_json()} for setting, name, result in rows]


def _from_json(content: list, position: int, settings: list[PoseSetting], methods) -> list:
    """Rows (setting, method, result) of a finished pair; InputError, or whatever comes of it, if they are not those."""
    rows = [(PoseSetting(row["estimator"], row["threshold"], row["seed"]), row["method"],
             PairResult.from_json(row["result"])) for row in content]
    there = Counter((setting, name) for setting, name, _ in rows)
    alike = {(result.index, result.names, result.error is None) for *_, result in rows}
    if not (there == Counter(itertools.product(settings, methods)) and len(alike) == 1 and min(alike)[0] == position
            and all(result.seconds.keys() >= set(STAGES) for *_, result in rows)):
        raise InputError("these are not the results of this pair")
    return rows


def _finished(journal: Journal | None, positions, settings, methods) -> dict[int, list]:
    """{position: rows} of the pairs that a journal holds; what is damaged in it is left out, and its number said."""
    if journal is None:
        return {}
    finished, n_damaged = {}, journal.n_damaged
    for position in map(int, positions):
        if position in journal.finished:
            try:
                finished[position] = _from_json(journal.finished[position], position, settings, methods)
            except Exception:
                n_damaged += 1
    if n_damaged:
        print(f"{journal.path}: {n_damaged} damaged lines dropped; their pairs are done again", file=sys.stderr)
    if finished:
        print(f"resuming: {len(finished)} of {len(positions)} pairs were done before", file=sys.stderr)
    return finished


def evaluate(pair_set, methods: dict[str, Method], settings: list[PoseSetting], device="cpu",
             limit: int | None = None, workers: int = 0, journal: Journal | None = None
             ) -> tuple[Results, list[tuple[str, str]]]:
    """Run methods {name: Method} on the pairs of a set (eval.pair_sets), with each of the estimators.

    limit: that many pairs, spread evenly over the set. workers: processes that estimate poses while the network runs
    here; 0: all here, one after the other, which is how times can be compared. Results do not depend on it. journal:
    pairs that are finished in it are not done again, and those done are added.
    Returns the results {setting: {method: one per pair}}, and (name, reason) of the pairs skipped, in the set's order.
    """
    results = {setting: {name: [] for name in methods} for setting in settings}
    positions = choose_positions(len(pair_set), limit)
    finished, skipped = _finished(journal, positions, settings, methods), {}

    def read():
        for position in map(int, positions):
            if position in finished:
                yield position, None, 0.0
                continue
            start = time.perf_counter()
            try:
                yield position, pair_set[position], time.perf_counter() - start
            except Exception as error:
                skipped[position] = reason(error)

    def match(item):
        position, pair, seconds = item
        if pair is None:
            return position, finished[position]
        try:
            return position, score(pair, seconds)
        except Exception as error:
            skipped[position] = reason(error)
            return position, []

    def score(pair, seconds):
        true0 = true_correspondences(pair)
        found = run_pair(pair, methods, settings, device, pool, network)
        return [(setting, name, score_pair(pair, matches, true0, seconds))
                for setting, by_method in found.items() for name, matches in by_method.items()]

    progress = tqdm(total=len(positions), desc="pairs", disable=None)
    network = threading.Lock()
    try:
        with progress, pose_pool(workers) as pool:
            for position, rows in _in_order(match, read(), workers):
                if journal is not None and rows and position not in finished:
                    journal.add(position, _to_json(rows))
                for setting, name, result in rows:
                    results[setting][name].append(result)
                *_, (name, of_last) = results[settings[0]].items()
                progress.update(len(skipped) + len(of_last) - progress.n)
                if errors := pose_errors(of_last):
                    progress.set_postfix_str(f"{name} AUC@10 {100 * pose_auc(errors, [10])[0]:.1f}")
    except KeyboardInterrupt:
        if journal is not None:
            n_done = len(finished) + journal.n_added
            print(f"{n_done} pairs are done: the same command resumes from there", file=sys.stderr)
        raise
    return results, [(pair_set.name(position), skipped[position]) for position in sorted(skipped)]


def pose_errors(results: list[PairResult]) -> list[float]:
    """Pose errors of the pairs whose pose is known."""
    return [result.error for result in results if result.error is not None]


def _in_order(function, items, workers: int):
    """Yield function(item) in order; with workers, one more thread than them computes a bounded number ahead."""
    if not workers:
        yield from map(function, items)
        return
    threads = ThreadPoolExecutor(workers + 1)
    waiting = deque(threads.submit(function, item) for item in itertools.islice(items, 2 * workers + 1))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(threads.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def pose_pool(workers: int):
    """A pool of processes, or None for 0 of them; InputError if one of them was killed from outside."""
    if not workers:
        yield None
        return
    pool = WorkerPool(workers)
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError("a process that estimates poses was killed (out of memory?): the same command resumes; give "
                         "it fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
