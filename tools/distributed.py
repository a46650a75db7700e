"""One process or many: the same training code under plain Python, one process a GPU, and torchrun."""
import os
import socket
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tools.cli import InputError


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
            values /= self.world_size
        return values

    def any(self, flags: list[bool]) -> list[bool]:
        """Whether a flag is set in any process, for each flag."""
        if self.world_size == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(value) for value in tensor.tolist()]


def choose_devices(gpu: list[int]) -> list[torch.device]:
    """GPUs named by number; [] = all there are; [-1], or a machine without any, = the CPU."""
    available = torch.cuda.device_count()
    if gpu == [-1]:
        return [torch.device("cpu")]
    if available == 0:
        if gpu:
            print(f"no GPU here: gpu {gpu} is left aside, the CPU is used", file=sys.stderr)
        return [torch.device("cpu")]
    missing = [index for index in gpu if not 0 <= index < available]
    if missing:
        raise InputError(f"gpu names {missing[0]}, but there are {available} GPUs (0 to {available - 1})")
    return [torch.device("cuda", index) for index in (gpu or range(available))]


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), or a torch device name such as cpu or cuda:1."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _join(worker, rank: int, world_size: int, device: torch.device, arguments):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    try:
        return worker(Job(rank, world_size, device), *arguments)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _spawned(rank: int, worker, devices, arguments):
    _join(worker, rank, len(devices), devices[rank], arguments)


def launch(worker, gpu: list[int], *arguments):
    """Run `worker(job, *arguments)` in every process of the job.

    Under torchrun this process is one of them, on the GPU that `gpu` names for its local rank; otherwise one process
    a GPU is started here, on a free port, or just this one. A process that fails ends all with its error. Returns
    what the worker returns where it ran in this process.
    """
    devices = choose_devices(gpu)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        device = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]
        return _join(worker, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, arguments)
    if len(devices) == 1:
        return _join(worker, 0, 1, devices[0], arguments)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    mp.spawn(_spawned, (worker, devices, arguments), nprocs=len(devices))
