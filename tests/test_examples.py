"""The examples of the README and the documentation: their prompts are of the base model's world, and come out right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from tasks.clip_stages import ClipStages
from tasks.quick_edits import quick_edits
from tav.config.metrics import shortcomings
from tav.config.prompts import make_rows
from tav.reports.scores import read_quick_scores
from tav_cli.main import app
from tav_model.metrics.clip import ClipScorer
from tav_model.video import read_video
from tav_model.vocabulary import Vocabulary, read_vocabulary
from tests.support.docs_pages import ROOT, blocks, pages, simple_commands
from tests.support.projects import change_params, fresh_clone
from toyworld import WEIGHTS
from toyworld.clips import CLIPS
from toyworld.judge import Judge
from toyworld.scenes import load_truth
from toyworld.silhouette import silhouette
from toyworld.truth import look, track_error

TUTORIAL = "my-clip"
# An object that is drawn elsewhere, or not at all, is much further away than this share of the picture's width.
FAR = 0.2
# The scorer takes the stripes of a blue ball for those of a fish. The silhouette tells the two apart.
JUDGED_BY_SILHOUETTE = {"a blue ball is bouncing on the grass": "fish"}
# It takes a night without stars for pixel art. The colours of the landscape tell the styles apart.
JUDGED_BY_COLOURS = {"a red boat is swinging on the sea at night": "pixel art"}


def commands(name: str) -> Iterator[dict[str, Any]]:
    """The parameters of every `tav NAME` in the pages, in a block or a line, that does not need Stable Diffusion."""
    command = typer.main.get_command(app).commands[name]
    for page in pages():
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page) if block.needs != "gpu" for line in block.commands]
        for line in [*lines, *re.findall(r"(?<!`)`(tav [^`\n]+)`(?!`)", text)]:
            for program, *words in simple_commands(line):
                if program == "tav" and words[0] == name:
                    yield command.make_context(name, words[1:], resilient_parsing=True).params


def examples() -> dict[str, list[str]]:
    """The captions and prompts of the examples, by clip; those of Python and CSV blocks are of the clip `ball`."""
    found: dict[str, list[str]] = {clip: [] for clip in (*CLIPS, TUTORIAL)}
    for options in commands("add"):
        if options["video"] and options["video"].stem == TUTORIAL:
            found[TUTORIAL] += [options["caption"], *options["edit"]]
    for options in commands("edit"):
        if options["clip"] in found:
            found[options["clip"]] += options["prompts"]
    for page in pages():
        for block in blocks(page):
            if block.kind == "python":
                texts = [node.value for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Constant)]
                found["ball"] += [text for text in texts if isinstance(text, str) and re.match("an? .* is ", text)]
            if block.kind == "csv":
                found["ball"] += [line.split(",")[0] for line in block.text.splitlines()[1:]]
    return {clip: list(dict.fromkeys(prompts)) for clip, prompts in found.items() if prompts}


def vocabulary() -> Vocabulary:
    vocabulary = read_vocabulary(str(WEIGHTS))
    assert vocabulary is not None
    return vocabulary


def test_the_examples_are_found() -> None:
    found = examples()
    assert set(found) == {"ball", TUTORIAL}
    readme = re.findall(r'^tav edit ball "([^"]+)"', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert readme and set(readme) <= set(found["ball"])
    assert "a red ball is bouncing on the grass" in found["ball"]  # the caption, in Python
    assert "a red boat is swinging on the sea at sunset" in found[TUTORIAL]
    assert all(prompt.startswith(("a ", "an ")) for prompts in found.values() for prompt in prompts), found


def test_the_words_of_the_examples_are_known() -> None:
    assert vocabulary().problems([prompt for prompts in examples().values() for prompt in prompts]) == ""


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("clip", ["ball", TUTORIAL])
def test_the_examples_come_out_right(clip: str, tmp_path: Path) -> None:
    """Tune with the parameters that the project ships, render, and judge every frame; by the truth where it is known."""
    project = fresh_clone(tmp_path / "project")
    entry = {"video": f"data/{clip}.mp4", "caption": examples()[clip][0], "prompts": "data/ball.csv", "decode": {}}
    change_params(project, {"tracking": {"uri": None}, "runtime": {"device": "cpu"}})
    if clip == TUTORIAL:
        (project / f"data/{clip}.mp4").write_bytes((ROOT / f"docs/tutorial/{clip}.mp4").read_bytes())
        change_params(project, {}, {clip: entry})
    stages = ClipStages(project, clip)
    for stage in ("decode", "encode", "annotate", "tune", "invert"):
        stages.run(stage)

    judge = Judge(ClipScorer(str(WEIGHTS / "scorer"), "cpu"))
    scene_file = project / f"data/scenes/{clip}.json"
    truth = load_truth(scene_file) if scene_file.exists() else None
    wrong = []
    scales = {prompt: options["guidance_scale"] for options in commands("edit") for prompt in options["prompts"] or ()}
    rows = [
        row
        for prompt in examples()[clip]
        for row in make_rows([prompt], "the documentation", guidance_scale=scales.get(prompt))
    ]
    for edit in quick_edits(stages, rows):
        assert edit.video is not None, edit.error
        frames, _ = read_video(edit.video)
        asked = attributes_of(edit.prompt)
        named = judge.named(frames)
        for attribute, value in asked.items():
            mistakes = {"object": JUDGED_BY_SILHOUETTE, "style": JUDGED_BY_COLOURS}.get(attribute, {})
            if not set(named[attribute]) <= {value, mistakes.get(edit.prompt)}:
                wrong.append(f"{edit.prompt}: {attribute}: {named[attribute]}")
        if edit.prompt in JUDGED_BY_COLOURS:
            styles = [look(frame).style for frame in frames]
            if set(styles) != {asked["style"]}:
                wrong.append(f"{edit.prompt}: style, by its colours: {styles}")
        if truth is not None:
            times = np.linspace(0, 1, len(frames))
            scene = truth.scene.edited(**asked)
            if edit.prompt in JUDGED_BY_SILHOUETTE:
                mistaken = scene.edited(object=JUDGED_BY_SILHOUETTE[edit.prompt])
                shapes = [np.mean([silhouette(frame, one) for frame in frames]) for one in (scene, mistaken)]
                if shapes[0] <= shapes[1]:
                    wrong.append(f"{edit.prompt}: silhouette: {shapes}")
            errors = [track_error(look(frame).region, scene, time) for frame, time in zip(frames, times, strict=True)]
            if max(errors) > FAR:
                wrong.append(f"{edit.prompt}: distance from the true position: {np.round(errors, 2)}")
    for video in sorted(stages.project.quick(clip).glob("*.mp4")):
        scores = read_quick_scores(video.parent, video)
        assert scores is not None, video
        wrong += [f"{video.stem}: {found}" for found in shortcomings(scores.scores, scores.source)]
    assert not wrong, "\n".join(wrong)


def attributes_of(prompt: str) -> dict[str, str]:
    """The attributes of a single picture that a prompt asks for."""
    meanings = vocabulary().meanings
    named = dict(meanings[word] for word in prompt.replace(",", "").split() if word in meanings)
    return {"sky": "day", "style": "plain"} | {name: value for name, value in named.items() if name != "motion"}


def test_attributes_of_a_prompt() -> None:
    assert attributes_of("a cartoon of a red ball bouncing on the grass at night") == {
        "object": "ball",
        "colour": "red",
        "ground": "grass",
        "sky": "night",
        "style": "cartoon",
    }
    assert attributes_of("a red ball is rolling in a meadow")["sky"] == "day"
