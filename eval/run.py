"""Methods over the pairs of a set: poses in other processes if wished, and resumed after an interruption."""
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from eval.iterative import PairMatches
from eval.journal import Journal
from eval.methods import Method, PoseEstimator, PoseSetting, to_data
from eval.pair_sets import EvalPair
from eval.results import PairResult, score_pair, true_correspondences
from tools.cli import InputError, reason
from tools.metrics import pose_auc
from tools.pose import timed
from tools.processes import WorkerPool, in_order

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
            return pool.submit(timed, *arguments).result()
        finally:
            network.acquire()

    data, found = to_data(pair, device), {setting: {} for setting in settings}
    compute = timed if pool is None else estimate_in_pool
    with network:
        for name, method in methods.items():
            estimates = [PoseEstimator(pair, setting, compute) for setting in settings]
            for setting, matches in zip(settings, method.match(data, estimates)):
                found[setting][name] = matches
    return found


def choose_positions(n_pairs: int, limit: int | None) -> list[int]:
    """Which pairs of a set to take: `limit` of them, spread evenly, or all."""
    n_chosen = min(limit or n_pairs, n_pairs)
    return np.linspace(0, n_pairs - 1, n_chosen).round().astype(int).tolist()


def _to_json(rows: list) -> list[dict]:
    return [{"method": name, "estimator": setting.estimator, "threshold": setting.threshold, "seed": setting.seed,
             "result": result.to_json()} for setting, name, result in rows]


def _from_json(content: list[dict]) -> list:
    return [(PoseSetting(row["estimator"], row["threshold"], row["seed"]), row["method"],
             PairResult.from_json(row["result"])) for row in content]


def evaluate(pair_set, methods: dict[str, Method], settings: list[PoseSetting], device="cpu",
             limit: int | None = None, workers: int = 0, journal: Journal | None = None
             ) -> tuple[Results, list[tuple[str, str]]]:
    """Run methods {name: Method} on the pairs of a set (eval.pair_sets), with each of the estimators.

    limit: that many pairs, spread evenly over the set. workers: processes that estimate poses while the network runs
    here; 0: all here, one after the other, which is how times can be compared. Results do not depend on it. journal:
    pairs that are finished in it are not done again, and those done are added; its settings say what methods and
    settings are.
    Returns the results {setting: {method: one per pair}}, and (name, reason) of the pairs skipped, in the set's order.
    """
    results = {setting: {name: [] for name in methods} for setting in settings}
    positions = choose_positions(len(pair_set), limit)
    finished = {} if journal is None else {i: journal.finished[i] for i in positions if i in journal.finished}
    skipped, network, warm = {}, threading.Lock(), threading.Event()
    if journal is not None and journal.n_damaged:
        print(f"{journal.path}: {journal.n_damaged} damaged lines dropped; their pairs are done again", file=sys.stderr)
    if finished:
        print(f"resuming: {len(finished)} of {len(positions)} pairs were done before", file=sys.stderr)

    def read(position):
        start = time.perf_counter()
        try:
            pair = None if position in finished else pair_set[position]
        except Exception as error:
            pair, skipped[position] = None, reason(error)
        return position, pair, time.perf_counter() - start

    def match(item):
        position, pair, seconds = item
        if pair is None:
            return position, _from_json(finished.get(position, []))
        try:
            true0 = true_correspondences(pair)
            if not warm.is_set():  # times are those of a device at work: the first pair waits for what is made once
                run_pair(pair, methods, settings, device, pool, network)
                warm.set()
            found = run_pair(pair, methods, settings, device, pool, network)
            return position, [(setting, name, score_pair(pair, matches, true0, seconds))
                              for setting, by_method in found.items() for name, matches in by_method.items()]
        except Exception as error:
            skipped[position] = reason(error)
            return position, []

    # one thread more than processes: one pair is matched here meanwhile
    threads, pool = (ThreadPoolExecutor(workers + 1), WorkerPool(workers)) if workers else (None, None)
    try:
        with tqdm(total=len(positions), desc="pairs", disable=None) as progress:
            for position, rows in in_order(threads, match, map(read, positions), ahead=2 * workers + 1):
                if journal is not None and rows and position not in finished:
                    journal.add(position, _to_json(rows))
                for setting, name, result in rows:
                    results[setting][name].append(result)
                progress.update()
                *_, (name, last) = results[settings[0]].items()
                if errors := pose_errors(last):
                    progress.set_postfix_str(f"{name} AUC@10 {100 * pose_auc(errors, [10])[0]:.1f}")
    except KeyboardInterrupt:
        if journal is not None:
            n_done = len(finished) + journal.n_added
            print(f"{n_done} pairs are done: the same command resumes from there", file=sys.stderr)
        raise
    except BrokenProcessPool:
        raise InputError("a process that estimates poses was killed (out of memory?): the same command resumes; give "
                         "it fewer --workers") from None
    finally:
        if pool is not None:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(cancel_futures=True)
    # what makes several pairs of one name unusable is said once
    return results, list(dict.fromkeys((pair_set.name(position), skipped[position]) for position in sorted(skipped)))


def pose_errors(results: list[PairResult]) -> list[float]:
    """Pose errors of the pairs whose pose is known."""
    return [result.error for result in results if result.error is not None]
