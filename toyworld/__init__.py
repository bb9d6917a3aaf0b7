"""The embedded world: scenes and pictures of them, captions, the ground truth of edits, and a small base model of it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
