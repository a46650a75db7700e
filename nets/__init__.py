import imp_matching  # noqa: F401  (the five packages are ours)
from nets.matchers import EIMP, GM, IMP, build_matcher
from nets.superpoint import SuperPoint

__all__ = ["EIMP", "GM", "IMP", "SuperPoint", "build_matcher"]
