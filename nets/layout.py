"""Weights as published, and as the matchers hold them: the same names, in another layout.

Published: pointwise layers are 1x1 convolutions, weights (out, in, 1), and channel c of a projection belongs to head
c mod 4. Here: matrices (out, in), and the channels of a head lie together. `Matcher.state_dict` and
`Matcher.load_state_dict` speak the published layout, and so do all files.
"""
from torch import Tensor

N_HEADS = 4


def _transpose_heads(name: str, value: Tensor, sizes: tuple[int, int]) -> Tensor:
    """A parameter whose channels of heads, seen as a matrix of these sizes, are transposed; others as they are."""
    if name.startswith("gnn.") and ".proj." in name:  # rows: channels of queries, keys, values
        return value.unflatten(0, sizes).transpose(0, 1).flatten(0, 1)
    if name.endswith(".merge.weight"):  # columns: channels of messages
        return value.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)
    return value


def from_published(name: str, value: Tensor) -> Tensor:
    """A parameter in the published layout, or anything of its shape (Adam's moments), as it is held here."""
    return _transpose_heads(name, value.squeeze(-1) if value.ndim == 3 else value, (-1, N_HEADS))


def to_published(name: str, value: Tensor) -> Tensor:
    """The inverse of `from_published`."""
    value = _transpose_heads(name, value, (N_HEADS, -1))
    return value.unsqueeze(-1) if value.ndim == 2 else value
