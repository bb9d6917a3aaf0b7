"""Loading models one at a time, where stages of several clips run in threads of one process."""

from __future__ import annotations

import importlib
import threading

MODEL_LOADING = threading.RLock()
"""Held while a model is loaded. Loading draws first weights from torch's global generator, which a tuning has seeded."""

# Modules that import a class's own module when the class is first asked for.
LAZY_CLASSES = {
    "diffusers": ("AutoencoderKL", "DDIMInverseScheduler", "DDIMScheduler"),
    "transformers": ("CLIPImageProcessorPil", "CLIPModel", "CLIPTextModel", "CLIPTokenizer"),
    "tav_model": ("TuneAVideoPipeline", "UNet3DConditionModel"),
}


def import_libraries() -> None:
    """Import the heavy libraries that stages need; where two threads import diffusers at once, one of them fails."""
    with MODEL_LOADING:
        for name in ("mlflow.pyfunc", "pandas", "cv2", "tav_model.pipeline", "tav_model.tuning"):
            importlib.import_module(name)
        for library, names in LAZY_CLASSES.items():
            for name in names:
                getattr(importlib.import_module(library), name)
