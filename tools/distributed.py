"""One process or many: the same training code under plain Python, one process a GPU, and torchrun."""
import atexit
import contextlib
import os
import pickle
import re
import signal
import socket
import sys
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tools.cli import InputError, describe_error


@contextlib.contextmanager
def one_thread():
    """One thread for torch in the block: a network on the CPU rounds in another way for each number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Job:
    """This process's place among those of the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes; in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.div_(self.world_size)

    def gather(self, value) -> list:
        """The values of all processes, by rank; anything that can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def choose_devices(gpu: list[int]) -> list[torch.device]:
    """GPUs by number; [] = all there are; [-1], or a machine without any, = the CPU; several -1: so many processes."""
    available = torch.cuda.device_count()
    if set(gpu) == {-1}:
        return [torch.device("cpu")] * len(gpu)
    if not available:
        if gpu:
            print(f"no GPU here: gpu {gpu} is left aside, the CPU is used", file=sys.stderr)
        return [torch.device("cpu")]
    for index in gpu:
        if not 0 <= index < available:
            raise InputError(f"gpu names {index}, but there are {available} GPUs (0 to {available - 1})")
    return [torch.device("cuda", index) for index in gpu or range(available)]


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), or a torch device name such as cpu or cuda:1."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"unknown device {name!r}: auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def _meeting_point(rank: int, world_size: int) -> dist.Store:
    """Where the processes of the job find each other."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    # torchrun keeps the store of an attempt that failed, with the addresses of processes that are gone. On several
    # machines its count of attempts is not the same everywhere.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def _join(worker, rank: int, world_size: int, device: torch.device, arguments):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=_meeting_point(rank, world_size),
                                rank=rank, world_size=world_size)
    result = worker(Job(rank, world_size, device), *arguments)
    if world_size > 1:  # not after an error: both wait for the other processes
        dist.barrier()
        dist.destroy_process_group()
    return result


def leave(status: int):
    """End this process with `status`; if it is one of several, without taking the interpreter apart.

    There, what NCCL and gloo hold can wait for ever, or abort.
    """
    if not (dist.is_torchelastic_launched() or mp.parent_process()):
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _spawned(rank: int, worker, devices, arguments, results):
    if devices[rank].type == "cpu":  # else each would take all cores, and wait for the others
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    try:
        result = _join(worker, rank, len(devices), devices[rank], arguments)
        if rank == 0:
            results.put((result, None))
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(describe_error(error))
        results.put((None, error))
        leave(2)
    leave(0)


def _start(worker, devices: list[torch.device], arguments):
    """Run the worker in a process for each device; returns what that of rank 0 returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(_spawned, (worker, devices, arguments, results), nprocs=len(devices), join=False)

    def pass_on(number, _):
        # to those who know how to stop; what a signal to the whole group sends twice does no harm
        for pid in processes.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    received, ended = [], False
    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended:
            try:
                ended = processes.join(timeout=0.5, grace_period=10)
            finally:
                while not results.empty():
                    received.append(results.get())
    except mp.ProcessExitedException as failed:
        errors = [error for _, error in received if error]
        if errors and not failed.signal_name:
            raise errors[0] from None
        cause = failed.signal_name or "itself"
        raise InputError(f"process {failed.error_index} of {len(devices)} was ended by {cause} (out of memory?); what "
                         "was saved is kept") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return received[0][0]


def launch(worker, gpu: list[int], *arguments):
    """Run `worker(job, *arguments)` in every process of the job.

    Under torchrun this process is one of them, on the GPU that `gpu` names for its local rank; otherwise one process
    a GPU is started here, on a free port, or just this one. A process that fails ends all with its error. Returns
    what the worker returns in the main process.
    """
    devices = choose_devices(gpu)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        device = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]
        return _join(worker, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, arguments)
    if len(devices) == 1:
        return _join(worker, 0, 1, devices[0], arguments)
    return _start(worker, devices, arguments)
