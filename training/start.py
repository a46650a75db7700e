"""How an untrained matcher starts: as published, or as a nearest-neighbour matcher (ours).

Both set weights alone, so that the trained network is the published one.
"""
import torch

LOGIT_SCALE = 39.0  # of a perfect match; 21 * 21 / sqrt(128)
RESIDUAL = 0.02


def branch_ends(matcher) -> list:
    """The last layers of the residual branches and of the keypoint encoder."""
    return [branch[-1] for branch in [*(layer.mlp for layer in matcher.gnn.layers), matcher.kenc.encoder]]


@torch.no_grad()
def published_start(matcher) -> None:
    """Queries, keys and values start as copies of the output projection, in the published layout, in place."""
    state = matcher.state_dict()
    for name in state:
        if ".attn.proj." in name:
            layer, _, entry = name.partition(".proj.")
            state[name] = state[f"{layer}.merge{entry[1:]}"]
    matcher.load_state_dict(state)


@torch.no_grad()
def warm_start(matcher, bin_score: float = 30.0) -> None:
    """Make an untrained matcher a nearest-neighbour matcher, in place.

    bin_score: of the dustbins; between the scores of true matches and those of unmatched keypoints' nearest neighbours.
    """
    dim = matcher.final_proj[0].weight.shape[0]
    gain = (LOGIT_SCALE * dim ** 0.5) ** 0.5
    for proj in matcher.final_proj:
        proj.weight.copy_(gain * torch.eye(dim))
        proj.bias.zero_()
    for end in branch_ends(matcher):
        end.weight.mul_(RESIDUAL)
        end.bias.mul_(RESIDUAL)
    matcher.bin_score.fill_(bin_score)
