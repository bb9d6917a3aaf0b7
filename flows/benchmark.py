"""LOVEU-TGVE-2023 through the project's own stages, clip by clip.

The output folder holds

    results.csv                          every edit with its scores
    results.md                           mean scores by category
    submission/SET/CLIP/CATEGORY/        00000.jpg, 00001.jpg, ...: the folder that the benchmark accepts
    benchmark.log                        what was done when, as `tav benchmark` reports it
    work/                                a project of its own: params.yaml, dvc.yaml, results, logs, MLflow's store

DVC decides which stages of the work project are out of date, the models' files included. What is up to date is not
repeated, so that a killed run resumes, and a changed guidance scale renders and scores again without tuning again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.clip_stages import ClipStages
from tav.config import Params, load_params, no_own_settings, parse_overrides
from tav.config.metrics import METRICS, format_score
from tav.config.paths import EMBEDDED, WATCHED_FOLDERS, Project, project_path, resolve_model
from tav.config.prompts import csv_text
from tav.config.results import read_scores
from tav.config.stages import STAGES
from tav.media.loveu_tgve import EDITS, SIDE, Entry, choose, read_benchmark
from tav.reports.report import refresh_reports
from tav.runtime.devices import DevicePool, choose_device, choose_devices, release_memory
from tav.runtime.events import EventStream
from tav.runtime.locks import Locked, file_lock
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json, write_text

JPEG_QUALITY = 95
SUBMISSION = "submission"
# Linked files where the file system can: the cache of some hundred tunings must not double their size.
DVC_CONFIG = """\
[core]
    analytics = false
    no_scm = true
[cache]
    type = "reflink,hardlink,copy"
"""
ClipScores = dict[str, dict[str, float]]
"""The scores of a clip's edits, by category and metric."""


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

    def results(self, events: EventStream, on_clip: Callable[[Entry], None]) -> Iterator[ClipResult]:
        """Bring the chosen clips up to date, and yield each with the tables and the submission written.

        A clip that fails does not stop the others.

        Args:
            events: receives what happens in this process.
            on_clip: called before a clip runs in this process.
        """
        for entry, outcome in self._outcomes(events, on_clip):
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

    def _outcomes(
        self, events: EventStream, on_clip: Callable[[Entry], None]
    ) -> Iterator[tuple[Entry, ClipScores | Exception]]:
        """Yield clips with their scores or error: those up to date first, then each when it ends."""
        yield from [(entry, self.scores[entry.name]) for entry in self.chosen if entry.name in self.up_to_date]
        todo = {entry.clip_name: entry for entry in self.chosen if entry.name not in self.up_to_date}
        runtime = self._params.runtime
        if runtime.ray is None:
            for clip, entry in todo.items():
                on_clip(entry)
                try:
                    outcome: ClipScores | Exception = run_clip(self.project, clip, events=events)
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


def run_clip(project: Path, clip: str, exclusive: bool = True, events: EventStream | None = None) -> ClipScores:
    """Run the stages of one clip of a work project that are not done for its inputs and parameters.

    It depends only on the project's folder and the clip's name, and clips share no files, so several workers may run
    clips at once.

    Args:
        project: the folder of the work project.
        clip: the clip's name in its params.yaml.
        exclusive: whether it holds the GPU for itself.
        events: receives what happens.

    Raises:
        TavError: what a stage reports of a mistake in the clip; a stage may raise other errors too.
    """
    project = project.resolve()
    with contextlib.chdir(project):
        dvc = DvcPipeline(project)
        stages = ClipStages(project, clip, events, _pool(project, exclusive))
        for stage in STAGES:
            if dvc.is_current(stage, clip) or dvc.restore(stage, clip):
                continue
            before = dvc.snapshot(stage, clip)
            stages.run(stage)
            dvc.commit(stage, clip, before)
        refresh_reports(project, clip)
    return _read_clip_scores(project, clip)


def _pool(project: Path, exclusive: bool) -> DevicePool:
    return DevicePool(choose_devices(load_params(project / "params.yaml").runtime.device), exclusive)


def is_done(project: Path, entry: Entry) -> bool:
    """Return whether every stage of the clip is up to date."""
    project = project.resolve()
    with contextlib.chdir(project):
        dvc = DvcPipeline(project)
        try:
            return all(dvc.is_current(stage, entry.clip_name) for stage in STAGES)
        except (OSError, TavError):
            return False  # Frames that cannot be read are reported when the clip runs.


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
    control = [name for one in params.control for name in (one.model, one.annotator, one.detector)]
    names = [params.base_model, params.score.clip_model, params.score.pickscore_model, *control]
    models = [name for name in names if name]
    for name in models:
        resolve_model(root, name)
    choose_device(params.runtime.device)
    return models


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the output folder; the lock is released when the process ends, in whatever way."""
    try:
        with file_lock(out / ".lock"):
            yield
    except Locked:
        raise TavError(f"{out}: another benchmark is running there; wait for it, or choose another --out") from None


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
        clips[name] = {"video": frames, "caption": entry.caption, "prompts": prompts, **no_own_settings()}
        _link(project / frames, entry.frames)
        _write_if_changed(project / prompts, _prompts_csv(entry))
    folders = {}
    for model in models:
        folder = Path(resolve_model(root, model))
        if folder.is_dir():
            is_own = project_path(root, model, "params.yaml: model").is_dir() and Path(model).parts[0] != EMBEDDED
            folders[model] = model if is_own else f"weights/{model.replace('/', '-')}"
            _link(project / folders[model], folder.resolve())
    content = params.model_dump(mode="json") | {"clips": clips}
    _write_if_changed(project / "params.yaml", _yaml(content))
    load_params(project / "params.yaml")
    _write_if_changed(project / "dvc.yaml", _yaml(_dvc_stages(root, params, folders)))
    _write_if_changed(project / ".dvc/config", DVC_CONFIG)
    for watched in WATCHED_FOLDERS:
        _write_if_changed(project / watched / ".gitkeep", "")
    _write_if_changed(project / "data/scenes/README", "No scene files: the ground truth of these edits is unknown.\n")


def _dvc_stages(root: Path, params: Params, folders: Mapping[str, str]) -> dict[str, Any]:
    """Return the project's dvc.yaml with the models' folders as further dependencies.

    The weights of a benchmark are to be those of its scores, while a project may leave them to their name.

    Raises:
        TavError: the project has no dvc.yaml.
    """
    path = root / "dvc.yaml"
    if not path.is_file():
        raise TavError(f"{path}: no such file; restore it: git checkout dvc.yaml")
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    scorers = [name for name in (params.score.clip_model, params.score.pickscore_model) if name]
    control = [name for one in params.control for name in (one.model, one.annotator, one.detector) if name]
    for stage, used in {"encode": [params.base_model], "annotate": control, "score": scorers}.items():
        deps = [folders[name] for name in dict.fromkeys(used) if name in folders]
        content["stages"][stage]["do"]["deps"] += deps
    return content


def _yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


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

    from tav_model.video import read_video

    edits = Project(project).edits(entry.clip_name)
    target, record = folder / entry.name, project / ".tav" / "submitted" / f"{entry.clip_name}.json"
    identity = digest(edits)
    if target.is_dir() and record.exists() and read_json(record) == identity:
        return
    with atomic_folder(target) as temporary:
        for category in EDITS:
            (temporary / category).mkdir()
            frames: np.ndarray = read_video(edits / f"{category}.mp4")[0]
            for index, frame in enumerate(frames):
                image = Image.fromarray(frame)
                if image.size != (SIDE, SIDE):
                    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                image.save(temporary / category / f"{index:05}.jpg", quality=JPEG_QUALITY, subsampling=0)
    write_json(record, identity)


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
            texts = (format_score(metric, values[metric]) if metric in values else "" for values in means.values())
            rows.append([metric, *texts])
    return rows


def _markdown_table(means: Mapping[str, Mapping[str, float]]) -> str:
    header, *rows = table_cells(means)
    lines = [header, ["---", *["---:"] * len(means)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
