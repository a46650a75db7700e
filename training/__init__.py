import tools  # noqa: F401  (its settings come before any library with OpenMP)
