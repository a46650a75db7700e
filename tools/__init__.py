import os

import imp_matching  # noqa: F401  (the five packages are ours)

# Threads of a parallel loop that wait by spinning starve whatever shares the cores: the processes that make samples
# beside a training step on the CPU, or another job. It must be set before the first library with OpenMP loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
