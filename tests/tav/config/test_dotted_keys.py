"""Nested parameters by dotted keys."""

from hypothesis import given
from hypothesis import strategies as st

from tav.config.dotted_keys import flatten


def test_flatten_shows_parameters_as_people_compare_them():
    params = {"attention": {"spatial": ["first", "former"], "temporal": True}, "seed": 33, "decode": {"end": None}}
    assert flatten(params) == {
        "attention.spatial": "first,former",
        "attention.temporal": True,
        "seed": 33,
        "decode.end": "None",
    }


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, min_size=1)))
def test_flatten_keeps_each_value_under_the_path_to_it(tree):
    flat = flatten({"root": tree})
    for path, value in flat.items():
        node = {"root": tree}
        for name in path.split("."):
            node = node[name]
        assert node == value
    assert len(flat) == str(tree).count(":") - str(tree).count(": {") if isinstance(tree, dict) else len(flat) == 1


def test_flatten_numbers_mappings_in_a_list_and_joins_other_lists():
    assert flatten(
        {"control": [{"kind": "canny", "stages": ["edit"]}, {"kind": "depth"}], "spatial": ["first", "self"]}
    ) == {
        "control.0.kind": "canny",
        "control.0.stages": "edit",
        "control.1.kind": "depth",
        "spatial": "first,self",
    }
    assert flatten({"control": []}) == {"control": ""}
