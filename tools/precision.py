"""The precisions that networks compute in: what each is, what a device has of its own, and the layers that take it."""
import contextlib
import functools
import sys
from collections.abc import Iterable

import torch

from tools.cli import InputError

PRECISIONS = ("float32", "tf32", "bfloat16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself, rather than emulating it: AVX512-BF16 or AMX of a CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_precision(precision: str, device: torch.device) -> str:
    """One of PRECISIONS as the device can do it: tf32 is float32 on a CPU, which a line on stderr says.

    A line also says that a CPU emulates bfloat16; InputError for a GPU that would, and for anything else.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision == "bfloat16" and not has_bfloat16(device):
        if device.type == "cuda":
            raise InputError(f"precision bfloat16: {torch.cuda.get_device_name(device)} has none and would only "
                             "emulate it; take float32")
        print("precision bfloat16: this CPU has none and emulates it; float32 is faster", file=sys.stderr)
    if precision == "tf32" and device.type != "cuda":
        print("precision tf32: on a CPU that is float32", file=sys.stderr)
        return "float32"
    return precision


def autocast(precision: str, device: torch.device):
    """The linear layers and attention of the block in bfloat16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextlib.contextmanager
def tf32(precision: str):
    """The products of float32 of the block in TF32 on GPUs, if that is the precision; torch's setting is put back."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def set_precision(layers: Iterable[torch.nn.Module], precision: str) -> None:
    """Let the forward pass of these layers compute in one of PRECISIONS; they take and give what they did."""
    def forward(layer_forward, device: torch.device, *inputs, **options):
        with autocast(precision, device), tf32(precision):
            return layer_forward(*inputs, **options)

    if precision != "float32":
        for layer in layers:
            layer.forward = functools.partial(forward, layer.forward, next(layer.parameters()).device)
