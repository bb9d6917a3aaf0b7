"""The stages of the pipeline as functions of paths and parameters, and their command line, `python -m tasks`."""

import os

from tav_model.allocator import keep_freed_memory

# By default OpenMP's threads spin while they wait, which takes ten times as long and more beside other work on the same
# cores; sleeping threads cost next to nothing. The variable must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
keep_freed_memory()
