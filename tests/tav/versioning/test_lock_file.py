"""dvc.lock is read without DVC."""

from __future__ import annotations

from pathlib import Path

import pytest

from tav.versioning.lock_file import read_lock_file, recorded_hashes

LOCK = """\
schema: '2.0'
stages:
  decode@ball:
    cmd: python -m tasks decode --clip ball
    deps:
    - path: data/ball.mp4
      hash: md5
      md5: abc
      size: 1
    outs:
    - path: results/ball/frames
      hash: md5
      md5: def.dir
      size: 2
      nfiles: 1
"""


def test_hashes_by_path(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(LOCK)
    stage = read_lock_file(tmp_path)["decode@ball"]
    assert recorded_hashes(stage, "deps") == {"data/ball.mp4": "abc"}
    assert recorded_hashes(stage, "outs") == {"results/ball/frames": "def.dir"}
    assert recorded_hashes(stage, "params") == {}


@pytest.mark.parametrize("text", [None, "", "stages: [", "stages: 3", "3", "\0", "stages:\n"])
def test_a_missing_or_damaged_file_records_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "dvc.lock").write_text(text)
    assert read_lock_file(tmp_path) == {}


@pytest.mark.parametrize("stage", [3, None, {"outs": [3]}, {"outs": 3}, {"outs": [{"hash": "md5"}]}])
def test_a_damaged_entry_records_nothing(stage: object) -> None:
    assert recorded_hashes(stage, "outs") == {}  # type: ignore[arg-type]
