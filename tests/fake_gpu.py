"""Devices of which only shapes, types and places of tensors are there, to see what a GPU would say.

    python3 -m tests.fake_gpu   # forward passes in training mode on tensors of "cuda", a line each
"""
import contextlib
import ctypes
import itertools
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.benchmark import two_views
from nets import build_matcher

aten = torch.ops.aten
DEVICE = torch.device("meta")  # the backward pass on fake tensors of "cuda" takes a build of torch for it
DIM, N, BATCH = 32, 40, 2


def make_matcher(kind: str, norm_fn="in", n_layers=5):
    return build_matcher(kind, descriptor_dim=DIM, n_layers=n_layers, n_min_tokens=16, sinkhorn_iterations=3,
                         norm_fn=norm_fn)


def make_batch(masks: bool, device) -> dict:
    data = two_views(N, DIM, BATCH, device, supervised=True)
    for v in "01":
        data[f"camera_keypoints{v}"] = data[f"norm_keypoints{v}"]
        if masks:
            data[f"mask{v}"] = torch.arange(N, device=device).expand(BATCH, N) < N - 4
    return {**data, "has_pose": torch.ones(BATCH, device=device)}


@contextlib.contextmanager
def fake_gpu(value: int = 0):
    """In the block, tensors on DEVICE are fake and those on the CPU real; tensors of both in one operation are an
    error, and each time the host waits for the device is an entry of `waits` of what this yields.

    What the host reads from the device is `value` throughout; nonzero and boolean indices select everything. Waiting
    inside an operation, as a GPU's eigh does to see whether it converged, is not seen.
    """
    autocast, nothing = torch.autocast, contextlib.nullcontext
    with mock.patch.multiple(
            torch,  # DEVICE has no autocast; in inference mode operations are not divided before they are seen here
            autocast=lambda kind, *args, **options: (
                nothing() if kind == DEVICE.type else autocast(kind, *args, **options)),
            inference_mode=lambda mode=True: torch.no_grad() if mode else nothing()), _FakeGpu(value) as gpu:
        yield gpu


class _FakeGpu(TorchDispatchMode):
    def __init__(self, value: int):
        super().__init__()
        self.value, self.waits = value, []
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if not any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))) and device != DEVICE:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.waits.append("item")
            return self.value
        if func is aten._to_copy.default and device is not None and torch.device(device).type == "cpu":
            self.waits.append("to cpu")
            return torch.full(args[0].shape, self.value, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._to_copy.default and args[0].device.type == "cpu" and not kwargs.get("non_blocking"):
            self.waits.append("to gpu")
        with self.fake:
            if func is aten.nonzero.default:
                self.waits.append("nonzero")
                return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
            if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
                self.waits.append("boolean index")
                indices = [[i] if i is None or i.dtype != torch.bool else
                           i.new_empty((i.ndim, i.numel()), dtype=torch.int64).unbind() for i in args[1]]
                args = (args[0], [i for several in indices for i in several])
            return func(*args, **kwargs)


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.CUDA


def _allow_cuda_tensors() -> None:
    """Let this process have fake tensors of "cuda" whatever torch was built for.

    A build without CUDA lacks the guard of CUDA's current device; the one that Python can make for a device of its own
    takes the place.
    """
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())
    own, cuda = (int(getattr(torch._C._autograd.DeviceType, name)) for name in ("PrivateUse1", "CUDA"))
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (own + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[cuda] = guards[own]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda: True


def _main() -> None:
    if not torch.cuda.is_available():
        _allow_cuda_tensors()
    baddbmm = torch.baddbmm
    for kind, precision in itertools.product(("gm", "imp", "eimp"), (torch.float32, torch.bfloat16)):
        projected, steps = [], set()

        def step(*args, steps=steps):
            result = baddbmm(*args)
            steps.add(result.dtype)
            return result

        with FakeTensorMode(), torch.autocast("cuda", precision, enabled=precision != torch.float32):
            with torch.device("cuda"):
                matcher = make_matcher(kind).train()
            matcher.final_proj[0].register_forward_hook(lambda *args, seen=projected: seen.append(args[-1].dtype))
            with mock.patch.object(torch, "baddbmm", step):
                out = matcher(make_batch(True, "cuda"), pose_weight=1.0)
        print(f"{kind}: projection {projected[0]}, Sinkhorn {steps}, loss {out['loss'].dtype} {out['loss'].device}")


if __name__ == "__main__":
    _main()
