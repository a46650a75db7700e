"""Weights as published, and as the matchers hold them: the same names, in another layout.

Published: pointwise layers are 1x1 convolutions, weights (out, in, 1), and channel c of a projection belongs to head
c mod 4. Here: matrices (out, in), and the channels of a head lie together. `Matcher.state_dict` and
`Matcher.load_state_dict` speak the published layout, and so do all files.
"""
from torch import Tensor

N_HEADS = 4


def _is_projection(name: str) -> bool:
    """Whether a parameter's rows are channels of heads: queries, keys, values."""
    return name.startswith("gnn.") and ".proj." in name


def _is_merge(name: str) -> bool:
    """Whether a parameter's columns are channels of heads."""
    return name.endswith(".merge.weight")


def from_published(name: str, value: Tensor) -> Tensor:
    """A parameter in the published layout, or anything of its shape (Adam's moments), as it is held here."""
    value = value.squeeze(-1) if value.ndim == 3 else value
    if _is_projection(name):
        return value.unflatten(0, (-1, N_HEADS)).transpose(0, 1).flatten(0, 1)
    if _is_merge(name):
        return value.unflatten(1, (-1, N_HEADS)).transpose(1, 2).flatten(1, 2)
    return value


def to_published(name: str, value: Tensor) -> Tensor:
    """The inverse of `from_published`."""
    if _is_projection(name):
        value = value.unflatten(0, (N_HEADS, -1)).transpose(0, 1).flatten(0, 1)
    elif _is_merge(name):
        value = value.unflatten(1, (N_HEADS, -1)).transpose(1, 2).flatten(1, 2)
    return value.unsqueeze(-1) if value.ndim == 2 else value
