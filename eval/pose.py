"""Where `tools.pose` was; these names stay importable from here."""
from tools.pose import ESTIMATORS, estimate_pose

__all__ = ["ESTIMATORS", "estimate_pose"]
