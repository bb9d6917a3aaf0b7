"""Which frames attend to which, by their names."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model.networks.attention_plan import AttentionBlock, attention_plan, check_attention_frames, key_frames
from tests.tav_model.networks.reference import name_lists, named_frames


@given(attention=name_lists, num_frames=st.integers(1, 12))
def test_key_frames_weigh_every_named_frame_as_often_as_it_is_named(attention, num_frames):
    for frame, sources in enumerate(key_frames(attention, num_frames)):
        named = [index for name in attention for index in named_frames(name, frame, num_frames)]
        assert set(sources) == set(named)
        # Shares of the softmax are kept: the counts are in the same proportion, and in the smallest whole numbers.
        shrunk = {len(named) / len(sources)} | {named.count(i) / sources.count(i) for i in set(named)}
        assert len(shrunk) == 1
        assert math.gcd(*(sources.count(i) for i in set(sources))) == 1


@given(attention=name_lists, num_frames=st.integers(1, 12))
def test_key_frames_come_in_the_order_they_are_named(attention, num_frames):
    for frame, sources in enumerate(key_frames(attention, num_frames)):
        named = [index for name in attention for index in named_frames(name, frame, num_frames)]
        assert list(dict.fromkeys(sources)) == list(dict.fromkeys(named))


def test_key_frames_of_tune_a_video():
    assert key_frames(("first", "former"), 5) == [(0,), (0,), (0, 1), (0, 2), (0, 3)]


def test_key_frames_of_the_middle_and_the_next():
    assert key_frames(("middle", "next"), 4) == [(2, 1), (2,), (2, 3), (2, 3)]


@given(attention=name_lists, num_frames=st.integers(1, 12))
def test_sources_are_counted_among_the_projected_frames(attention, num_frames):
    plan = attention_plan(tuple(attention), num_frames)
    frames = key_frames(attention, num_frames)
    assert [tuple(plan.projected[i] for i in sources) for sources in plan.sources] == frames
    assert list(plan.projected) == sorted({source for sources in frames for source in sources})


@given(attention=name_lists, num_frames=st.integers(1, 12))
def test_groups_of_equal_length_hold_every_frame_once(attention, num_frames):
    plan = attention_plan(tuple(attention), num_frames)
    grouped = {}
    for frames, sources in plan.equal_lengths:
        assert len({len(one) for one in sources}) == 1
        grouped |= dict(zip(frames, sources, strict=True))
    assert grouped == dict(enumerate(plan.sources))


@settings(max_examples=60)
@given(attention=name_lists, num_frames=st.integers(1, 9))
def test_the_blocks_are_the_frames_that_are_named(attention, num_frames):
    plan = attention_plan(tuple(attention), num_frames)
    found = {frame: [] for frame in range(num_frames)}
    for block in (block for group in plan.blocks for block in group):
        keys = range(block.keys_start, block.keys_stop)
        for place, frame in enumerate(range(block.start, block.stop)):
            found[frame] += [plan.projected[key] for key in ([keys[place]] if block.diagonal else keys)]
    for frame, frames in found.items():
        named = [index for name in attention for index in named_frames(name, frame, num_frames)]
        assert frames == (named if len(set(named)) > 1 else named[:1])
    assert sorted(i for block in plan.blocks[0] for i in range(block.start, block.stop)) == list(range(num_frames))


def test_tune_a_videos_attention_has_two_blocks():
    plan = attention_plan(("first", "former"), 8)
    assert plan.projected == tuple(range(7))
    assert plan.blocks == (
        (AttentionBlock(0, 8, 0, 1, diagonal=False),),
        (AttentionBlock(2, 8, 1, 7, diagonal=True),),
    )


def test_a_plan_is_made_once():
    assert attention_plan(("first", "former"), 8) is attention_plan(("first", "former"), 8)


@pytest.mark.parametrize("names", [(), ("former", "fist"), "first", ("",)])
def test_unknown_names_of_frames_are_refused_with_what_is_allowed(names):
    with pytest.raises(ValueError, match=r"\Aattention: .*first, former, self, middle, next, all\Z"):
        check_attention_frames(names)
