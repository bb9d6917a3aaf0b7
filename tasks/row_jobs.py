"""One row of a batch as a job for another machine: its description, its inputs, and the files that come back.

The driver describes the project (a few small texts). The worker makes a project of its own from that, pulls just the files
that a row is rendered from out of the DVC remote, and renders the row by the same code. The row's identity is a digest of
all its inputs and must be the same on both machines; otherwise the worker refuses the job and reports why.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tasks.clip_stages import ClipStages
from tasks.rows import RowBatch, render_rows
from tav.config.paths import Project, project_path
from tav.config.presets import NOT_FILES
from tav.config.prompts import EditRow
from tav.config.results import EDIT_SUFFIXES
from tav.runtime.devices import DevicePool
from tav.runtime.events import EventStream
from tav.runtime.locks import waiting_lock
from tav.versioning.dvc_internals import pull, write_pull_config
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, write_text

KEEP_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class RowJob:
    """A row to render.

    Attributes:
        clip: the clip's name.
        name: the row's name.
        identity: the row's identity, as `tav.config.prompts.EditRow` has it.
        root: the project's folder on the driver; used where there is no remote.
        texts: params.yaml, dvc.yaml, dvc.lock and the prompt CSV, by path.
        mask: the files of the row's mask, by path.
        remote: the DVC remote that has the inputs, as `DvcPipeline.publish` returns it; None where the workers share the
            driver's files.
        threads: of torch on a CPU; the order of its sums depends on them.
        gpu_share: the share of a GPU; less than 1 shares it.
    """

    clip: str
    name: str
    identity: str
    root: str
    texts: tuple[tuple[str, str], ...]
    mask: tuple[tuple[str, bytes], ...]
    remote: tuple[tuple[str, str], ...] | None
    threads: int
    gpu_share: float


def inputs_of(project: Project, clip: str) -> list[str]:
    """Return the files that a row is rendered from, relative to the project."""
    tuned, others = project.tuned(clip), (project.frames(clip), project.control(clip))
    paths = (project.inverted(clip), tuned / "tuned.json", tuned / "tuned.safetensors", *others)
    return [path.relative_to(project.root).as_posix() for path in paths]


def describe(stages: ClipStages, row: EditRow, remote: Mapping[str, str] | None, gpu_share: float) -> RowJob:
    """Return the job that renders `row` elsewhere."""
    import torch

    names = ("params.yaml", "dvc.yaml", "dvc.lock", stages.settings.prompts)
    texts = tuple((name, (stages.root / name).read_text(encoding="utf-8")) for name in names)
    return RowJob(
        clip=stages.clip,
        name=row.name,
        identity=row.identity,
        root=str(stages.root),
        texts=texts,
        mask=_mask_files(stages.root, row.mask),
        remote=None if remote is None else tuple(sorted(remote.items())),
        threads=torch.get_num_threads(),
        gpu_share=gpu_share,
    )


def _mask_files(root: Path, mask: str | None) -> tuple[tuple[str, bytes], ...]:
    """Return the files of a mask by path; none where it is missing, which fails where the row is rendered."""
    if mask is None or mask in NOT_FILES:
        return ()
    path = project_path(root, mask, "mask")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((file.relative_to(root).as_posix(), file.read_bytes()) for file in files if file.is_file())


def render(job: RowJob, events: EventStream) -> dict[str, bytes]:
    """Render the row of a job; returns its files by suffix, as the driver puts them into its store.

    Args:
        job: the job.
        events: receives the row's progress.

    Raises:
        TavError: an input that neither the remote nor this machine has, another base model than the driver's, or the
            row cannot be rendered.
        FullDiskError: this machine's disk is full.
    """
    import torch

    torch.set_num_threads(job.threads)
    root = Path(job.root) if job.remote is None else _workspace(job, job.remote)
    if not (root / "params.yaml").exists():
        raise TavError(
            f"the worker {platform.node()} has no folder {root}: give the project a DVC remote (dvc remote add -d), "
            "or let the machines share its folder"
        )
    batch, pool = _batch(root, job.clip, job.gpu_share, digest(*(text for _, text in job.texts)))
    for row in batch.rows:
        if row.identity == job.identity:
            break
    else:
        raise TavError(
            f"the worker {platform.node()} would render something else: its base model {batch.base} is not the driver's"
        )
    with pool.hold():
        for result in render_rows(batch, [row], events, job.clip):
            if result.error is not None:
                raise TavError(result.error)
    folder = batch.store / row.identity
    return {suffix: (folder / f"edit{suffix}").read_bytes() for suffix in EDIT_SUFFIXES}


def adopt(batch: RowBatch, row: EditRow, files: dict[str, bytes]) -> None:
    """Put a row that was rendered elsewhere into the driver's store.

    Raises:
        TavError: the files are incomplete.
    """
    with atomic_folder(batch.store / row.identity) as folder:
        for suffix in EDIT_SUFFIXES:
            (folder / f"edit{suffix}").write_bytes(files[suffix])
    if not batch.is_done(row):
        shutil.rmtree(batch.store / row.identity)
        raise TavError(f"{row.name}: the files that the worker sent are incomplete")


@lru_cache(maxsize=1)
def _batch(root: Path, clip: str, gpu_share: float, inputs: str) -> tuple[RowBatch, DevicePool]:
    """Keep the batch for the next of its rows, with the model on the device."""
    stages = ClipStages(root, clip)
    pool = DevicePool(stages.pool.devices[:1], exclusive=gpu_share >= 1)
    batch = stages.edit_batch(pool.devices[0])
    batch.batch_size = 1
    return batch, pool


def _workspace(job: RowJob, remote: tuple[tuple[str, str], ...]) -> Path:
    """Make a project with the job's texts and inputs in the user's cache folder (or TAV_WORKSPACES), and return it."""
    home = Path(os.environ.get("TAV_WORKSPACES") or _cache_home() / "tav" / "workspaces")
    masks = tuple((name, hashlib.sha256(content).hexdigest()) for name, content in job.mask)
    root = home / digest(*(part for pair in remote + job.texts + masks for part in pair))
    home.mkdir(parents=True, exist_ok=True)
    with waiting_lock(home / "lock"):  # Other workers of this machine share the cache.
        _remove_old(home, keep=root)
        complete = root / ".tav" / "pulled"
        if not complete.exists():
            for name, text in job.texts:
                write_text(root / name, text)
            for name, content in job.mask:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            write_pull_config(root, home / "cache", dict(remote))
            try:
                pull(root, inputs_of(Project(root), job.clip))
            except TavError as error:
                raise TavError(f"the worker {platform.node()}: {error}") from error
            write_text(complete, "")
        os.utime(root)
    return root


def _remove_old(home: Path, keep: Path) -> None:
    """Remove workspaces unused for a week; DVC's cache beside them holds files that the remote has."""
    for path in home.iterdir():
        if (
            path.is_dir()
            and path.name not in (keep.name, "cache")
            and time.time() - path.stat().st_mtime > KEEP_SECONDS
        ):
            shutil.rmtree(path, ignore_errors=True)


def _cache_home() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir())
