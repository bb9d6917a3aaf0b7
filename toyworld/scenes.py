"""Define scenes of the world: attributes, motions, edits, and scene files.

Positions and lengths are shares of the picture's side, with the origin in the upper left corner. Time runs from 0 to 1
over a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tav_model.errors import TavError
from tav_model.files import read_json, write_json

OBJECTS = ("ball", "cube", "star", "car", "boat", "rocket", "tree", "fish")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
GROUNDS = ("grass", "sand", "snow", "road", "sea")
SKIES = ("day", "sunset", "night")
STYLES = ("plain", "cartoon", "pixel art")
MOTIONS = ("bouncing", "rolling", "rising", "swinging", "zigzagging", "growing")
# What distinguishes an object from others of its kind and colour. No caption names it, and no edit changes it.
PATTERNS = ("none", "stripes", "checks", "dots", "halves", "rings")
ACCENTS = ("white", "black", "pale", "deep")
# The attributes that a single frame shows and captions name, and their values.
ATTRIBUTES = {"object": OBJECTS, "colour": COLOURS, "ground": GROUNDS, "sky": SKIES, "style": STYLES}

# Categories of edits, by the attributes that they change; all others are "multiple".
CATEGORIES = {
    frozenset({"object"}): "object",
    frozenset({"colour"}): "colour",
    frozenset({"ground"}): "background",
    frozenset({"sky"}): "background",
    frozenset({"ground", "sky"}): "background",
    frozenset({"style"}): "style",
}
# Numbers of a scene, and the lowest and highest value of each.
RANGES = {
    "radius": (0.1, 0.25),
    "start": (0, 1),
    "end": (0, 1),
    "view": (0, 1),
    "phase": (0, 1),
    "slant": (0, 1),
    "pan": (-1, 1),
    "passes": (1, 1000),
}

HORIZON = 0.62
# Where objects touch the ground.
GROUND_LINE = 0.87


@dataclass(frozen=True)
class Pose:
    """The pose of an object at one time.

    Attributes:
        x: horizontal position of its centre.
        y: vertical position of its centre.
        radius: its radius.
        rotation: its rotation in radians, clockwise.
    """

    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True)
class Scene:
    """A clip of the world: what it shows and how the object moves. It determines every picture of the clip.

    Attributes:
        object: one of `OBJECTS`.
        colour: colour of the object, one of `COLOURS`.
        ground: one of `GROUNDS`.
        sky: one of `SKIES`.
        style: one of `STYLES`.
        motion: one of `MOTIONS`.
        radius: radius of the object, 0.1 to 0.25.
        start: x of the object at time 0, from 0 to 1.
        end: x of the object at time 1, from 0 to 1. An object that does not travel is in the middle between the two.
        view: position of the visible part of the landscape at time 0, from 0 to 1.
        pattern: pattern on the object's painted parts, one of `PATTERNS`.
        accent: second colour of the pattern, one of `ACCENTS`: white, black, or a shade of the object's colour.
        phase: shift of the pattern, 0 to 1 of its period.
        slant: direction of the pattern, 0 to 1 of half a turn.
        pan: distance by which the camera moves along the landscape from time 0 to time 1, -1 to 1 picture widths; to
            the right if positive. The object's path is relative to the picture.
        passes: number of times that the object travels its path within the clip, 1 to 1000: there, back, there again, and
            so on, so that long clips show more than one slow pass.

    Raises:
        TavError: a value that is not one of these.
    """

    object: str = "ball"
    colour: str = "red"
    ground: str = "grass"
    sky: str = "day"
    style: str = "plain"
    motion: str = "bouncing"
    radius: float = 0.17
    start: float = 0.22
    end: float = 0.78
    view: float = 0.0
    pattern: str = "none"
    accent: str = "white"
    phase: float = 0.0
    slant: float = 0.0
    pan: float = 0.0
    passes: float = 1.0

    def __post_init__(self) -> None:
        choices = ATTRIBUTES | {"motion": MOTIONS, "pattern": PATTERNS, "accent": ACCENTS}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise TavError(f"scene: {name} {value!r} must be one of {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise TavError(f"scene: {name} {value!r} must be a number from {low} to {high}")

    def pose(self, time: float) -> Pose:
        """Return the pose of the object at a time from 0 to 1."""
        done = self.passes * time % 2
        return _PATHS[self.motion](self, done if done <= 1 else 2 - done)

    def edited(self, **changes: Any) -> Scene:
        """Return the scene with other attributes, the ground truth of an edit.

        Motion, camera, and the pattern with its accent are unchanged.

        Args:
            **changes: new values, by attribute.

        Raises:
            TavError: an unknown attribute, or a value that it does not have.
        """
        unknown = sorted(set(changes) - set(ATTRIBUTES))
        if unknown:
            raise TavError(f"edit: {unknown[0]!r} must be one of {', '.join(ATTRIBUTES)}")
        return replace(self, **changes)


def _bouncing(scene: Scene, time: float) -> Pose:
    phase = 2 * time % 1
    height = 4 * phase * (1 - phase)
    y = GROUND_LINE - scene.radius - 0.42 * height
    return Pose(_between(scene.start, scene.end, time), y, scene.radius, 0.0)


def _rolling(scene: Scene, time: float) -> Pose:
    x = _between(scene.start, scene.end, time)
    return Pose(x, GROUND_LINE - scene.radius, scene.radius, (x - scene.start) / scene.radius)


def _rising(scene: Scene, time: float) -> Pose:
    x = (scene.start + scene.end) / 2 + 0.06 * math.sin(2 * math.pi * time)
    low, high = GROUND_LINE - scene.radius, scene.radius + 0.04
    return Pose(x, _between(low, high, time * time * (3 - 2 * time)), scene.radius, 0.0)


def _swinging(scene: Scene, time: float) -> Pose:
    # A pendulum that hangs from a point above the picture.
    length, middle = 0.85, (scene.start + scene.end) / 2
    reach = (scene.end - scene.start) / 2 / length
    angle = math.asin(max(-1.0, min(1.0, reach))) * -math.cos(2 * math.pi * time)
    return Pose(middle + length * math.sin(angle), length * math.cos(angle) - 0.27, scene.radius, -angle)


def _zigzagging(scene: Scene, time: float) -> Pose:
    wave = abs(4 * (1.5 * time % 1) - 2) - 1  # From 1 to -1 and back.
    return Pose(_between(scene.start, scene.end, time), 0.47 + 0.2 * wave, scene.radius, 0.25 * wave)


def _growing(scene: Scene, time: float) -> Pose:
    radius = scene.radius * _between(0.65, 1.35, time)
    return Pose((scene.start + scene.end) / 2, GROUND_LINE - radius, radius, 0.0)


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


_PATHS = dict(zip(MOTIONS, (_bouncing, _rolling, _rising, _swinging, _zigzagging, _growing), strict=True))


@dataclass(frozen=True)
class Truth:
    """The content of a scene file: a rendered clip, and the ground truth of its edits.

    Attributes:
        scene: scene of the clip.
        frames: number of frames of the complete clip, evenly spaced from time 0 to 1.
        edits: the scene of each edit's ground truth, by the edit's name.
    """

    scene: Scene
    frames: int
    edits: dict[str, Scene]

    def changes(self, edit: str) -> dict[str, str]:
        """Return the new value of each attribute that an edit changes."""
        edited = self.edits[edit]
        return {
            name: getattr(edited, name) for name in ATTRIBUTES if getattr(edited, name) != getattr(self.scene, name)
        }

    def category(self, edit: str) -> str:
        """Return the category of an edit as in prompt CSVs: colour, object, background, style or multiple."""
        return CATEGORIES.get(frozenset(self.changes(edit)), "multiple")

    def times(self, indexes: Sequence[int]) -> list[float]:
        """Return the times, 0 to 1, of the clip's frames with these indexes."""
        return [index / max(self.frames - 1, 1) for index in indexes]


def save_truth(path: Path, scene: Scene, frames: int, edits: dict[str, dict[str, str]]) -> None:
    """Write a scene file: the scene, the number of frames, and the changes of each edit by name."""
    record = asdict(scene)
    if record["passes"] == 1:
        del record["passes"]  # The files of earlier versions, which had none, are the same.
    write_json(path, {"scene": record, "frames": frames, "edits": edits})


def load_truth(path: Path) -> Truth:
    """Return the content of a scene file.

    Raises:
        TavError: missing, not a scene file, or values that are not allowed.
    """
    shape = '{"scene": {...}, "frames": NUMBER, "edits": {NAME: {...}}}'
    try:
        record: Any = read_json(path)
        known = {field.name for field in fields(Scene)}
        unknown = sorted(set(record["scene"]) - known)
        if unknown:
            raise TavError(f"scene: {unknown[0]!r} must be one of {', '.join(sorted(known))}")
        scene, frames = Scene(**record["scene"]), record["frames"]
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise TavError(f"frames {frames!r} must be a whole number of at least 1")
        edits = {name: scene.edited(**changes) for name, changes in record["edits"].items()}
        for name, edited in edits.items():
            if edited == scene:
                raise TavError(f"edit {name!r} changes nothing")
        return Truth(scene, frames, edits)
    except TavError as error:
        text = str(error)
        raise TavError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TavError(f"{path}: not a scene file; must be {shape}") from error
