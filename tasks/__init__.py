"""The stages of the pipeline as functions of paths and parameters, and their command line, `python -m tasks`."""

from tav.runtime.waiting import set_waiting
from tav_model.allocator import keep_freed_memory

# Before torch is imported.
set_waiting()
keep_freed_memory()
