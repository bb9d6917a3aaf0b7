"""Which frames are selected, and how fast they play."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tav.media.frame_selection import select_frames
from tav_model.errors import TavError
from tav_model.video import playback_rate
from tests.support.videos import decode


@given(available=st.integers(1, 400), frames=st.integers(1, 40), start=st.integers(0, 50), stride=st.integers(1, 9))
def test_selected_frames_exist_and_go_forward(available: int, frames: int, start: int, stride: int) -> None:
    for sampling in ("uniform", "stride"):
        chosen = decode(frames=frames, start=start, stride=stride, sampling=sampling)
        try:
            indexes = select_frames(chosen, available)
        except TavError:
            assert start + (frames if sampling == "uniform" else (frames - 1) * stride + 1) > available
            continue
        assert len(set(indexes)) == frames and indexes == sorted(indexes)
        assert start == indexes[0] and indexes[-1] < available
        if sampling == "stride":
            assert all(b - a == stride for a, b in pairwise(indexes))
        elif frames > 1:
            assert indexes[-1] == available - 1


def test_the_rate_keeps_the_speed_of_the_source() -> None:
    every_third = decode(sampling="stride", stride=3)
    assert playback_rate(Fraction(30000, 1001), select_frames(every_third, 91)) == Fraction(10000, 1001)
    assert playback_rate(Fraction(24), [0, 1, 2, 3, 4, 5]) == 24
    assert playback_rate(Fraction(25), [7]) == 25
