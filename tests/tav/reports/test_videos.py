"""The videos of the report, and the words that an edit changes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from tav.reports.videos import changed_words, edit_paths, mosaic
from tests.support.reported import CLIP, PROMPTS


def test_words_that_an_edit_changes() -> None:
    assert changed_words("a red ball", "A blue ball  rolls") == [
        ("A", False),
        ("blue", True),
        ("ball", False),
        ("rolls", True),
    ]
    assert changed_words("a ball", "a ball") == [("a ball", False)]


@pytest.mark.parametrize("edits", range(len(PROMPTS) + 1))
def test_a_mosaic_has_the_same_size_for_any_number_of_edits(project: Path, edits: int) -> None:
    results = project / "results" / CLIP
    uri = mosaic(results / "frames/source.mp4", edit_paths(results / "edits")[:edits])
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (480, 240)
    assert mosaic(results / "frames/none.mp4", []) is None
