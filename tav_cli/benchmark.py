"""`tav benchmark`: LOVEU-TGVE-2023 through the project's own stages, clip by clip.

The folder OUT gets

    results.csv                          every edit with its scores
    results.md                           their means by category
    submission/SET/CLIP/CATEGORY/        00000.jpg and on, as the benchmark wants them handed in
    benchmark.log                        what was done when
    work/                                a project of its own: params.yaml, results, logs, MLflow's store

A clip stands on its frames, captions and parameters. What was done for these stays done, stage by stage, so a run that was
killed goes on, and a changed guidance scale renders and scores again without tuning again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tasks.clip_stages import ClipStages
from tav.config import Params, load_params, parse_overrides
from tav.config.metrics import METRICS
from tav.config.paths import EMBEDDED, Project, project_path, resolve_model
from tav.config.prompts import csv_text
from tav.config.stages import STAGES
from tav.media.loveu_tgve import EDITS, SIDE, Entry, choose, read_benchmark
from tav_cli.compare import number
from tav_cli.terminal import output_console
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json, write_text

JPEG_QUALITY = 95
SUBMISSION = "submission"
Scores = dict[str, dict[str, float]]
"""Of each edit of a clip, by its category."""
OnStage = Callable[[str, int, int], None]
"""Told the stage, how far it is, and of how much (0: unknown)."""


def benchmark(root: Path, folder: Path, out: Path, changes: Sequence[str], only: Sequence[str]) -> int:
    """Bring the clips of the benchmark in `folder` up to date in `out`, and print the table of their scores.

    Args:
        root: the project whose params.yaml is taken.
        changes: `KEY=VALUE`, parameters to take otherwise.
        only: SET/CLIP, the clips to work on; none: all. Tables hold every clip that is up to date.

    Returns:
        The exit code: 0, 1 where clips have failed, 130 where the user has stopped it.

    Raises:
        TavError: before any work: an entry, parameter, model or device that is not allowed, or another run in `out`.
    """
    entries = read_benchmark(folder)
    chosen = choose(entries, only)
    params = _parameters(root, changes)
    models = _check_models(root, params)
    available = [entry for entry in entries if entry.frames is not None]
    with _alone(out):
        project = out / "work"
        _write_project(project, root, params, available, models)
        # What scores are there for other parameters may stand in no table and no submission.
        done = {entry.name: _scores(project, entry.clip_name) for entry in available if is_done(project, entry)}
        for entry in available:
            if entry.name not in done:
                shutil.rmtree(out / SUBMISSION / entry.name, ignore_errors=True)
        failed: dict[str, str] = {}
        with _Report(out / "benchmark.log", chosen, [entry for entry in chosen if entry.name in done]) as report:
            try:
                for entry, outcome in _outcomes(project, chosen, done, params, report):
                    try:
                        if isinstance(outcome, Exception):
                            raise outcome
                        done[entry.name] = outcome
                        _write_submission(project, entry, out / SUBMISSION)
                    except Exception as error:
                        done.pop(entry.name, None)
                        failed[entry.name] = str(error).strip().partition("\n")[0] or type(error).__name__
                        report.failed(entry, error)
                    else:
                        report.done(entry)
                    _write_results(out, entries, done)
                    _release_memory()
            except KeyboardInterrupt:
                report.stopped()
                return 130
    console = output_console()
    if done:
        console.print(_rich_table(category_means(done.values())))
        console.print(f"every edit: {out / 'results.csv'}\nto hand in: {out / SUBMISSION}/")
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(chosen)} clips failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _outcomes(
    project: Path, chosen: Sequence[Entry], done: Mapping[str, Scores], params: Params, report: _Report
) -> Iterator[tuple[Entry, Scores | Exception]]:
    """The clips with their scores, or what went wrong: those done before, then one after the other, or as Ray has them."""
    todo = {entry.clip_name: entry for entry in chosen if entry.name not in done}
    yield from [(entry, done[entry.name]) for entry in chosen if entry.name in done]
    if params.runtime.ray is None:
        for clip, entry in todo.items():
            report.begins(entry)
            try:
                outcome: Scores | Exception = run_clip(project, clip, on_stage=report.stage)
            except Exception as error:
                outcome = error
            yield entry, outcome
    elif todo:
        from flows.ray_rows import run_clips
        from tav.runtime.devices import choose_device

        device = choose_device(params.runtime.device)
        for clip, outcome in run_clips(run_clip, project, list(todo), params.runtime, device):
            yield todo[clip], outcome


def run_clip(project: Path, clip: str, alone: bool = True, on_stage: OnStage | None = None) -> Scores:
    """Run the stages of one clip of a work project that are not done for its inputs and parameters.

    It needs nothing but the project's folder and the clip's name, and clips do not touch each other's files, so several
    workers may do it at once.

    Args:
        alone: whether it holds the GPU for itself.
        on_stage: told how far a stage is.

    Raises:
        TavError: a mistake in the clip, as its stages say it; a stage may raise other errors too.
    """
    wanted = _identities(project, clip)
    for stage in STAGES:
        if _is_stage_done(project, clip, stage, wanted[stage]):
            continue
        ClipStages(project, clip, on_stage and _telling(on_stage, stage), alone).run(stage)
        if stage == "score":
            from tav.reports.report import update_reports

            update_reports(project, clip)
        write_json(_record_path(project, clip), _record(project, clip) | {stage: wanted[stage]})
    return _scores(project, clip)


def is_done(project: Path, entry: Entry) -> bool:
    """Whether every stage of the clip is done for its inputs and parameters as they are now."""
    try:
        wanted = _identities(project, entry.clip_name)
    except OSError:
        return False  # Frames that cannot be read are this clip's own failure, when its turn comes.
    return all(_is_stage_done(project, entry.clip_name, stage, wanted[stage]) for stage in STAGES)


def _telling(on_stage: OnStage, stage: str) -> Callable[[int, int, dict[str, Any]], None]:
    return lambda done, total, _values: on_stage(stage, done, total)


# What is done


def _identities(project: Path, clip: str) -> dict[str, str]:
    """A digest for each stage of all that its outputs depend on."""
    params = load_params(project / "params.yaml")
    settings = params.clip(clip)
    sections = params.model_dump(mode="json")
    scorers = [name for name in (params.score.clip_model, params.score.pickscore_model) if name]
    stands_on: dict[str, list[Any]] = {
        "decode": [project / settings.video, sections["decode"]],
        "encode": [_model_digest(project, params.base_model), settings.caption, sections["encode"]],
        "tune": [sections["attention"], sections["tune"], params.seed],
        "invert": [sections["invert"]],
        "edit": [project / settings.prompts, sections["edit"]],
        "score": [sections["score"], *(_model_digest(project, name) for name in scorers)],
    }
    identities, before = {}, ""
    for stage in STAGES:
        parts = [part if isinstance(part, Path) else json.dumps(part, sort_keys=True) for part in stands_on[stage]]
        identities[stage] = before = digest(before, stage, *parts)
    return identities


def _model_digest(project: Path, name: str) -> str:
    return _weights_digest(resolve_model(project, name))


@functools.lru_cache
def _weights_digest(model: str) -> str:
    """Of gigabytes that are not expected to change while the benchmark runs."""
    return digest(Path(model)) if Path(model).is_dir() else f"hub:{model}"


def _is_stage_done(project: Path, clip: str, stage: str, identity: str) -> bool:
    layout = Project(project)
    outputs = {
        "decode": layout.frames,
        "encode": layout.latents,
        "tune": layout.tuned,
        "invert": layout.inverted,
        "edit": layout.edits,
        "score": layout.scores,
    }
    return _record(project, clip).get(stage) == identity and outputs[stage](clip).is_dir()


def _record_path(project: Path, clip: str) -> Path:
    return project / ".tav" / "benchmark" / f"{clip}.json"


def _record(project: Path, clip: str) -> dict[str, str]:
    """What is done, by stage; nothing where the file is missing or somebody has damaged it."""
    try:
        record = read_json(_record_path(project, clip))
    except TavError:
        return {}
    return record if isinstance(record, dict) else {}


def _scores(project: Path, clip: str) -> Scores:
    from tav.config.results import read_scores

    return read_scores(Project(project).scores(clip))


# Before any work


def _parameters(root: Path, changes: Sequence[str]) -> Params:
    overrides = parse_overrides(changes)
    for key in overrides:
        if key.partition(".")[0] == "clips":
            raise TavError(f"--set: {key!r} is not allowed: the clips are the benchmark's; --only chooses among them")
    return load_params(root / "params.yaml", overrides)


def _check_models(root: Path, params: Params) -> list[str]:
    """The names of all models; one that is not there, or a device that is not, is found now and not after an hour."""
    from tav.runtime.devices import choose_device

    names = [params.base_model, params.score.clip_model, params.score.pickscore_model]
    models = [name for name in names if name]
    for name in models:
        resolve_model(root, name)
    choose_device(params.runtime.device)
    return models


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the output folder; the lock goes with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TavError(f"{out}: another benchmark is running there; wait for it, or give --out") from None
        yield


def _write_project(project: Path, root: Path, params: Params, entries: Sequence[Entry], models: Sequence[str]) -> None:
    """The project that the stages run in; the frames are not copied, but linked to where they are.

    Raises:
        TavError: what params.yaml does not allow, or a path in the project where a link should be.
    """
    clips = {}
    for entry in entries:
        if entry.frames is None:
            continue
        name = entry.clip_name
        frames, prompts = f"frames/{name}{entry.frames.suffix if entry.frames.is_file() else ''}", f"prompts/{name}.csv"
        clips[name] = {"video": frames, "caption": entry.caption, "prompts": prompts, "decode": {}}
        _link(project / frames, entry.frames)
        _write_if_other(project / prompts, _prompts_csv(entry))
    for model in models:
        folder = project_path(root, model, "params.yaml: model")
        if folder.is_dir() and Path(model).parts[0] != EMBEDDED:
            _link(project / model, folder.resolve())
    import yaml

    content = params.model_dump(mode="json") | {"clips": clips}
    _write_if_other(project / "params.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    load_params(project / "params.yaml")


def _prompts_csv(entry: Entry) -> str:
    """Each edit under the name of its category."""
    return csv_text([["prompt", "name", "category"], *([entry.prompts[edit], edit, edit] for edit in EDITS)])


def _write_if_other(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        if Path(os.readlink(path)) == target:
            return
        path.unlink()
    elif path.exists():
        raise TavError(f"{path}: is in the way of a link to {target}; take it away, or give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# After a clip


def _write_submission(project: Path, entry: Entry, folder: Path) -> None:
    """The clip's edits as `SET/CLIP/CATEGORY/00000.jpg` and on, 480x480, unless they are there already."""
    import numpy as np
    from PIL import Image

    from tav.media.videos import read_mp4

    record = _record(project, entry.clip_name)
    target = folder / entry.name
    if target.is_dir() and record.get(SUBMISSION) == record["edit"]:
        return
    with atomic_folder(target) as temporary:
        for category in EDITS:
            (temporary / category).mkdir()
            frames: np.ndarray = read_mp4(Project(project).edits(entry.clip_name) / f"{category}.mp4")[0]
            for index, frame in enumerate(frames):
                image = Image.fromarray(frame)
                if image.size != (SIDE, SIDE):
                    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                image.save(temporary / category / f"{index:05}.jpg", quality=JPEG_QUALITY, subsampling=0)
    write_json(_record_path(project, entry.clip_name), record | {SUBMISSION: record["edit"]})


def _release_memory() -> None:
    from tav.runtime.devices import release_memory

    release_memory()


def _write_results(out: Path, entries: Sequence[Entry], done: Mapping[str, Scores]) -> None:
    """`results.csv` and `results.md` of all clips that are up to date."""
    ready = [entry for entry in entries if entry.name in done]
    metrics = _metrics(done.values())
    rows = [
        [entry.set, entry.clip, edit, entry.prompts[edit], *(done[entry.name][edit].get(name, "") for name in metrics)]
        for entry in ready
        for edit in EDITS
    ]
    write_text(out / "results.csv", csv_text([["set", "clip", "category", "prompt", *metrics], *rows]))
    missing = [entry.name for entry in entries if entry.name not in done]
    lines = [f"# LOVEU-TGVE-2023: {len(ready)} of {len(entries)} clips, {len(rows)} edits", "", ""]
    lines[2] = _markdown(category_means(done.values())) if ready else "No clip is done yet."
    if missing:
        lines += ["", f"Not in the table: {', '.join(missing)}."]
    write_text(out / "results.md", "\n".join(lines) + "\n")


def _metrics(scores: Iterable[Scores]) -> list[str]:
    there = {name for edits in scores for values in edits.values() for name in values}
    known = [name for name in METRICS if name in there]
    return known + sorted(there - set(known))


def category_means(scores: Any) -> dict[str, dict[str, float]]:
    """The number of edits and the mean of each metric over them: `{"style": {"edits": 76, "flicker": 0.01}, ..., "all"}`.

    Args:
        scores: of each clip.
    """
    scores = list(scores)
    means = {}
    for category in (*EDITS, "all"):
        rows = [values for edits in scores for edit, values in edits.items() if category in ("all", edit)]
        means[category] = {"edits": len(rows)} | {
            name: statistics.fmean(row[name] for row in rows if name in row)
            for name in _metrics(scores)
            if any(name in row for row in rows)
        }
    return means


def _cells(means: dict[str, dict[str, float]]) -> list[list[str]]:
    """The table's header and rows: a column for each category, so that it is as wide with many metrics as with few."""
    rows = [["", *means], ["edits", *(str(values["edits"]) for values in means.values())]]
    for metric in means["all"]:
        if metric != "edits":
            rows.append([metric, *(number(values[metric]) if metric in values else "" for values in means.values())])
    return rows


def _markdown(means: dict[str, dict[str, float]]) -> str:
    header, *rows = _cells(means)
    lines = [header, ["---", *["---:"] * len(means)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rich_table(means: dict[str, dict[str, float]]) -> Table:
    header, *rows = _cells(means)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(header[0])
    for category in header[1:]:
        table.add_column(category, justify="right", style="bold" if category == "all" else "")
    for row in rows:
        table.add_row(*row)
    return table


# Progress


class _Report:
    """How far the benchmark is: a bar on a terminal, lines elsewhere, and always lines with a time in a log file.

    On a terminal the stages' own bars are off meanwhile; the bar names the stage instead.
    """

    def __init__(self, log: Path, clips: Sequence[Entry], before: Sequence[Entry]) -> None:
        self._log, self._total, self._before = log, len(clips), {entry.name for entry in before}
        self._count, self._ran, self._failed, self._to_run = 0, 0, 0, len(clips) - len(before)
        self._clip = ""
        self._console = Console(stderr=True)
        self._is_quiet = os.environ.get("TAV_QUIET", "0") not in ("", "0")
        self._bar: Progress | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> _Report:
        self._start = time.monotonic()
        self._say(f"benchmark: {self._total} clips, {len(self._before)} of them done before")
        if self._console.is_terminal and not self._is_quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[pace]}"), console=self._console)
            self._task = self._bar.add_task("benchmark", total=self._total, pace="")
            self._undo.enter_context(self._bar)
            self._undo.callback(os.environ.pop, "TAV_QUIET", None)
            os.environ["TAV_QUIET"] = "1"
        return self

    def begins(self, entry: Entry) -> None:
        self._clip = entry.name
        self._say(f"{entry.name}: begins")

    def stage(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._clip}: {stage} {done}{f'/{total}' if total else ''}")

    def done(self, entry: Entry) -> None:
        self._ends(entry, "up to date" if entry.name in self._before else "done")

    def failed(self, entry: Entry, error: Exception) -> None:
        self._failed += 1
        if not isinstance(error, TavError):
            self._write("".join(traceback.format_exception(error)).rstrip())
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self._ends(entry, f"failed: {reason}")

    def stopped(self) -> None:
        self._say(f"stopped at {self._count}/{self._total} clips; the same command goes on from here")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()
        if error is None and self._count == self._total:
            spent = timedelta(seconds=round(time.monotonic() - self._start))
            self._say(f"benchmark: {self._count - self._failed} clips up to date, {self._failed} failed, in {spent}")

    def _ends(self, entry: Entry, how: str) -> None:
        self._count += 1
        self._ran += entry.name not in self._before
        pace = self._pace()
        self._say(f"{entry.name}: {how}; {self._count}/{self._total} clips{f', {pace}' if pace else ''}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count, pace=pace, description=entry.name)

    def _pace(self) -> str:
        """How long a clip takes and all that are left will, by those that were run now."""
        if not self._ran:
            return ""
        seconds = (time.monotonic() - self._start) / self._ran
        left = timedelta(seconds=round(seconds * (self._to_run - self._ran)))
        return f"{seconds:.1f} s/clip, {left} left"

    def _say(self, text: str) -> None:
        self._write(text)
        if self._bar is None and not self._is_quiet:
            print(text, file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z} {text}\n")
