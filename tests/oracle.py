"""eval/straightforward.py, with what only tests need: pooling, matches and losses one keypoint at a time."""
import torch

from eval.straightforward import Straightforward


class Oracle(Straightforward):
    """As `Straightforward`; match_threshold: score of a match in the counts of `train`."""

    def __init__(self, kind, state, norm_fn="in", ac_fn="relu", with_sinkhorn=True, n_min_tokens=256,
                 match_threshold=0.2, training=False):
        super().__init__(kind, state, norm_fn, ac_fn, with_sinkhorn, n_min_tokens, training)
        self.match_threshold = match_threshold

    def pool(self, p, keep, mass_self, mass_cross, threshold):
        """The indices among `keep` that stay. p: assignment of the kept; masses: of all keypoints."""
        if len(keep) <= self.n_min_tokens:
            return keep
        matched = [k for row, k in zip(p[:-1, :-1], keep.tolist()) if row.sum() >= threshold]
        if not matched:
            return keep
        medians = [sorted(mass[k].item() for k in matched)[(len(matched) - 1) // 2] for mass in (mass_self, mass_cross)]
        return torch.tensor([k for k in keep.tolist()
                             if k in matched or mass_self[k] >= medians[0] or mass_cross[k] >= medians[1]])

    def match_all(self, data, threshold=0.2, pool_threshold=0.1):
        """matches0, scores0 (L, B, n0)."""
        n0 = data["descriptors0"].shape[1]
        matches0, scores0 = [], []
        for of_iteration in self.run(data, pool_threshold):
            for p, keep0, keep1 in of_iteration:
                matches, scores = torch.full((n0,), -1), torch.zeros(n0, dtype=p.dtype)
                for i, row in enumerate(p[:-1, :-1]):
                    j = row.argmax()
                    if p[:-1, j].argmax() == i:
                        at = i if keep0 is None else keep0[i]
                        scores[at] = row[j]
                        if row[j] > threshold:
                            matches[at] = j if keep1 is None else keep1[j]
                matches0.append(matches)
                scores0.append(scores)
        shape = (self.n_layers, -1, n0)
        return torch.stack(matches0).view(shape), torch.stack(scores0).view(shape).detach()

    def train(self, data, gt0):
        """Matching loss and counts as in golden vectors, a dict; gt0 (B, n0): true index in view 1, or -1."""
        sums = dict.fromkeys(("matching_loss_corr", "matching_loss_incorr", "acc_corr", "acc_incorr", "total_acc_corr",
                              "total_acc_incorr"), 0.0)
        for of_iteration in self.run(data):
            n_samples = len(of_iteration)
            columns, rows = [], []
            for b, (p, keep0, keep1) in enumerate(of_iteration):
                keep0, keep1 = ((range(n - 1) if keep is None else keep.tolist())
                                for keep, n in ((keep0, len(p)), (keep1, p.shape[1])))
                pairs = [(i, keep1.index(j)) for i, j in enumerate(gt0[b, list(keep0)].tolist()) if j in keep1]
                bins0 = sorted(set(range(len(keep0))) - {i for i, _ in pairs})
                bins1 = sorted(set(range(len(keep1))) - {j for _, j in pairs})
                log = torch.log(p + 1e-8)
                if pairs:
                    sums["matching_loss_corr"] += -sum(log[i, j] for i, j in pairs) / len(pairs) / n_samples
                if bins0:
                    columns.append(-log[bins0, -1].mean())
                if bins1:
                    rows.append(-log[-1, bins1].mean())
                found = {keep0[i]: keep1[j] for i, j in self.mutual(p).items()}
                for i, j in enumerate(gt0[b].tolist()):
                    kind = "incorr" if j < 0 else "corr"
                    sums[f"acc_{kind}"] += (found.get(i, -1) == j) / n_samples
                    sums[f"total_acc_{kind}"] += 1 / n_samples
            sums["matching_loss_incorr"] += sum(sum(side) / len(side) for side in (columns, rows) if side) / 2
        out = {name: value / self.n_layers for name, value in sums.items()}
        return {"loss": out["matching_loss_corr"] + out["matching_loss_incorr"], **out}

    def mutual(self, p):
        """{row: column} of the matches."""
        inner = p[:-1, :-1]
        best = [(i, row.argmax().item()) for i, row in enumerate(inner)]
        return {i: j for i, j in best if inner[:, j].argmax() == i and inner[i, j] > self.match_threshold}
