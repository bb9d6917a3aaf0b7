"""Scenes of the benchmarks: which there are, and what is refused."""

from pathlib import Path

import pytest

from benchmarks.scenes import FOLDERS, RECONSTRUCTION, load_scenes
from tav_model.errors import TavError
from toyworld.scenes import Scene, save_truth

CATEGORIES = {"colour", "object", "background", "style", "multiple"}


def test_there_are_twelve_scenes_with_edits_of_every_category():
    scenes = load_scenes(FOLDERS)
    assert len(scenes) == 12
    for scene in scenes:
        assert {scene.truth.category(edit) for edit in scene.truth.edits} == CATEGORIES, scene.name
    new = [scene.truth.scene for scene in load_scenes(FOLDERS[1:])]
    assert len({scene.object for scene in new}) >= 7 and len({scene.motion for scene in new}) == 6
    assert all(scene.pattern != "none" and scene.pan for scene in new)


def test_a_limit_spreads_over_all():
    every = [scene.name for scene in load_scenes(FOLDERS)]
    assert [scene.name for scene in load_scenes(FOLDERS, 3)] == every[::4]
    assert [scene.name for scene in load_scenes(FOLDERS, 99)] == every


def test_folders_that_are_refused(tmp_path: Path):
    with pytest.raises(TavError, match=r"no scene file; at least one NAME.json must be there"):
        load_scenes([tmp_path])
    save_truth(tmp_path / "a.json", Scene(), 8, {})
    with pytest.raises(TavError, match=r"a.json: no edits; there must be at least one"):
        load_scenes([tmp_path])
    save_truth(tmp_path / "a.json", Scene(), 8, {RECONSTRUCTION: {"colour": "blue"}})
    with pytest.raises(TavError, match="must not have the name"):
        load_scenes([tmp_path])
    save_truth(tmp_path / "a.json", Scene(), 8, {"b": {"colour": "blue"}})
    with pytest.raises(TavError, match="another scene has the name 'a'"):
        load_scenes([tmp_path, tmp_path])
