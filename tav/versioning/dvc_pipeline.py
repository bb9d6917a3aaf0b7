"""DVC in process: which stages are up to date, what its cache can give back, what a stage that has run leaves.

A stage of a clip is DVC's `STAGE@CLIP` of dvc.yaml. dvc.lock, the cache and the run cache are written as `dvc repro`
writes them, so that either goes on where the other has stopped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tav.config.dotted_keys import flatten
from tav.runtime.redaction import redact
from tav.versioning.recovery import mend, remove_partial_copies
from tav_model.disk_space import explained_full_disk
from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    from dvc.dvcfile import ProjectFile
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

Answer = TypeVar("Answer")
# What a stage stands on: its command, the contents of its dependencies (a hash), its parameters.
Inputs = dict[str, Any]

# The options of a remote that say where it is; the others may be secrets.
REACHING = ("url", "endpointurl", "region", "profile", "port", "user")
LONGEST_VALUE = 40  # characters of a parameter in a reason

logger = logging.getLogger(__name__)

# DVC's locks are between processes; threads of this one go one by one.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class DvcStageStatus:
    """How a stage stands.

    Attributes:
        state: up to date, stale, never run, or in use: another process reads or writes its files as a part of DVC.
        reasons: what is not as dvc.lock has it, in words; or who that process is.
        is_restorable: not up to date, but DVC's cache has what it would give.
    """

    state: str
    reasons: list[str]
    is_restorable: bool = False


class DvcPipeline:
    """The DVC project in `root`, which must be the current folder: DVC looks for dvc.yaml there.

    Every method looks at the files as they are now, and may be called from any thread.

    Args:
        root: the project's folder, with `.dvc` in it.
        wait: seconds to wait for another process that uses DVC here.

    Raises:
        TavError: from every method: no such stage or clip, files that DVC cannot read, an input that is missing, or
            another process that holds DVC's locks for longer than `wait`.
        FullDiskError: DVC finds no room.
    """

    def __init__(self, root: Path, wait: float = 60) -> None:
        self.root, self.wait = root.resolve(), wait
        self._added: list[str] = []
        self._is_cache_clear = False
        self._parsed: tuple[Any, dict[str, Any]] | None = None

    def is_current(self, stage: str, clip: str) -> bool:
        """Whether `dvc repro` would skip the stage: command, inputs and outputs are those of dvc.lock."""
        return self._ask(stage, clip, lambda loaded: not loaded.changed())

    def status(self, clip: str, stages: Sequence[str]) -> dict[str, DvcStageStatus]:
        """How each of the stages stands, for the inputs as they lie there now. Nothing is changed."""
        from dvc.lock import LockError

        def look(loaded: PipelineStage) -> DvcStageStatus:
            try:
                return _status(loaded)
            except LockError as error:
                return DvcStageStatus("in use", [self._holder(error)])

        name = f"{stages[0]}@{clip}"
        return self._ask_all(name, lambda project: {stage: look(project.stages[f"{stage}@{clip}"]) for stage in stages})

    def restore(self, stage: str, clip: str) -> bool:
        """Bring back from DVC's cache what the stage gave for the inputs as they are now, if it is there.

        That is the record in dvc.lock when only outputs are missing or changed, else that of the run cache. Files in
        the outputs' places are replaced.

        Returns:
            True: the stage is now up to date, dvc.lock included. False: nothing was touched.
        """
        return self._ask(stage, clip, self._restore)

    def snapshot(self, stage: str, clip: str) -> Inputs:
        """The stage's inputs as they are now: to be taken before it runs, and handed to `commit` after."""
        return self._ask(stage, clip, _read_inputs)

    def commit(self, stage: str, clip: str, before: Inputs) -> None:
        """Record what the stage has just left: its outputs in the cache, its inputs and outputs in dvc.lock.

        Args:
            before: what `snapshot` gave before the stage ran.

        Raises:
            TavError: the inputs are other ones by now, or an output is missing; dvc.lock is as it was.
        """
        self._ask(stage, clip, lambda loaded: self._commit(loaded, before))

    def publish(self, stage: str, clip: str, paths: Sequence[str]) -> dict[str, str] | None:
        """Push outputs of the stage to the default DVC remote, where it lacks them.

        Args:
            paths: outputs, as dvc.yaml names them.

        Returns:
            What another machine needs to reach the remote, without any credentials: it has its own. None: the project
            has no default remote.

        Raises:
            TavError: the remote cannot be reached, or an output is in no cache.
        """
        return self._ask(stage, clip, lambda loaded: _push(loaded, paths))

    def _restore(self, stage: PipelineStage) -> bool:
        from dvc.stage.cache import RunCacheNotFoundError

        if stage.changed_stage() or not stage.deps_cached():
            stage.save_deps()
            for output in stage.outs:
                output.clear()  # What dvc.lock says of it is for other inputs.
        cache = stage.repo.stage_cache
        try:
            cache.restore(stage, dry=True)
        except RunCacheNotFoundError:
            return False
        stage.remove_outs()  # DVC asks before it overwrites what it does not know.
        cache.restore(stage)
        stage.save(run_cache=False)
        self._record(stage)
        return True

    def _commit(self, stage: PipelineStage, before: Inputs) -> None:
        stage.save(run_cache=False)
        now = _inputs(stage)
        changed = [what for what in {**before, **now} if before.get(what) != now.get(what)]
        if changed:
            raise TavError(
                f"{stage.name}: changed while the stage was running: {', '.join(changed)}; "
                "what it left is not recorded, run it again"
            )
        self._record(stage)

    def _record(self, stage: PipelineStage) -> None:
        stage.repo.stage_cache.save(stage)
        stage.commit()
        self._write_lock_file(stage)

    def _write_lock_file(self, stage: PipelineStage) -> None:
        """Put the stage into dvc.lock with DVC's own serializer, but whole or not at all, which DVC's writing is not.

        `dvc repro` goes through all clips stage by stage, a flow may go clip by clip: entries that were added here are
        kept in the order of dvc.yaml, for the same bytes at the end.
        """
        from dvc.stage.serialize import to_lockfile
        from dvc.utils.serialize import dump_yaml, parse_yaml_for_update

        path = self.root / "dvc.lock"
        content = parse_yaml_for_update(path.read_text(encoding="utf-8"), path) if path.exists() else {}
        if not content:
            content["schema"] = "2.0"
        entries = content.setdefault("stages", {})
        is_new = stage.name not in entries
        entries.update(to_lockfile(stage))
        if is_new:
            order = {name: place for place, name in enumerate(stage.dvcfile.stages)}
            later = [name for name in self._added if name in entries and order.get(name, -1) > order[stage.name]]
            for name in sorted(later, key=order.__getitem__):
                entries[name] = entries.pop(name)
            self._added.append(stage.name)
        with atomic_file(path) as temporary:
            dump_yaml(temporary, content)
        stage.repo.scm_context.track_file(path.name)  # For those who have core.autostage on.

    def _ask(self, stage: str, clip: str, action: Callable[[PipelineStage], Answer]) -> Answer:
        """What `action` makes of the stage, under DVC's locks, with DVC's errors as ours."""
        name = f"{stage}@{clip}"
        return self._ask_all(name, lambda project: action(project.stages[name]))

    def _ask_all(self, name: str, action: Callable[[ProjectFile], Answer]) -> Answer:
        """What `action` makes of dvc.yaml; `name` is for messages."""
        _import_dvc()
        from dvc.exceptions import DvcException
        from dvc.lock import LockError

        end = time.monotonic() + self.wait
        told = False
        while True:
            try:
                with explained_full_disk(self.root / ".dvc"), self._loaded() as loaded:
                    return action(loaded)
            except LockError as error:
                holder = self._holder(error)
                if time.monotonic() >= end:
                    raise TavError(f"{name}: DVC is in use here by {holder}; wait for it to end") from None
                if not told:
                    logger.info("%s: waiting for %s, which uses DVC here", name, holder)
                    told = True
                time.sleep(0.5)
            except DvcException as error:
                raise TavError(f"{name}: {_one_line(error)}") from error

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[ProjectFile]:
        from dvc.repo import Repo, lock_repo

        if Path.cwd() != self.root:
            raise TavError(f"{self.root}: the project must be the current folder, which is {Path.cwd()}")
        if not (self.root / ".dvc").is_dir():
            raise TavError(f"{self.root}: not a DVC project: no folder .dvc")
        with _one_at_a_time, Repo(str(self.root)) as repo, lock_repo(repo), repo.scm_context(quiet=True):
            mend(repo)
            if not self._is_cache_clear:
                remove_partial_copies(repo)
                self._is_cache_clear = True
            yield self._parse(repo)

    def _parse(self, repo: Repo) -> ProjectFile:
        """dvc.yaml with its dvc.lock, parsed again only if they have changed: with many clips that takes seconds."""
        from dvc.dvcfile import ProjectFile

        project = ProjectFile(repo, str(self.root / "dvc.yaml"))
        stamps = [_stamp(self.root / name) for name in ("dvc.yaml", "dvc.lock")]
        if self._parsed and self._parsed[0] == stamps:
            vars(project).update(self._parsed[1])
        else:
            parsed = {name: getattr(project, name) for name in ("contents", "lockfile_contents")}
            self._parsed = stamps, parsed
        return project

    def _holder(self, error: Exception) -> str:
        """Who holds the lock that `error` is about: a running stage by the error's text, else DVC's lock file."""
        import psutil

        found = re.search(r"PID (\d+)", str(error))
        if not found:
            with contextlib.suppress(OSError):
                found = re.search(r"(\d+)", (self.root / ".dvc/tmp/lock").read_text(encoding="utf-8"))
        if not found:
            return "another process"
        try:
            command = _one_line(" ".join(psutil.Process(int(found[1])).cmdline()))
        except psutil.Error:
            command = "which has ended"
        return f"process {found[1]} ({command})"


def _push(stage: PipelineStage, paths: Sequence[str]) -> dict[str, str] | None:
    repo = stage.repo
    name = repo.config["core"].get("remote")
    if not name:
        return None
    repo.push(targets=[output.def_path for output in stage.outs if output.def_path in paths])
    options = repo.config["remote"][name]
    return {key: redact(str(options[key])) for key in REACHING if key in options}


def _status(stage: PipelineStage) -> DvcStageStatus:
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
        # What is not there at all is in the same folder as others that are not.
        reasons += [f"{path} {_said(how)}" for path, how in output.status().items()]
    restorable = all(dependency.exists for dependency in stage.deps) and _is_in_cache(stage)
    if is_new:
        missing = [f"{dependency} is missing" for dependency in stage.deps if not dependency.exists]
        return DvcStageStatus("never run", missing, restorable)
    return DvcStageStatus("stale", list(dict.fromkeys(reasons)), restorable)


def _differences(dependency: Any) -> list[str]:
    """In what a dependency is other than dvc.lock has it: `tune.steps 400 → 300`, `data/ball.csv changed`."""
    from dvc.dependency import ParamsDependency

    if not isinstance(dependency, ParamsDependency):
        return [f"{path} {_said(how)}" for path, how in dependency.status().items()]
    before, now = flatten(dependency.hash_info.value or {}), flatten(dependency.read_params())
    return [
        f"{key} {_value(before, key)} → {_value(now, key)}"
        for key in {**before, **now}
        if _value(before, key) != _value(now, key)
    ]


def _value(values: Mapping[str, Any], key: str) -> str:
    text = _one_line(values.get(key, "unset"))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _said(how: object) -> str:
    words = {"deleted": "is missing", "modified": "changed", "new": "is new", "not in cache": "is in no cache"}
    return words.get(str(how), str(how))


def _is_in_cache(stage: PipelineStage) -> bool:
    """Whether `DvcPipeline.restore` would bring the outputs back."""
    from dvc.stage.cache import RunCacheNotFoundError

    if stage.changed_stage() or not stage.deps_cached():
        stage.save_deps()
        for output in stage.outs:
            output.clear()
    try:
        stage.repo.stage_cache.restore(stage, dry=True)
    except RunCacheNotFoundError:
        return False
    return True


def _read_inputs(stage: PipelineStage) -> Inputs:
    stage.save_deps()
    return _inputs(stage)


def _inputs(stage: PipelineStage) -> Inputs:
    """The inputs that the stage has in memory, by names for people."""
    from dvc.dependency import ParamsDependency

    inputs: Inputs = {"its command": stage.cmd}
    for dependency in stage.deps:
        value = dependency.hash_info.value
        if isinstance(dependency, ParamsDependency):
            inputs |= {f"{dependency.def_path}: {name}": parameter for name, parameter in value.items()}
        else:
            inputs[dependency.def_path] = value
    return inputs


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


@functools.cache
def _import_dvc() -> None:
    """Import DVC as a library.

    Its import sets up a command line: handlers that print, output streams that are wrapped, asyncio's messages off.
    Here its messages go where the application's go, and it draws no progress bars.
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
    for name in ("dvc.progress", "dvc_data.callbacks"):  # whose levels decide on progress bars
        logging.getLogger(name).setLevel(logging.CRITICAL)
