"""The embedded world: scenes and their pictures, captions, the truth of an edit, and a small base model that knows it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
