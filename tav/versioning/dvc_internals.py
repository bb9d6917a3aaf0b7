"""All that this project uses of DVC's internals, which may change with each of its minor versions.

DVC documents a command line and `dvc.api`. Neither will do:

- `dvc.api` reads files, parameters, metrics and experiments. It cannot say whether a stage is up to date, restore a stage
  from the run cache, or record one that ran outside `dvc repro`.
- Each call of `dvc` takes about 2 s to start. A flow asks about every stage of every clip, and must end within 5 s if
  there is nothing to do. DVC in the process answers within milliseconds.
- `dvc commit` does not write the run cache, and records inputs that changed while the stage ran without noticing. No
  command restores a stage without running it if the run cache has nothing.

So this module works on DVC's own objects, in the way `dvc repro` does:

=====================================  ====================================================================
`dvc.repo`                             `Repo`: `push`, `pull`, `scm_context`, `stage_cache`, `cache.local.path`, `config`,
                                       `root_dir`, `tmp_dir`; `lock_repo`, the lock that `dvc` takes itself
`dvc.dvcfile.ProjectFile`              `stages`, `contents`, `lockfile_contents`: dvc.yaml resolved, with its dvc.lock
`dvc.stage.PipelineStage`              `changed`, `changed_stage`, `status`, `deps_cached`, `save_deps`, `save`, `commit`,
                                       `remove_outs`; `cmd`, `deps`, `outs`, `name`, `addressing`, `dvcfile`, `repo`
`dvc.output.Output`, `dvc.dependency`  `clear`, `status`, `exists`, `hash_info`, `meta`, `def_path`, `fs_path`, `save`,
                                       `commit`; `ParamsDependency`: `read_params`, `fill_values`, `params`
`dvc.stage.cache`                      `StageCache`: `restore`, `save`, the run cache; `RunCacheNotFoundError`
`dvc.stage.serialize`, `dvc.utils`     `to_lockfile`, `parse_yaml_for_update`, `dump_yaml`: entries of dvc.lock, byte for byte
`dvc.lock`, `dvc.exceptions`           `make_lock`, `LockError`, `DvcException`
`dvc.config.Config`                    `edit`: the configuration of a project that only pulls
names and files                        loggers of `dvc`, `dvc_data`, `dvc_objects`; `.dvc/tmp/lock`, `.dvc/tmp/rwlock`
=====================================  ====================================================================

pyproject.toml therefore pins DVC's minor version, and tests/tav/versioning/test_dvc_internals.py names what is missing or
has another signature in another one.

DVC is imported when it is first used, by `import_dvc`, because that takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tav.config.clip_settings import LATER_SECTIONS, effective_settings, is_own_key, no_own_settings
from tav.config.dotted_keys import flatten
from tav.config.paths import WATCHED_FOLDERS
from tav.config.stages import CONTROLLED_STAGES
from tav.runtime.redaction import redact
from tav.versioning.recovery import clear_stale_locks, has_stale_locks, remove_partial_copies, repair_lock_file
from tav_model.errors import TavError
from tav_model.files import atomic_file, atomic_folder, write_json

if TYPE_CHECKING:
    from dvc.dependency import Dependency
    from dvc.dvcfile import ProjectFile
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

# A stage's command, the hashes of its dependencies, and its parameters, by names for people.
Inputs: TypeAlias = dict[str, Any]

# The options of a remote that say where it is; the others may be secrets.
REMOTE_ADDRESS = ("url", "endpointurl", "region", "profile", "port", "user")
MAX_VALUE_LENGTH = 40  # characters of a parameter in a reason
CHANGES = {"deleted": "is missing", "modified": "changed", "new": "is new", "not in cache": "is not in the cache"}


class DvcError(Exception):
    """DVC reports an error; the message is one line."""


class DvcLockedError(Exception):
    """Another process holds one of DVC's locks; the message is DVC's."""


@dataclass(frozen=True)
class DvcStageStatus:
    """Whether a stage is up to date.

    Attributes:
        state: `up to date`, `stale`, `never run`, or `in use`: another process reads or writes its files with DVC.
        reasons: what differs from dvc.lock, in words; or which process uses it.
        is_restorable: it is not up to date, but DVC's cache has what it would produce.
    """

    state: str
    reasons: list[str]
    is_restorable: bool = False


@functools.cache
def import_dvc() -> None:
    """Import DVC as a library.

    Its import sets up a command line: it adds log handlers that print, wraps the output streams and silences asyncio. Undo
    that, so that its messages go where the application's go, and turn off its progress bars.
    """
    streams = sys.stdout, sys.stderr
    levels = {name: logging.getLogger(name).level for name in ("asyncio", "aiohttp")}
    importlib.import_module("dvc.repo")
    sys.stdout, sys.stderr = streams
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in ("dvc.progress", "dvc_data.callbacks"):  # Their levels decide whether progress bars are drawn.
        logging.getLogger(name).setLevel(logging.CRITICAL)


# The project


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Turn DVC's errors into this module's.

    Raises:
        DvcLockedError: Another process holds one of DVC's locks.
        DvcError: Any other error of DVC.
    """
    import_dvc()
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    try:
        yield
    except LockError as error:
        raise DvcLockedError(str(error)) from error
    except DvcException as error:
        raise DvcError(one_line(error)) from error


@contextlib.contextmanager
def locked_repo(root: Path) -> Iterator[Repo]:
    """Open the project and hold DVC's lock on it, as every `dvc` command does.

    Raises:
        DvcLockedError, DvcError: as `own_errors`, also for errors inside the `with` block.
    """
    with own_errors():
        from dvc.repo import Repo, lock_repo

        with Repo(str(root)) as repo, lock_repo(repo), repo.scm_context(quiet=True):
            yield repo


def repair(repo: Repo) -> None:
    """Repair dvc.lock and drop stale locks, where a killed process has left them.

    Raises:
        dvc.lock.LockError: Another process is changing DVC's table of locks.
    """
    from dvc.lock import make_lock

    repair_lock_file(Path(repo.root_dir) / "dvc.lock")
    table = Path(repo.tmp_dir) / "rwlock"
    if has_stale_locks(table):
        hardlink = repo.config["core"].get("hardlink_lock", False)
        with make_lock(f"{table}.lock", tmp_dir=repo.tmp_dir, hardlink_lock=hardlink):
            clear_stale_locks(table)


def clear_cache(repo: Repo) -> None:
    """Remove partial copies from DVC's cache that killed processes have left."""
    remove_partial_copies(Path(repo.cache.local.path))


def complete_records(project: ProjectFile) -> None:
    """Complete dvc.lock of earlier versions, so that the stages stay up to date.

    Earlier versions had no stage `annotate`, no section `window` and no folders of masks and conditions, and in the first
    ones a clip could have own settings of `decode` alone. The outputs in dvc.lock were made without control, windows, masks
    and other settings, so that is what is recorded.
    """
    stages: dict[str, PipelineStage] = {}  # Each access to `project.stages` loads a stage anew.
    for name in project.lockfile_contents.get("stages", {}):
        if name in project.stages:
            stages[name] = project.stages[name]
    folders = _record_watched_folders(
        project, stages
    )  # First: the run cache keeps stages with all that they depend on.
    changed = folders + _record_no_control(project, stages) + _record_no_own_settings(project, stages)
    if changed:
        path = Path(project.repo.root_dir) / "dvc.lock"
        content = _parse_lock_file(path)
        for name in dict.fromkeys(changed):
            _insert(content["stages"], stages[name], list(project.stages))
        _write_lock_file(path, content)


def _record_no_control(project: ProjectFile, stages: dict[str, PipelineStage]) -> list[str]:
    """Record the stage `annotate` without control for clips of earlier versions; return the stages that have changed.

    Its output is written into the results and the cache.
    """
    changed: list[str] = []
    for name in [name for name in stages if name.startswith("decode@")]:
        clip = name.partition("@")[2]
        later = [stages[one] for stage in CONTROLLED_STAGES if (one := f"{stage}@{clip}") in stages]
        annotate = f"annotate@{clip}"
        if annotate in stages or annotate not in project.stages or not later:
            continue
        stage = project.stages[annotate]
        (output,) = stage.outs
        others = [
            dep for dep in stage.deps if not _is_parameters(dep) and dep.def_path != stages[name].outs[0].def_path
        ]
        if not all(dep.exists for dep in others):
            continue  # As a new stage would be, it is refused by DVC.
        if not output.exists:
            with atomic_folder(output.fs_path) as folder:
                for one in CONTROLLED_STAGES:
                    write_json(folder / f"{one}.json", [])
        for dep in stage.deps:
            if _is_parameters(dep):
                dep.fill_values({key: [] if key == "control" else None for key in dep.params})
            elif dep in others:
                dep.save()
            else:  # The clip's frames, which may not have been pulled.
                dep.hash_info, dep.meta = stages[name].outs[0].hash_info, stages[name].outs[0].meta
        output.save()
        output.commit()
        for one in later:
            for dep in one.deps:
                if not _is_parameters(dep) and Path(dep.fs_path).parent == Path(output.fs_path):
                    dep.save()
        stages[annotate] = stage
        _save_in_run_cache(stage, *later)
        changed += [annotate, *(one.name for one in later)]
    return changed


def _record_no_own_settings(project: ProjectFile, stages: Mapping[str, PipelineStage]) -> list[str]:
    """Record that earlier versions had no such settings; return the stages that have changed."""
    changed = []
    for name, entry in project.lockfile_contents.get("stages", {}).items():
        if name not in stages or not _lacks_parameters(project, name, entry):
            continue
        stage = stages[name]
        for dependency in stage.deps:
            if _is_parameters(dependency) and dependency.hash_info.value is not None:
                recorded = dependency.hash_info.value
                keys = [key for key in dependency.params if _is_completed(key) and key not in recorded]
                if not keys:
                    continue
                current = dependency.read_params()
                dependency.hash_info.value = recorded | {key: _earlier_value(key, current.get(key)) for key in keys}
                _save_in_run_cache(stage)
                changed.append(name)
    return changed


def _record_watched_folders(project: ProjectFile, stages: Mapping[str, PipelineStage]) -> list[str]:
    """Record the folders that stages did not depend on in earlier versions; return the stages that have changed."""
    changed = []
    for name, entry in project.lockfile_contents.get("stages", {}).items():
        if name not in stages:
            continue
        missing = set(WATCHED_FOLDERS) - {dependency["path"] for dependency in entry.get("deps", [])}
        for dependency in stages[name].deps:
            if not _is_parameters(dependency) and dependency.def_path in missing and dependency.exists:
                dependency.save()
                _save_in_run_cache(stages[name])
                changed.append(name)
    return changed


def _is_parameters(dependency: Dependency) -> bool:
    from dvc.dependency import ParamsDependency

    return isinstance(dependency, ParamsDependency)


def _save_in_run_cache(*stages: PipelineStage) -> None:
    """Save stages whose inputs are there; otherwise DVC cannot hash them, and dvc.lock is enough."""
    for stage in stages:
        if all(dependency.exists for dependency in stage.deps):
            stage.repo.stage_cache.save(stage)


def _insert(entries: dict[str, Any], stage: PipelineStage, order: list[str]) -> None:
    """Put the entry of a stage into those of dvc.lock, a new one before those that come later in dvc.yaml."""
    from dvc.stage.serialize import to_lockfile

    is_new = stage.name not in entries
    entries.update(to_lockfile(stage))
    if is_new:
        place = order.index(stage.name)
        names = [name for name in entries if name != stage.name]
        later = next((i for i, name in enumerate(names) if name in order and order.index(name) > place), len(names))
        for name in names[later:]:
            entries[name] = entries.pop(name)


def _parse_lock_file(path: Path) -> dict[str, Any]:
    """Return the contents of dvc.lock in the form that DVC writes back with its comments."""
    from dvc.utils.serialize import parse_yaml_for_update

    content: dict[str, Any] = parse_yaml_for_update(path.read_text(encoding="utf-8"), path)
    return content


def _write_lock_file(path: Path, content: Mapping[str, Any]) -> None:
    from dvc.utils.serialize import dump_yaml

    with atomic_file(path) as temporary:
        dump_yaml(temporary, content)


def _lacks_parameters(project: ProjectFile, name: str, entry: Mapping[str, Any]) -> bool:
    """Return whether dvc.lock lacks parameters of a stage; dvc.yaml is read as it is written, which is faster."""
    stage, _, clip = name.partition("@")
    definition = project.contents.get("stages", {}).get(stage, {})
    listed = definition.get("do", definition).get("params", [])
    keys = [key.replace("${key}", clip) for key in listed if isinstance(key, str)]
    recorded = _recorded_parameters(entry)
    return bool(recorded) and any(_is_completed(key) and key not in recorded for key in keys)


def _is_completed(key: str) -> bool:
    return is_own_key(key) or key in LATER_SECTIONS


def _earlier_value(key: str, current: Any) -> Any:
    """Return the value of a key in a version that lacked it: the present one, where that means the same."""
    if is_own_key(key):
        return no_own_settings()[key.rpartition(".")[2]]
    earlier = LATER_SECTIONS[key]
    is_same = not isinstance(current, Mapping) or all(current.get(name) == value for name, value in earlier.items())
    return current if is_same else dict(earlier)


def _recorded_parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = entry.get("params", {}).get("params.yaml", {})
    return parameters


class ProjectFileCache:
    """dvc.yaml with its dvc.lock, parsed again only if one of them has changed; with many clips parsing takes seconds."""

    def __init__(self, root: Path) -> None:
        self._files = [root / name for name in ("dvc.yaml", "dvc.lock")]
        self._stamps: list[tuple[int, ...] | None] = []
        self._parsed: dict[str, Any] = {}

    def load(self, repo: Repo) -> ProjectFile:
        """Return the project's stages as they are defined now."""
        from dvc.dvcfile import ProjectFile

        project = ProjectFile(repo, str(self._files[0]))
        stamps = [_stamp(path) for path in self._files]
        if stamps == self._stamps:
            vars(project).update(self._parsed)  # It would compute these attributes when they are first read.
        else:
            self._parsed = {name: getattr(project, name) for name in ("contents", "lockfile_contents")}
            self._stamps = stamps
        return project


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def lock_holder(root: Path, error: DvcLockedError) -> str:
    """Return which process holds the lock: of a running stage, by the error's message; else by DVC's lock file."""
    import psutil

    found = re.search(r"PID (\d+)", str(error))
    if not found:
        with contextlib.suppress(OSError):
            found = re.search(r"(\d+)", (root / ".dvc/tmp/lock").read_text(encoding="utf-8"))
    if not found:
        return "another process"
    try:
        command = one_line(" ".join(psutil.Process(int(found[1])).cmdline()))
    except psutil.Error:
        command = "which has ended"
    return f"process {found[1]} ({command})"


def configured_cache_folder(root: Path) -> Path:
    """Return the folder of DVC's local cache, as `dvc config cache.dir` sets it."""
    import_dvc()
    from dvc.config import Config

    folder = Config(str(root / ".dvc"))["cache"].get("dir")
    return Path(folder) if folder else root / ".dvc" / "cache"


# A stage


def is_current(stage: PipelineStage) -> bool:
    """Return whether `dvc repro` would skip the stage."""
    return not stage.changed()


def read_inputs(stage: PipelineStage) -> Inputs:
    """Return the stage's inputs as they are now."""
    stage.save_deps()
    return _saved_inputs(stage)


def _saved_inputs(stage: PipelineStage) -> Inputs:
    from dvc.dependency import ParamsDependency

    inputs: Inputs = {"its command": stage.cmd}
    for dependency in stage.deps:
        value = dependency.hash_info.value
        if isinstance(dependency, ParamsDependency):
            inputs |= {f"{dependency.def_path}: {name}": parameter for name, parameter in value.items()}
        else:
            inputs[dependency.def_path] = value
    return inputs


def restore(stage: PipelineStage) -> bool:
    """Bring the stage's outputs back from the cache, but do not record them in dvc.lock.

    Returns:
        Whether the cache had them; if not, no file was changed.
    """
    if not _find_in_cache(stage):
        return False
    stage.remove_outs()  # DVC asks before it overwrites files that it does not know.
    stage.repo.stage_cache.restore(stage)
    stage.save(run_cache=False)
    return True


def _find_in_cache(stage: PipelineStage) -> bool:
    """Return whether the cache has the stage's outputs for its current inputs.

    That is the record in dvc.lock if its settings are the same, otherwise that of the run cache.
    """
    from dvc.stage.cache import RunCacheNotFoundError

    if _has_recorded_settings(stage):
        stage.save_deps()  # The same settings in their present form.
    elif stage.changed_stage() or not stage.deps_cached():
        stage.save_deps()
        for output in stage.outs:
            output.clear()  # Their hashes from dvc.lock belong to other inputs.
    try:
        stage.repo.stage_cache.restore(stage, dry=True)
    except RunCacheNotFoundError:
        return False
    return True


def _has_recorded_settings(stage: PipelineStage) -> bool:
    """Return whether the outputs in dvc.lock are those of the inputs as they are now, however its parameters are written.

    To DVC, a stage is out of date if a common setting has changed that the clip replaces by its own. Its outputs are none
    the less what it would produce.
    """
    from dvc.dependency import ParamsDependency

    if stage.changed_stage() or not all(output.hash_info for output in stage.outs):
        return False
    for dependency in stage.deps:
        if not isinstance(dependency, ParamsDependency):
            if dependency.status():
                return False
        elif effective_settings(dependency.hash_info.value or {}) != effective_settings(dependency.read_params()):
            return False
    return True


def save(stage: PipelineStage, inputs: Inputs) -> None:
    """Hash what the stage has just produced, but do not record it in dvc.lock.

    Args:
        stage: the stage that has run.
        inputs: as `read_inputs` returned them before the stage ran.

    Raises:
        TavError: The inputs have changed since, or an output is missing.
    """
    stage.save(run_cache=False)
    now = _saved_inputs(stage)
    changed = [name for name in {**inputs, **now} if inputs.get(name) != now.get(name)]
    if changed:
        raise TavError(
            f"{stage.name}: changed while the stage was running: {', '.join(changed)}; "
            "its outputs are not recorded, run it again"
        )


def record(stage: PipelineStage, added: list[str]) -> None:
    """Put a saved stage into the cache, the run cache and dvc.lock.

    DVC's serializer writes dvc.lock, but atomically, which DVC's own writing is not.

    Args:
        stage: as `restore` or `save` have left it.
        added: names of the stages that were added to dvc.lock before, which is extended. `dvc repro` goes through all
            clips stage by stage, a flow may go clip by clip: these entries are kept in the order of dvc.yaml, so that the
            file has the same bytes at the end.
    """
    from dvc.stage.serialize import to_lockfile

    stage.repo.stage_cache.save(stage)
    stage.commit()
    path = Path(stage.repo.root_dir) / "dvc.lock"
    content = _parse_lock_file(path) if path.exists() else {}
    if not content:
        content["schema"] = "2.0"
    entries = content.setdefault("stages", {})
    is_new = stage.name not in entries
    entries.update(to_lockfile(stage))
    if is_new:
        order = {name: place for place, name in enumerate(stage.dvcfile.stages)}
        later = [name for name in added if name in entries and order.get(name, -1) > order[stage.name]]
        for name in sorted(later, key=order.__getitem__):
            entries[name] = entries.pop(name)
        added.append(stage.name)
    _write_lock_file(path, content)
    stage.repo.scm_context.track_file(path.name)  # for users who have turned core.autostage on


def push(stage: PipelineStage, paths: Sequence[str]) -> dict[str, str] | None:
    """Push outputs of the stage to the default remote, and return the remote's address; None without a default remote."""
    repo = stage.repo
    name = repo.config["core"].get("remote")
    if not name:
        return None
    repo.push(targets=[output.def_path for output in stage.outs if output.def_path in paths])
    options = repo.config["remote"][name]
    return {key: redact(str(options[key])) for key in REMOTE_ADDRESS if key in options}


def status(stage: PipelineStage) -> DvcStageStatus:
    """Return whether the stage is up to date, and what has changed. No file is changed."""
    entries = stage.status().get(stage.addressing, [])
    if not entries:
        return DvcStageStatus("up to date", [])
    is_new = not any(output.hash_info for output in stage.outs)
    reasons: list[str] = []
    if stage.changed_stage() and not is_new:
        reasons.append("its command changed")
    for dependency in stage.deps:
        reasons += _differences(dependency)
    for output in stage.outs:
        reasons += [f"{path} {_change(how)}" for path, how in output.status().items()]
    restorable = all(dependency.exists for dependency in stage.deps) and _find_in_cache(stage)
    if is_new:
        missing = [f"{dependency} is missing" for dependency in stage.deps if not dependency.exists]
        return DvcStageStatus("never run", missing, restorable)
    return DvcStageStatus("stale", list(dict.fromkeys(reasons)), restorable)


def _differences(dependency: Dependency) -> list[str]:
    """Return how a dependency differs from dvc.lock: `tune.steps 400 → 300`, `data/ball.csv changed`."""
    from dvc.dependency import ParamsDependency

    if not isinstance(dependency, ParamsDependency):
        return [f"{path} {_change(how)}" for path, how in dependency.status().items()]
    before, now = flatten(dependency.hash_info.value or {}), flatten(dependency.read_params())
    return [
        f"{key} {_value(before, key)} → {_value(now, key)}"
        for key in {**before, **now}
        if _value(before, key) != _value(now, key)
    ]


def _value(values: Mapping[str, Any], key: str) -> str:
    text = one_line(values.get(key, "None"))
    if text == "None":
        return "unset"
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"


def _change(how: object) -> str:
    return CHANGES.get(str(how), str(how))


def one_line(message: object) -> str:
    """Return a text with all white space, line breaks included, as single spaces."""
    return " ".join(str(message).split())


# A project that only pulls


def write_pull_config(root: Path, cache: Path, remote: Mapping[str, str]) -> None:
    """Configure a DVC project without git in `root` that pulls from `remote`.

    Args:
        root: the project's folder.
        cache: the folder of its cache, which several such projects may share.
        remote: the options of the remote.
    """
    from dvc.config import Config

    (root / ".dvc").mkdir(parents=True, exist_ok=True)
    with Config(str(root / ".dvc"), validate=False).edit("repo") as config:
        config["core"] = {"no_scm": True, "analytics": False, "remote": "driver"}
        config["cache"] = {"dir": str(cache)}
        config["remote"] = {"driver": dict(remote)}


def pull(root: Path, paths: Sequence[str]) -> None:
    """Pull outputs into the project in `root`.

    Args:
        root: the project's folder.
        paths: the outputs, relative to `root`.

    Raises:
        TavError: the remote cannot be reached, or lacks them.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            repo.pull(targets=[str(root / path) for path in paths])
    except DvcException as error:
        raise TavError(f"cannot pull {', '.join(paths)}: {' '.join(str(error).split())}") from error
