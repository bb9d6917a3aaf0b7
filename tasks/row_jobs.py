"""One row of a batch on another machine: what it is told, the files it lacks, and what it gives back.

The machine that drives describes the project (a few small texts); the worker makes a project of its own from that, pulls
from the DVC remote just the files that a row is rendered from, and renders it by the same code. The row's identity is a
digest of all its inputs, and must be the same on both: the worker renders that row, or says why it cannot.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tasks.clip_stages import ClipStages
from tasks.rows import RowBatch
from tav.config.paths import Project
from tav.config.prompts import EditRow
from tav.config.results import EDIT_SUFFIXES
from tav.runtime.devices import exclusive_gpu
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, write_text

KEEP_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class RowJob:
    """A row to render.

    Attributes:
        clip: the clip's name.
        identity: of the row, as `tasks.edit.Edit` has it.
        steps: how many it takes.
        root: the project's folder on the machine that drives; used where there is no remote.
        texts: params.yaml, dvc.yaml, dvc.lock and the prompt CSV, by path.
        remote: the DVC remote that has the inputs, as `DvcPipeline.publish` gives it; None: the workers share the driver's
            files.
        threads: of torch on a CPU, whose sums depend on it.
        gpu_share: of a GPU; less than 1 shares it.
    """

    clip: str
    identity: str
    steps: int
    root: str
    texts: tuple[tuple[str, str], ...]
    remote: tuple[tuple[str, str], ...] | None
    threads: int
    gpu_share: float


def inputs_of(project: Project, clip: str) -> list[str]:
    """What a row is rendered from, relative to the project."""
    tuned = project.tuned(clip)
    paths = (project.inverted(clip), tuned / "tuned.json", tuned / "tuned.safetensors")
    return [path.relative_to(project.root).as_posix() for path in paths]


def describe(stages: ClipStages, edit: EditRow, remote: Mapping[str, str] | None, gpu_share: float) -> RowJob:
    """The job that renders `edit` elsewhere."""
    import torch

    names = ("params.yaml", "dvc.yaml", "dvc.lock", stages.settings.prompts)
    texts = tuple((name, (stages.root / name).read_text(encoding="utf-8")) for name in names)
    return RowJob(
        clip=stages.clip,
        identity=edit.identity,
        steps=edit.steps,
        root=str(stages.root),
        texts=texts,
        remote=None if remote is None else tuple(sorted(remote.items())),
        threads=torch.get_num_threads(),
        gpu_share=gpu_share,
    )


def render(job: RowJob, on_step: Callable[[int], None] | None = None) -> dict[str, bytes]:
    """The row's files by suffix, as the machine that drives puts them into its store.

    Raises:
        TavError: an input that neither the remote nor this machine has, or another base model than the driver's.
    """
    import torch

    torch.set_num_threads(job.threads)
    root = Path(job.root) if job.remote is None else _workspace(job, job.remote)
    if not (root / "params.yaml").exists():
        raise TavError(
            f"the worker {platform.node()} has no folder {root}: give the project a DVC remote (dvc remote add -d), "
            "or let the machines share its folder"
        )
    batch = _batch(root, job.clip, digest(*(text for _, text in job.texts)))
    for edit in batch.edits:
        if edit.identity == job.identity:
            break
    else:
        raise TavError(
            f"the worker {platform.node()} would render something else: its base model {batch.base} is not the driver's"
        )
    if not batch.is_done(edit):
        with contextlib.nullcontext() if job.gpu_share < 1 else exclusive_gpu(batch.device):
            batch.render(edit, on_step)
    folder = batch.store / edit.identity
    return {suffix: (folder / f"edit{suffix}").read_bytes() for suffix in EDIT_SUFFIXES}


def adopt(batch: RowBatch, edit: EditRow, files: dict[str, bytes]) -> None:
    """Put a row that was rendered elsewhere into the driver's store.

    Raises:
        TavError: the files are not whole.
    """
    with atomic_folder(batch.store / edit.identity) as folder:
        for suffix in EDIT_SUFFIXES:
            (folder / f"edit{suffix}").write_bytes(files[suffix])
    if not batch.is_done(edit):
        shutil.rmtree(batch.store / edit.identity)
        raise TavError(f"{edit.name}: what the worker sent is not whole")


@lru_cache(maxsize=1)
def _batch(root: Path, clip: str, inputs: str) -> RowBatch:
    """Kept for the next row of the same batch, with the model on the device."""
    batch = ClipStages(root, clip).edit_batch()
    batch.batch_size = 1
    return batch


def _workspace(job: RowJob, remote: tuple[tuple[str, str], ...]) -> Path:
    """A project with the job's texts and inputs, in the user's cache folder (TAV_WORKSPACES, if set)."""
    home = Path(os.environ.get("TAV_WORKSPACES") or _cache_home() / "tav" / "workspaces")
    root = home / digest(*(part for pair in remote + job.texts for part in pair))
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / "lock"):
        _remove_old(home, keep=root)
        whole = root / ".tav" / "pulled"
        if not whole.exists():
            for name, text in job.texts:
                write_text(root / name, text)
            _write_config(root, home / "cache", dict(remote))
            _pull(root, inputs_of(Project(root), job.clip))
            write_text(whole, "")
        os.utime(root)
    return root


def _write_config(root: Path, cache: Path, remote: Mapping[str, str]) -> None:
    """Of a DVC project without git, whose cache all workspaces share."""
    from dvc.config import Config

    (root / ".dvc").mkdir(parents=True, exist_ok=True)
    with Config(str(root / ".dvc"), validate=False).edit("repo") as config:
        config["core"] = {"no_scm": True, "analytics": False, "remote": "driver"}
        config["cache"] = {"dir": str(cache)}
        config["remote"] = {"driver": dict(remote)}


def _pull(root: Path, paths: list[str]) -> None:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            repo.pull(targets=[str(root / path) for path in paths])
    except DvcException as error:
        raise TavError(
            f"the worker {platform.node()} cannot pull {', '.join(paths)}: {' '.join(str(error).split())}"
        ) from error


def _remove_old(home: Path, keep: Path) -> None:
    """Workspaces of a week ago; DVC's cache beside them holds files that come from the remote."""
    for path in home.iterdir():
        if (
            path.is_dir()
            and path.name not in (keep.name, "cache")
            and time.time() - path.stat().st_mtime > KEEP_SECONDS
        ):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cache_home() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir())
