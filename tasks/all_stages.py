"""All stages of a clip in one process, which imports torch and the other libraries once. DVC records each stage."""

from __future__ import annotations

from pathlib import Path

from tasks.clip_stages import ClipStages
from tav.config.stages import STAGES
from tav.reports.report import refresh_reports
from tav.runtime.events import EventStream, StageRestored, StageUpToDate
from tav.versioning.dvc_pipeline import DvcPipeline


def bring_up_to_date(root: Path, clip: str, events: EventStream) -> None:
    """Run the stages of a clip that are out of date, as `dvc repro score@CLIP` does, with the same dvc.lock in the end.

    Each stage is recorded when it has ended, so that a run that is interrupted resumes with the next one. In the end the
    clip's report shows the present results, whether they were computed or restored.

    Args:
        root: the project's folder, which must be the current one.
        clip: the clip.
        events: receives what happens.

    Raises:
        TavError: a user's mistake, or a project that DVC cannot read.
        FullDiskError: the disk is full.
    """
    pipeline = DvcPipeline(root)
    for stage in STAGES:
        if why_not_run(pipeline, events, stage, clip) is not None:
            continue
        before = pipeline.snapshot(stage, clip)
        stages = ClipStages(root, clip, events)
        stages.run(stage)
        if stage == "score":
            stages.report()
        pipeline.commit(stage, clip, before)
    refresh_reports(root, clip)


def why_not_run(pipeline: DvcPipeline, events: EventStream, stage: str, clip: str) -> str | None:
    """Return why a stage need not run, after restoring its outputs if DVC's cache has them; None if it must run.

    Raises:
        TavError: DVC cannot read the project, or an input is missing.
    """
    if pipeline.is_current(stage, clip):
        events.publish(StageUpToDate(clip=clip, stage=stage))
        return "up to date"
    if pipeline.restore(stage, clip):
        events.publish(StageRestored(clip=clip, stage=stage))
        return "restored from DVC's cache"
    return None
