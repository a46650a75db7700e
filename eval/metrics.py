"""Where `tools.metrics` was; these names stay importable from here."""
from tools.metrics import bootstrap_interval, epipolar_error, pose_auc, pose_error, precision_at_recall

__all__ = ["bootstrap_interval", "epipolar_error", "pose_auc", "pose_error", "precision_at_recall"]
