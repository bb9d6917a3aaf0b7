"""`annotate`: each annotator by its name, and its errors."""

import numpy as np
import pytest

from tav_model.annotators import networks
from tav_model.annotators.annotate import ANNOTATORS, WITH_MODEL, annotate
from tav_model.annotators.edges import canny, lineart
from tav_model.errors import TavError

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 24, 16, 3), np.uint8)


@pytest.mark.parametrize("annotator", [canny, lineart])
def test_edges(annotator):
    counts = []
    assert np.array_equal(annotate(annotator.__name__, FRAMES, on_chunk=counts.append), annotator(FRAMES))
    assert counts == [3]


@pytest.mark.parametrize("kind", WITH_MODEL)
def test_models_receive_their_arguments(monkeypatch, kind):
    received = []
    monkeypatch.setattr(networks, kind, lambda *arguments: received.extend(arguments) or FRAMES)
    assert annotate(kind, FRAMES, "folder", "people" if kind == "pose" else None, "cuda:1", 4) is FRAMES
    assert received[1:] == ["folder", *(["people"] if kind == "pose" else []), "cuda:1", 4, None]


@pytest.mark.parametrize("kind", WITH_MODEL)
def test_a_missing_model_is_named(kind):
    with pytest.raises(TavError, match=f"control: {kind} needs the folder or hub id of an annotator model"):
        annotate(kind, FRAMES)


def test_other_mistakes_are_named():
    with pytest.raises(TavError, match=f"control: 'scribble' must be one of {', '.join(ANNOTATORS)}"):
        annotate("scribble", FRAMES)
    with pytest.raises(TavError, match="canny needs no annotator model, but folder is given"):
        annotate("canny", FRAMES, "folder")
    for wrong in (FRAMES[0], FRAMES / 255, FRAMES[..., :1], FRAMES[:0]):
        with pytest.raises(ValueError, match=r"frames: .* must be uint8, f h w 3"):
            annotate("canny", wrong)
