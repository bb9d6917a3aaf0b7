"""Scenes that benchmarks run the method on, and the results of their edits, cached from run to run."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measures import ROOT
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import read_json, write_json, write_text
from toyworld.scenes import Truth

# The sample clips, and scenes that were not looked at while the method's defaults were chosen.
FOLDERS = (ROOT / "data" / "scenes", ROOT / "benchmarks" / "scenes")
# A row of the source's own prompt at guidance scale 1: what inversion and sampling alone preserve.
RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class BenchmarkScene:
    """A scene file.

    Attributes:
        name: name of the file without its suffix, unique among the scenes of a benchmark.
        truth: its content.
    """

    name: str
    truth: Truth


@dataclass(frozen=True)
class EditResult:
    """The scores of one edit with one seed.

    Attributes:
        scene: name of the scene.
        edit: name of the edit.
        category: category of the edit.
        seed: seed of the run.
        scores: scores by metric, as in `tav.config.metrics`.
    """

    scene: str
    edit: str
    category: str
    seed: int
    scores: dict[str, float]


def load_scenes(folders: Iterable[Path], limit: int | None = None) -> list[BenchmarkScene]:
    """Return the scenes in some folders, in the order of the folders and their file names.

    Args:
        folders: folders of scene files, `NAME.json`.
        limit: the largest number of scenes to return, evenly spaced; None: all.

    Raises:
        TavError: no scene file, a damaged one, or one without edits; two scenes of the same name.
    """
    scenes: dict[str, BenchmarkScene] = {}
    for folder in folders:
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise TavError(f"{folder}: no scene file; at least one NAME.json must be there")
        for path in paths:
            scene = BenchmarkScene(path.stem, _with_edits(path))
            if scene.name in scenes:
                raise TavError(f"{path}: another scene has the name {scene.name!r} as well")
            scenes[scene.name] = scene
    found = list(scenes.values())
    return found[:: -(-len(found) // limit)] if limit else found


def _with_edits(path: Path) -> Truth:
    from toyworld.scenes import load_truth

    truth = load_truth(path)
    if not truth.edits:
        raise TavError(f"{path}: no edits; there must be at least one")
    if RECONSTRUCTION in truth.edits:
        raise TavError(f"{path}: an edit must not have the name {RECONSTRUCTION!r}")
    return truth


class SceneRuns:
    """Runs of the method on scenes with the pipeline's own stages. What ran before with the same inputs is not run again.

    Args:
        out: folder of the runs.
        scenes: the scenes.
        seeds: number of seeds; the first is that of params.yaml.
        changes: changes of params.yaml that all runs share, by dotted key.
        prepare: called with the folder of each new project, to add what it needs, such as control networks.
    """

    def __init__(
        self,
        out: Path,
        scenes: Sequence[BenchmarkScene],
        seeds: int = 1,
        changes: Mapping[str, Any] | None = None,
        prepare: Callable[[Path], None] | None = None,
    ) -> None:
        self.out, self.scenes, self.seeds = out, scenes, seeds
        self.changes = dict(changes or {})
        self.prepare = prepare

    def run(
        self, variant: str, changes: Mapping[str, Any] | None = None, tuned_in: str | None = None
    ) -> list[EditResult]:
        """Run a variant of the method on every scene with every seed.

        Args:
            variant: names the folder of its runs.
            changes: changes of params.yaml, by dotted key, in addition to the shared ones.
            tuned_in: another variant, which ran before with the same tuning; its tuned weights are used.

        Returns:
            The scores of every edit, and of a row named "reconstruction" for each scene: the source's own prompt at
            guidance scale 1, compared with the source.
        """
        results = []
        for number in range(self.seeds):
            project = self.project(variant, number)
            seed = _write_params(project, self.scenes, {**self.changes, **(changes or {})}, number)
            if self.prepare:
                self.prepare(project)
            for scene in self.scenes:  # All of them first: one may drive another.
                _write_clip(project, scene)
            for scene in self.scenes:
                results += self._run_scene(project, scene, seed, variant, tuned_in and self.project(tuned_in, number))
        return results

    def project(self, variant: str, number: int = 0) -> Path:
        """Return the folder of the project that a variant runs in with one of the seeds."""
        return self.out / variant.replace(" ", "-").replace(",", "") / f"seed-{number}"

    def _run_scene(
        self, project: Path, scene: BenchmarkScene, seed: int, variant: str, tuned_in: Path | None = None
    ) -> list[EditResult]:
        from tasks.clip_stages import ClipStages
        from tasks.stage_control import network_digest
        from tav.config import RESULT_SECTIONS, load_params
        from tav.config.paths import Project, resolve_model
        from tav.config.results import read_scores
        from tav.config.stages import STAGES
        from tav_model.base_models import base_digest
        from toyworld import WEIGHTS

        params = load_params(project / "params.yaml").for_clip(scene.name)
        # Runs of earlier versions, which had no control, are found by the same parameters.
        sections = params.model_dump_json(include=set(RESULT_SECTIONS) - (set() if params.control else {"control"}))
        networks = [network_digest(resolve_model(project, one.model)) for one in params.control]
        files = [project / "data" / f"{scene.name}.{suffix}" for suffix in ("mp4", "csv")]
        files.append(project / "data" / "scenes" / f"{scene.name}.json")
        identity = digest(base_digest(str(WEIGHTS)), WEIGHTS / "scorer", sections, *files, *networks)
        done = project / "done" / f"{scene.name}.json"
        if not done.exists() or read_json(done).get("identity") != identity:
            print(f"  {variant}, {project.name}: {scene.name}", file=sys.stderr, flush=True)
            stages = STAGES if tuned_in is None else ("annotate", *STAGES[STAGES.index("invert") :])
            for folder in (getattr(Project, name) for name in ("frames", "latents", "tuned") if tuned_in):
                shutil.copytree(
                    folder(Project(tuned_in), scene.name), folder(Project(project), scene.name), dirs_exist_ok=True
                )
            for stage in stages:
                ClipStages(project, scene.name).run(stage)
            write_json(done, {"identity": identity, "reconstruction": _reconstruction(project, scene)})
        scores = read_scores(Project(project).scores(scene.name))
        scores[RECONSTRUCTION] = read_json(done)["reconstruction"]
        categories = {edit: scene.truth.category(edit) for edit in scene.truth.edits}
        return [
            EditResult(scene.name, edit, categories.get(edit, RECONSTRUCTION), seed, values)
            for edit, values in scores.items()
        ]


def edits_only(results: Iterable[EditResult]) -> list[EditResult]:
    """Return the results without those of reconstructions."""
    return [result for result in results if result.edit != RECONSTRUCTION]


def by_scene(results: Iterable[EditResult], metric: str) -> dict[str, list[float]]:
    """Return the values of a metric by scene, as `benchmarks.statistics` takes them."""
    groups: dict[str, list[float]] = {}
    for result in results:
        groups.setdefault(result.scene, []).append(result.scores[metric])
    return groups


def _reconstruction(project: Path, scene: BenchmarkScene) -> dict[str, float]:
    """Return the scores of a scene's reconstruction against the source."""
    from dataclasses import asdict

    from tav.config import load_params
    from tav.config.paths import Project
    from tav.media.scene_truth import load_clip_truth
    from tav_model.metrics.clip import ClipScorer
    from tav_model.video import read_video
    from toyworld import WEIGHTS
    from toyworld.judge import Judge

    truth, indexes = load_clip_truth(project, scene.name, load_params(project / "params.yaml"))
    if truth is None:
        raise TavError(f"{project}: no scene file of {scene.name}")
    frames, _ = read_video(Project(project).edits(scene.name) / f"{RECONSTRUCTION}.mp4")
    judge = Judge(ClipScorer(WEIGHTS / "scorer"))
    return asdict(judge.verdict(frames, truth.scene, truth.scene, truth.times(indexes)))


def _write_params(project: Path, scenes: Iterable[BenchmarkScene], changes: Mapping[str, Any], number: int) -> int:
    """Write the project's params.yaml, changed, with these scenes as its clips, and return its seed."""
    from tav.config.overrides import apply_overrides
    from tav.config.yaml_text import dump_with_comments, parse_with_comments, read_yaml_text
    from toyworld.captions import caption

    params = parse_with_comments(read_yaml_text(ROOT / "params.yaml"))
    params |= {"base_model": "toyworld", "clips": {}}
    for scene in scenes:
        params["clips"][scene.name] = {
            "video": f"data/{scene.name}.mp4",
            "caption": caption(scene.truth.scene),
            "prompts": f"data/{scene.name}.csv",
        }
    apply_overrides("params.yaml", params, changes)
    params["seed"] += number
    project.mkdir(parents=True, exist_ok=True)
    write_text(project / "params.yaml", dump_with_comments(params))
    return int(params["seed"])


def _write_clip(project: Path, scene: BenchmarkScene) -> None:
    """Write the clip of a scene into a project, with one more row: its reconstruction."""
    from toyworld.captions import caption
    from toyworld.clips import write_rendered

    _, prompts, _ = write_rendered(project / "data", scene.name, scene.truth)
    rows = [(caption(edited), edit, scene.truth.category(edit), "", "") for edit, edited in scene.truth.edits.items()]
    # With its words unchanged and nothing to keep, so that all of it comes from inversion and sampling.
    rows.append((caption(scene.truth.scene), RECONSTRUCTION, "", "1.0", "tune-a-video"))
    with prompts.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "name", "category", "guidance_scale", "preset"))
        writer.writerows(rows)
