"""How an untrained matcher starts: as published, or as a nearest-neighbour matcher (ours).

Both set weights alone, so that the trained network is the published one. What suits the descriptors of a feature type
is found on samples of a configuration:

    python3 -m training.start --config configs/config_train_open_aliked.json [--key value ...]
"""
import argparse
import sys

import torch

from nets.assignment import assign
from nets.losses import match_counts, matching_loss, targets_of
from tools.cli import InputError, run, whole_number
from tools.features import FEATURE_TYPES, Extractor
from training.config import load_train_config
from training.data import collate
from training.monitor import precision_recall
from training.sources import training_samples

LOGIT_SCALE, BIN_SCORE, RESIDUAL = Extractor.warm_start  # where a feature type has none of its own
SCALES = (15, 18, 20, 22, 25, 30, 39, 50)
BINS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)  # similarities


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


def _gain(logit_scale: float, dim: int) -> float:
    """Of a projection of unit descriptors that gives two equal ones this score."""
    return (logit_scale * dim ** 0.5) ** 0.5


@torch.no_grad()
def warm_start(matcher, logit_scale: float = LOGIT_SCALE, bin_score: float = BIN_SCORE,
               residual: float = RESIDUAL) -> None:
    """Make an untrained matcher a nearest-neighbour matcher, in place.

    logit_scale: score of two equal unit descriptors, of which others have their similarity's share; bin_score: of the
    dustbins; residual: share that is kept of the last layers of the residual branches and of the keypoint encoder. What
    these add is noise at first, which grows from iteration to iteration.
    """
    dim = matcher.final_proj[0].weight.shape[0]
    gain = _gain(logit_scale, dim)
    for proj in matcher.final_proj:
        proj.weight.copy_(gain * torch.eye(dim))
        proj.bias.zero_()
    for end in branch_ends(matcher):
        end.weight.mul_(residual)
        end.bias.mul_(residual)
    matcher.bin_score.fill_(bin_score)


@torch.no_grad()
def starts(batch: dict, iterations: int) -> list[tuple]:
    """The losses of warm starts on a batch: (logit_scale, bin_score, loss, precision, recall) each."""
    targets, masks, found = targets_of(batch), (batch.get("mask0"), batch.get("mask1")), []
    descriptors = [batch[f"descriptors{v}"].float() for v in "01"]
    for scale in SCALES:
        gain = _gain(scale, descriptors[0].shape[2])
        for similarity in BINS:
            assignment = assign(*(gain * x for x in descriptors), torch.tensor(scale * similarity), True, iterations,
                                *masks)
            counts = {name: count.item() for name, count in match_counts(assignment, targets, 0.2).items()}
            found.append((scale, scale * similarity, float(sum(matching_loss(assignment, targets))),
                          *precision_recall(counts).values()))
    return found


def similarities(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the true matches of a batch, and of each unmatched keypoint of view 0 with its nearest one of view 1."""
    target, similarity = batch["target0"], batch["descriptors0"].float() @ batch["descriptors1"].float().mT
    if "mask1" in batch:
        similarity = similarity.masked_fill(~batch["mask1"].unsqueeze(1), -1)
    is_match = (target >= 0) & (target < similarity.shape[2])
    partner = target.clamp(0, similarity.shape[2] - 1).unsqueeze(2)
    return similarity.gather(2, partner)[..., 0][is_match], similarity.amax(2)[target == similarity.shape[2]]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="training.start", description="Which warm start suits a feature type.")
    parser.add_argument("--config", required=True, help="of train.py; any of its keys can be given as --key value")
    parser.add_argument("--samples", type=whole_number(1), default=32)
    args, keys = parser.parse_known_args(argv)
    config = load_train_config(args.config, keys)
    samples = training_samples(config)
    step = samples.group  # neighbours are made of the same views
    batch = collate([samples[step * k] for k in range(args.samples)])
    if "failed" in batch:
        raise InputError(batch["failed"])
    for name, values in zip(("true matches", "nearest of an unmatched keypoint"), similarities(batch)):
        low, median, high = values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"similarity, {name}: median {median:.2f}, 80% in {low:.2f} to {high:.2f}")
    scale, bin_score, _ = FEATURE_TYPES[config["feature"]].warm_start
    print(f"logit_scale  bin_score   loss  precision  recall   (now: {scale:g}, {bin_score:g})")
    for scale, bin_score, loss, precision, recall in sorted(starts(batch, config["sinkhorn_iterations"]),
                                                            key=lambda start: start[2])[:10]:
        print(f"{scale:11g}  {bin_score:9.2f}  {loss:5.2f}  {precision:9.3f}  {recall:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
