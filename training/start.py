"""How an untrained matcher starts: as a nearest-neighbour matcher, or as one that is guided by its neighbours.

Both are ours (SPEC 10 has the first). They set weights alone, so that the trained network is the published one.
"""
import math

import torch
from torch import Tensor

from nets.layers import N_HEADS

LOGIT_SCALE = 39.0  # of a perfect match; 21 * 21 / sqrt(128)
RESIDUAL = 0.02
BIN_SCORE = 30.0

# Waves over the image plane: (radians per unit of normalised keypoints, degrees). The first N_GUIDES guide attention.
WAVES = ((4, 0), (4, 90), (10, 0), (10, 90), (2.2, 0), (2.2, 60), (2.2, 120), (6, 45), (6, 135), (12, 30), (12, 90),
         (12, 150))
N_GUIDES = 4
FIT_STEPS = 3000
CODE_SPREAD = 0.4  # standard deviation of the keypoints of a view, in units of normalised keypoints
ROW_SCALE = 30.0  # makes what a norm standardises large against its eps
NEIGHBOURHOODS = (3.0, 6.0, 15.0)  # logits between a keypoint and itself, of three heads: the higher, the narrower
LIKENESS = 60.0  # logits between two descriptors of length 1 that are the same
SELF_LIKENESS = 20.0  # the same within a view
EXPECTATION = 24.0  # logits at most for lying where it is expected
ATTRACTION = 0.07  # share of the way that descriptors go towards those they attend to


def branch_ends(matcher) -> list:
    """The last layers of the residual branches and of the keypoint encoder."""
    return [branch[-1] for branch in [*(layer.mlp for layer in matcher.gnn.layers), matcher.kenc.encoder]]


@torch.no_grad()
def published_start(matcher) -> None:
    """Queries, keys and values start as copies of the output projection, as published, in place."""
    for layer in matcher.gnn.layers:
        if hasattr(layer, "attn"):
            for proj in layer.attn.proj:
                proj.load_state_dict(layer.attn.merge.state_dict())


@torch.no_grad()
def warm_start(matcher) -> None:
    """Make an untrained matcher a nearest-neighbour matcher (SPEC 10), in place."""
    dim = matcher.final_proj[0].weight.shape[0]
    for proj in matcher.final_proj:
        proj.weight.copy_(_logit_gain(dim) * torch.eye(dim).unsqueeze(-1))
        proj.bias.zero_()
    for end in branch_ends(matcher):
        end.weight.mul_(RESIDUAL)
        end.bias.mul_(RESIDUAL)
    matcher.bin_score.fill_(BIN_SCORE)


def _logit_gain(dim: int) -> float:
    return (LOGIT_SCALE * dim ** 0.5) ** 0.5


def position_code(norm_keypoints: Tensor) -> Tensor:
    """Normalised keypoints (..., 2) -> cosines and sines of WAVES, of length 1 (..., 2 len(WAVES)).

    The product of two codes is a bump over the distance of their keypoints.
    """
    lengths, angles = torch.tensor(WAVES).T
    angles = torch.deg2rad(angles)
    phases = norm_keypoints @ (lengths * torch.stack([angles.cos(), angles.sin()]))
    return torch.cat([phases.cos(), phases.sin()], dim=-1) / math.sqrt(len(WAVES))


def _layouts(n_samples: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Made-up keypoints of views, normalised (B, N, 2), and their scores (B, N): everywhere, in a part, in clusters."""
    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    corner = 0.4 * uniform(n_samples, 1, 2)
    places = uniform(n_samples, n, 2)
    in_part = corner + (1 - corner) * places
    of_cluster = torch.randint(12, (n_samples, n, 1), generator=generator).expand(-1, -1, 2)
    spread = 0.08 * torch.randn(n_samples, n, 2, generator=generator)
    clustered = uniform(n_samples, 12, 2).gather(1, of_cluster) + spread
    kind = torch.randint(3, (n_samples, 1, 1), generator=generator)
    places = torch.where(kind == 0, places, torch.where(kind == 1, in_part, clustered)).clamp(0, 1)
    half = torch.tensor([0.714, 0.536])  # of an image of 4 to 3
    scores = torch.exp(0.7 * torch.randn(n_samples, n, generator=generator) - 3.5)
    return (2 * places - 1) * half, scores


def _fit_encoder(encoder, basis: Tensor, seed: int) -> None:
    """Teach a keypoint encoder to give position codes in the directions `basis` (D, n).

    The norms take a view's mean and scale away, so the code is of keypoints that have a mean of 0 and a fixed spread.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder.encoder[-1].reset_parameters()
    optimizer = torch.optim.Adam(encoder.parameters())
    for step in range(FIT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / FIT_STEPS))
        keypoints, scores = _layouts(4, 256, generator)
        spread = keypoints - keypoints.mean(dim=1, keepdim=True)
        spread = CODE_SPREAD * spread / spread.std(dim=1, keepdim=True)
        error = encoder(keypoints, scores, None) - position_code(spread) @ basis.T
        loss = error.square().sum(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = encoder.encoder[-1]
    with torch.no_grad():
        end.weight.copy_((basis @ basis.T @ end.matrix).unsqueeze(-1))
        end.bias.copy_(basis @ basis.T @ end.bias)


def _of_head(linear, head: int, rows: Tensor) -> None:
    """Let a projection give one head `rows` (n, D) of its input, and zeros."""
    own = torch.zeros_like(linear.matrix[head::N_HEADS])
    own[:len(rows)] = rows
    linear.weight[head::N_HEADS] = own.unsqueeze(-1)
    linear.bias[head::N_HEADS] = 0


def _write(mlp, pieces: list[tuple[Tensor, Tensor]]) -> None:
    """Let a branch write linear functions of its input: out (D, n) @ standardised(rows (n, 2 D) @ input), each piece.

    Each takes two hidden channels: relu(z) - relu(-z) = z, where the norm has standardised z.
    """
    rows, out = torch.cat([rows for rows, _ in pieces]), torch.cat([out for _, out in pieces], dim=1)
    rows = ROW_SCALE * torch.cat([rows, -rows])
    mlp[0].weight[:len(rows)] = rows.unsqueeze(-1)
    mlp[0].bias[:len(rows)] = 0
    mlp[-1].weight[:, :len(rows)] = torch.cat([out, -out], dim=1).unsqueeze(-1)


def guided_start(matcher, descriptors: Tensor, seed: int) -> None:
    """Make an untrained matcher one that looks for a keypoint's match where its neighbours' matches lie, in place.

    descriptors (N, D): a sample of what it will get. The directions in which descriptors vary least make room for two
    codes of a position: where the keypoint is, from the encoder, and where its match is expected, nothing at first.
    Self-attention looks at keypoints nearby, and takes the mean of where theirs are expected; cross-attention looks at
    keypoints that look alike and lie where expected, takes their place for the expected one, and pulls the descriptor a
    little towards theirs. What is left of heads and channels starts at random. For networks with instance norm and
    ReLU.
    """
    dim = descriptors.shape[1]
    n_code, head_dim = 2 * len(WAVES), dim // N_HEADS
    second_moment = descriptors.T.double() @ descriptors.double() / len(descriptors)
    basis = torch.linalg.eigh(second_moment).eigenvectors.flip(1).float()  # most energy first
    looks, place, expected = basis.split([dim - 2 * n_code, n_code, n_code], dim=1)
    warm_start(matcher)
    _fit_encoder(matcher.kenc, place, seed)
    with torch.no_grad():
        for proj in matcher.final_proj:
            proj.weight.copy_(_logit_gain(dim) * (looks @ looks.T).unsqueeze(-1))
        spreads = (descriptors @ looks[:, :head_dim]).std(dim=0)
        for i, layer in enumerate(matcher.gnn.layers):
            _guide(layer, looks, place, expected, spreads, is_cross=i % 2 == 1, is_first=i < 2)


def _guide(layer, looks: Tensor, place: Tensor, expected: Tensor, spreads: Tensor, is_cross: bool,
           is_first: bool) -> None:
    """As `guided_start` says, one layer. looks (D, m), place (D, n), expected (D, n): directions of its input."""
    dim, n_code = place.shape
    head_dim = dim // N_HEADS
    scale = head_dim ** 0.25  # what logits are divided by, half in queries and half in keys
    n_guides = 2 * N_GUIDES
    guides = [*range(N_GUIDES), *range(len(WAVES), len(WAVES) + N_GUIDES)]
    n_looks = head_dim - n_guides
    if hasattr(layer, "attn"):
        query, key, value = layer.attn.proj
        merge = layer.attn.merge
        for head in range(N_HEADS):
            if is_cross:
                likeness = LIKENESS ** 0.5 * scale * looks[:, n_looks * (head % 3):][:, :n_looks].T
                expectation = 0 if is_first else (EXPECTATION * len(WAVES) / N_GUIDES) ** 0.5 * scale
                _of_head(query, head, torch.cat([likeness, expectation * expected[:, guides].T]))
                _of_head(key, head, torch.cat([likeness, expectation * place[:, guides].T]))
            else:
                rows = (NEIGHBOURHOODS[head] ** 0.5 * place if head < 3 else
                        SELF_LIKENESS ** 0.5 * looks[:, :head_dim]).T
                _of_head(query, head, scale * rows)
                _of_head(key, head, scale * rows)
    else:
        value, merge = layer.proj, layer.merge
    for head in range(N_HEADS):
        mix = torch.linalg.qr(torch.randn(looks.shape[1], head_dim)).Q.T @ looks.T
        if head == 3:
            rows = looks[:, :head_dim].T if is_cross else mix
        else:
            rows = torch.cat([(place if is_cross else expected).T, mix[n_code:]])
        _of_head(value, head, rows)
    merge.weight.copy_(torch.eye(dim).unsqueeze(-1))
    merge.bias.zero_()

    def of_message(head: int, n: int) -> Tensor:
        """Rows (n, 2 D) that take the first n channels of a head from [x, message]."""
        return torch.eye(2 * dim)[dim + head:: N_HEADS][:n]

    def of_x(directions: Tensor) -> Tensor:
        return torch.cat([directions.T, torch.zeros(directions.shape[1], dim)], dim=1)

    heads = range(3) if is_cross else range(2)  # the narrowest neighbourhood is for what is learned
    code = expected / n_code ** 0.5
    pieces = []
    if is_cross or not is_first:
        pieces.append((sum(of_message(head, n_code) for head in heads), code))
    if not is_first:
        pieces.append((of_x(expected), -code))
    if is_cross:
        seen = looks[:, :head_dim]
        pieces.append((of_message(3, head_dim) - of_x(seen), ATTRACTION * seen * spreads))
    if pieces:
        _write(layer.mlp, pieces)
