"""Locks that end with their process, and say who holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tav.runtime.locks import Locked, file_lock, lock_holder

HOLD = """
import sys, time
from pathlib import Path
from tav.runtime.locks import file_lock
with file_lock(Path(sys.argv[1]), stage="tune"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_holder_is_read_from_the_file_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "ball.lock"
    assert lock_holder(path) is None
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    holder = {"process": process.pid, "stage": "tune"}
    assert lock_holder(path) == holder
    with pytest.raises(Locked) as refused, file_lock(path):
        pass
    assert refused.value.holder == holder
    process.kill()
    process.wait()
    assert lock_holder(path) is None
    with file_lock(path, stage="edit"):
        assert lock_holder(path) == {"process": os.getpid(), "stage": "edit"}
    assert lock_holder(path) is None


@pytest.mark.parametrize("text", ["", "123 (stage tune)", "[1]"])
def test_a_file_that_says_nothing_is_held_by_somebody(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ball.lock"
    with file_lock(path):
        path.write_text(text)
        assert lock_holder(path) == {}
