"""LOVEU-TGVE-2023 through the project's own stages, clip by clip.

The output folder holds

    results.csv                          every edit with its scores
    results.md                           mean scores by category
    submission/SET/CLIP/CATEGORY/        00000.jpg, 00001.jpg, ...: the folder that the benchmark accepts
    benchmark.log                        what was done when, as `tav benchmark` reports it
    work/                                a project of its own: params.yaml, results, logs, MLflow's store

A stage of a clip is done for an identity: a digest of its frames, captions and parameters. What is done is not repeated, so
that a killed run resumes, and a changed guidance scale renders and scores again without tuning again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tasks.clip_stages import ClipStages
from tav.config import Params, load_params, parse_overrides
from tav.config.metrics import METRICS, format_score
from tav.config.paths import EMBEDDED, Project, project_path, resolve_model
from tav.config.prompts import csv_text
from tav.config.results import read_scores
from tav.config.stages import STAGES
from tav.media.loveu_tgve import EDITS, SIDE, Entry, choose, read_benchmark
from tav.runtime.devices import choose_device, release_memory
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json, write_text

JPEG_QUALITY = 95
SUBMISSION = "submission"
ClipScores = dict[str, dict[str, float]]
"""The scores of a clip's edits, by category and metric."""
OnStage = Callable[[str, int, int], None]
"""Receives a stage's name, the number of its steps that are done, and their total (0: unknown)."""


class Observer(Protocol):
    """Receives the progress of the clips that run in this process."""

    def clip_started(self, entry: Entry) -> None:
        """Receive the clip that runs from now on."""

    def stage_advanced(self, stage: str, done: int, total: int) -> None:
        """Receive the progress of a stage of the clip that runs now; see `OnStage`."""


@dataclass(frozen=True)
class ClipResult:
    """A clip that is up to date, or the error that it failed with."""

    entry: Entry
    error: Exception | None = None


class BenchmarkRun:
    """The benchmark in an output folder, checked and prepared by `open_benchmark`.

    Attributes:
        chosen: the clips to work on, in the benchmark's order.
        up_to_date: names of the chosen clips that were up to date from the start.
        scores: the scores of every clip that is up to date now, by its name `SET/CLIP`.
    """

    def __init__(self, out: Path, entries: Sequence[Entry], chosen: Sequence[Entry], params: Params) -> None:
        self.out, self.project = out, out / "work"
        self.chosen = list(chosen)
        self.scores: dict[str, ClipScores] = {}
        self._entries, self._params = list(entries), params
        for entry in entries:
            if entry.frames is None:
                continue
            if is_done(self.project, entry):
                self.scores[entry.name] = _read_clip_scores(self.project, entry.clip_name)
            else:
                # Frames that other parameters rendered must not be handed in.
                shutil.rmtree(self.submission / entry.name, ignore_errors=True)
        self.up_to_date = [entry.name for entry in chosen if entry.name in self.scores]

    @property
    def submission(self) -> Path:
        """The folder to hand in."""
        return self.out / SUBMISSION

    @property
    def table(self) -> Path:
        """The CSV of every edit with its scores."""
        return self.out / "results.csv"

    def results(self, observer: Observer) -> Iterator[ClipResult]:
        """Bring the chosen clips up to date, and yield each with the tables and the submission written.

        A clip that fails does not stop the others.
        """
        for entry, outcome in self._outcomes(observer):
            error: Exception | None = None
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                self.scores[entry.name] = outcome
                _write_submission(self.project, entry, self.submission)
            except Exception as raised:
                self.scores.pop(entry.name, None)
                error = raised
            _write_results(self.out, self.table, self._entries, self.scores)
            release_memory()
            yield ClipResult(entry, error)

    def _outcomes(self, observer: Observer) -> Iterator[tuple[Entry, ClipScores | Exception]]:
        """Yield clips with their scores or error: those up to date first, then each when it ends."""
        yield from [(entry, self.scores[entry.name]) for entry in self.chosen if entry.name in self.up_to_date]
        todo = {entry.clip_name: entry for entry in self.chosen if entry.name not in self.up_to_date}
        runtime = self._params.runtime
        if runtime.ray is None:
            for clip, entry in todo.items():
                observer.clip_started(entry)
                try:
                    outcome: ClipScores | Exception = run_clip(self.project, clip, on_stage=observer.stage_advanced)
                except Exception as error:
                    outcome = error
                yield entry, outcome
        elif todo:
            from flows.ray_rows import run_clips

            for clip, outcome in run_clips(run_clip, self.project, list(todo), runtime, choose_device(runtime.device)):
                yield todo[clip], outcome


@contextlib.contextmanager
def open_benchmark(
    root: Path, folder: Path, out: Path, overrides: Sequence[str], only: Sequence[str]
) -> Iterator[BenchmarkRun]:
    """Check the benchmark in `folder` and prepare its run in `out`, which is locked against other runs meanwhile.

    Args:
        root: the project whose params.yaml applies.
        folder: the unpacked data set.
        out: the folder for results and the submission.
        overrides: `KEY=VALUE`, parameters that differ from params.yaml.
        only: names SET/CLIP of the clips to work on; empty: all. Tables hold every clip that is up to date.

    Raises:
        TavError: an entry, parameter, model or device that is not allowed, or another run in `out`.
    """
    entries = read_benchmark(folder)
    chosen = choose(entries, only)
    params = _load_parameters(root, overrides)
    models = _check_models(root, params)
    with _locked(out):
        _write_project(out / "work", root, params, entries, models)
        yield BenchmarkRun(out, entries, chosen, params)


def run_clip(project: Path, clip: str, alone: bool = True, on_stage: OnStage | None = None) -> ClipScores:
    """Run the stages of one clip of a work project that are not done for its inputs and parameters.

    It depends only on the project's folder and the clip's name, and clips share no files, so several workers may run
    clips at once.

    Args:
        project: the folder of the work project.
        clip: the clip's name in its params.yaml.
        alone: whether it holds the GPU exclusively.
        on_stage: receives the progress of each stage.

    Raises:
        TavError: what a stage reports of a mistake in the clip; a stage may raise other errors too.
    """
    identities = _identities(project, clip)
    for stage in STAGES:
        if _is_stage_done(project, clip, stage, identities[stage]):
            continue
        ClipStages(project, clip, on_stage and _without_values(on_stage, stage), alone).run(stage)
        if stage == "score":
            from tav.reports.report import update_reports

            update_reports(project, clip)
        write_json(_record_path(project, clip), _read_record(project, clip) | {stage: identities[stage]})
    return _read_clip_scores(project, clip)


def is_done(project: Path, entry: Entry) -> bool:
    """Return whether every stage of the clip is done for its present inputs and parameters."""
    try:
        identities = _identities(project, entry.clip_name)
    except OSError:
        return False  # Frames that cannot be read are reported when the clip runs.
    return all(_is_stage_done(project, entry.clip_name, stage, identities[stage]) for stage in STAGES)


def _without_values(on_stage: OnStage, stage: str) -> Callable[[int, int, dict[str, Any]], None]:
    return lambda done, total, _values: on_stage(stage, done, total)


# Which stages are done


def _identities(project: Path, clip: str) -> dict[str, str]:
    """Return a digest for each stage of everything that its outputs depend on."""
    params = load_params(project / "params.yaml")
    settings = params.clip(clip)
    sections = params.model_dump(mode="json")
    scorers = [name for name in (params.score.clip_model, params.score.pickscore_model) if name]
    inputs: dict[str, list[Any]] = {
        "decode": [project / settings.video, sections["decode"]],
        "encode": [_model_digest(project, params.base_model), settings.caption, sections["encode"]],
        "tune": [sections["attention"], sections["tune"], params.seed],
        "invert": [sections["invert"]],
        "edit": [project / settings.prompts, sections["edit"]],
        "score": [sections["score"], *(_model_digest(project, name) for name in scorers)],
    }
    identities, previous = {}, ""
    for stage in STAGES:
        parts = [part if isinstance(part, Path) else json.dumps(part, sort_keys=True) for part in inputs[stage]]
        identities[stage] = previous = digest(previous, stage, *parts)
    return identities


def _model_digest(project: Path, name: str) -> str:
    return _weights_digest(resolve_model(project, name))


@functools.lru_cache
def _weights_digest(model: str) -> str:
    """Return a digest of a model's files: gigabytes that are not expected to change while the benchmark runs."""
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
    return _read_record(project, clip).get(stage) == identity and outputs[stage](clip).is_dir()


def _record_path(project: Path, clip: str) -> Path:
    return project / ".tav" / "benchmark" / f"{clip}.json"


def _read_record(project: Path, clip: str) -> dict[str, str]:
    """Return the identity that each stage is done for; empty where the file is missing or damaged."""
    try:
        record = read_json(_record_path(project, clip))
    except TavError:
        return {}
    return record if isinstance(record, dict) else {}


def _read_clip_scores(project: Path, clip: str) -> ClipScores:
    return read_scores(Project(project).scores(clip))


# Preparation


def _load_parameters(root: Path, overrides: Sequence[str]) -> Params:
    changes = parse_overrides(overrides)
    for key in changes:
        if key.partition(".")[0] == "clips":
            raise TavError(f"--set: {key!r} is not allowed: the clips are the benchmark's; --only chooses among them")
    return load_params(root / "params.yaml", changes)


def _check_models(root: Path, params: Params) -> list[str]:
    """Return the names of all models.

    Raises:
        TavError: a model or the device is missing, which would otherwise show after hours.
    """
    names = [params.base_model, params.score.clip_model, params.score.pickscore_model]
    models = [name for name in names if name]
    for name in models:
        resolve_model(root, name)
    choose_device(params.runtime.device)
    return models


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the output folder; the lock is released when the process ends, in whatever way."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TavError(f"{out}: another benchmark is running there; wait for it, or choose another --out") from None
        yield


def _write_project(project: Path, root: Path, params: Params, entries: Sequence[Entry], models: Sequence[str]) -> None:
    """Write the project that the stages run in. Frames and models are linked, not copied.

    Raises:
        TavError: a value that params.yaml does not allow, or a file or folder in the place of a link.
    """
    clips = {}
    for entry in entries:
        if entry.frames is None:
            continue
        name = entry.clip_name
        frames, prompts = f"frames/{name}{entry.frames.suffix if entry.frames.is_file() else ''}", f"prompts/{name}.csv"
        clips[name] = {"video": frames, "caption": entry.caption, "prompts": prompts, "decode": {}}
        _link(project / frames, entry.frames)
        _write_if_changed(project / prompts, _prompts_csv(entry))
    for model in models:
        folder = project_path(root, model, "params.yaml: model")
        if folder.is_dir() and Path(model).parts[0] != EMBEDDED:
            _link(project / model, folder.resolve())
    import yaml

    content = params.model_dump(mode="json") | {"clips": clips}
    _write_if_changed(project / "params.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    load_params(project / "params.yaml")


def _prompts_csv(entry: Entry) -> str:
    """Return a prompt CSV in which each edit has the name of its category."""
    return csv_text([["prompt", "name", "category"], *([entry.prompts[edit], edit, edit] for edit in EDITS)])


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        if Path(os.readlink(path)) == target:
            return
        path.unlink()
    elif path.exists():
        raise TavError(f"{path}: is in the place of a link to {target}; remove it, or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# Submission and tables


def _write_submission(project: Path, entry: Entry, folder: Path) -> None:
    """Write the clip's edits as `SET/CLIP/CATEGORY/00000.jpg` and so on, 480x480 pixels, unless they are current."""
    import numpy as np
    from PIL import Image

    from tav.media.videos import read_mp4

    record = _read_record(project, entry.clip_name)
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


def _write_results(out: Path, table: Path, entries: Sequence[Entry], scores: Mapping[str, ClipScores]) -> None:
    """Write `results.csv` and `results.md` of all clips that are up to date."""
    scored = [entry for entry in entries if entry.name in scores]
    metrics = _metrics(scores.values())
    rows = [
        [
            entry.set,
            entry.clip,
            edit,
            entry.prompts[edit],
            *(scores[entry.name][edit].get(name, "") for name in metrics),
        ]
        for entry in scored
        for edit in EDITS
    ]
    write_text(table, csv_text([["set", "clip", "category", "prompt", *metrics], *rows]))
    missing = [entry.name for entry in entries if entry.name not in scores]
    lines = [f"# LOVEU-TGVE-2023: {len(scored)} of {len(entries)} clips, {len(rows)} edits", ""]
    lines.append(_markdown_table(category_means(scores.values())) if scored else "No clip is done yet.")
    if missing:
        lines += ["", f"Not in the table: {', '.join(missing)}."]
    write_text(out / "results.md", "\n".join(lines) + "\n")


def _metrics(scores: Iterable[ClipScores]) -> list[str]:
    present = {name for edits in scores for values in edits.values() for name in values}
    known = [name for name in METRICS if name in present]
    return known + sorted(present - set(known))


def category_means(scores: Iterable[ClipScores]) -> dict[str, dict[str, float]]:
    """Return the number of edits and the mean of each metric, by category and for `all`.

    Such as `{"style": {"edits": 76, "flicker": 0.01}, ..., "all": {...}}`.
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


def table_cells(means: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the header and rows of the table of means.

    A category is a column and a metric a row, so that the table's width does not depend on the number of metrics.
    """
    rows = [["", *means], ["edits", *(str(values["edits"]) for values in means.values())]]
    for metric in means["all"]:
        if metric != "edits":
            rows.append(
                [metric, *(format_score(values[metric]) if metric in values else "" for values in means.values())]
            )
    return rows


def _markdown_table(means: Mapping[str, Mapping[str, float]]) -> str:
    header, *rows = table_cells(means)
    lines = [header, ["---", *["---:"] * len(means)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
