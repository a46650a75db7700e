import imp_matching  # noqa: F401  (the five packages are ours)
import tools  # noqa: F401  (its settings come before any library with OpenMP)
