"""The stages of the pipeline, each a function over paths and parameters, and their command line."""

import os

from tav.runtime.allocator import keep_freed_memory

# OpenMP's threads spin while they wait. Beside other work on the same cores that costs a factor of ten and more; to sleep
# costs nothing to speak of. It has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
keep_freed_memory()
