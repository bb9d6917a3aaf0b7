"""Random scenes: of every category, the same for a seed, and as the benchmarks read them."""

from pathlib import Path

import pytest

from benchmarks.random_scenes import main
from benchmarks.scenes import load_scenes
from toyworld.samples import held_out


def test_they_load_and_have_an_edit_of_each_category(tmp_path: Path):
    assert main([str(tmp_path / "new"), "--count", "20", "--seed", "3"]) == 0
    scenes = load_scenes([tmp_path / "new"])
    assert len(scenes) == 20
    for number, scene in enumerate(scenes):
        categories = [scene.truth.category(edit) for edit in scene.truth.edits]
        assert categories == ["colour", "object", "background", "style", "multiple"]
        assert held_out(scene.truth.scene) == (number % 2 == 1)


def test_a_seed_determines_them(tmp_path: Path):
    for folder, seed in (("one", 3), ("two", 3), ("three", 4)):
        main([str(tmp_path / folder), "--count", "2", "--seed", str(seed)])
    one, two, three = (
        [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two", "three")
    )
    assert one == two != three


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0", "--seed", "1"], "--count must be at least 1"),
        (["--seed", "1"], "must not exist or be an empty folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    (tmp_path / "file").touch()
    assert main([str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
