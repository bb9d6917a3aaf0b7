"""The one renderer of rows: what it counts and publishes, and whose fault a failure is."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tasks.rows import RowBatch, render_rows
from tav.config.prompts import PromptRow
from tav.runtime.events import Event, EventStream, LoopProgressed, RowFinished
from tav.runtime.progress import Progress
from tav_model.errors import FullDiskError
from tests.tasks.test_edit import Renderer, batch_of, batch_of_rows, project  # noqa: F401 (a fixture)


def rendered(batch: RowBatch, *subscribers: Any) -> dict[str, tuple[bool, str | None]]:
    events = EventStream(*subscribers)
    results = render_rows(batch, batch.rows, events, "ball", Progress(events, stage="edit", clip="ball"))
    return {result.row.name: (result.rendered, result.error) for result in results}


def steps(received: list[Event], row: str | None) -> list[int]:
    return [event.done for event in received if isinstance(event, LoopProgressed) and event.row == row]


def test_rows_that_are_done_come_first_and_are_not_rendered(project: Path) -> None:  # noqa: F811
    rendered(batch_of(project, "a dog"))
    batch = batch_of(project, "a cat", "a dog")
    assert list(rendered(batch).items()) == [("a-dog", (False, None)), ("a-cat", (True, None))]
    assert batch.pipeline.calls == [["a cat"]]


def test_each_row_of_a_batch_counts_its_own_steps_and_the_stage_counts_all(project: Path) -> None:  # noqa: F811
    received: list[Event] = []
    rendered(batch_of(project, "a cat", "a dog", size=2), received.append)
    assert steps(received, "a-cat") == steps(received, "a-dog") == [1, 2]
    assert steps(received, None) == [2, 4]
    finished = [event.row for event in received if isinstance(event, RowFinished)]
    assert finished == ["a-cat", "a-dog"]


class LateOutOfMemory(Renderer):
    """Runs out of memory after its first step where there is more than one prompt."""

    def __call__(self, prompts: list[str], *, callback_on_step_end: Any, **settings: Any) -> Any:
        if len(prompts) > 1:
            callback_on_step_end(self, 0, None, {})
            raise MemoryError
        return super().__call__(prompts, callback_on_step_end=callback_on_step_end, **settings)


def test_steps_of_an_attempt_that_ran_out_of_memory_are_not_counted_twice(project: Path) -> None:  # noqa: F811
    received: list[Event] = []
    results = rendered(batch_of(project, "a cat", "a dog", size=2, renderer=LateOutOfMemory()), received.append)
    assert results == {"a-cat": (True, None), "a-dog": (True, None)}
    assert steps(received, None) == [2, 0, 1, 2, 3, 4]
    assert steps(received, "a-cat") == [1, 0, 1, 2] and steps(received, "a-dog")[-1] == 2


def test_a_row_that_spoils_its_batch_fails_alone(project: Path) -> None:  # noqa: F811
    batch = batch_of(project, "a cat", "a dog", "a fish", size=3, renderer=Renderer(broken="a dog"))
    assert rendered(batch) == {"a-cat": (True, None), "a-dog": (False, "cannot draw a dog"), "a-fish": (True, None)}


def test_a_full_disk_is_no_fault_of_a_row(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    batch = batch_of(project, "a cat", "a dog", "a fish")
    store = RowBatch._store

    def full(self: RowBatch, row: Any, *parts: Any) -> None:
        if row.prompt == "a dog":
            raise FullDiskError(errno.ENOSPC, "no room left", "edit.mp4")
        store(self, row, *parts)

    monkeypatch.setattr(RowBatch, "_store", full)
    with pytest.raises(FullDiskError):
        rendered(batch)
    assert [row.prompt for row in batch.todo()] == ["a dog", "a fish"]


def test_rows_that_differ_in_their_names_only_share_a_video(project: Path) -> None:  # noqa: F811
    rows = [PromptRow(line=i, prompt="a cat", name=name) for i, name in enumerate(("felix", "tom"))]
    batch = batch_of_rows(project, rows, size=2)
    assert rendered(batch) == {"felix": (True, None), "tom": (True, None)}
    assert batch.pipeline.calls == [["a cat"]]
