"""Captions of a scene in several wordings, complete or partial, and the vocabulary they use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from toyworld.scenes import ATTRIBUTES, CATEGORIES, COLOURS, GROUNDS, OBJECTS, Scene

MOVING = {
    "bouncing": ("bouncing", "hopping"),
    "rolling": ("rolling", "rolling along"),
    "rising": ("rising", "rising up"),
    "swinging": ("swinging", "swinging to and fro"),
    "zigzagging": ("zigzagging", "moving in zigzag"),
    "growing": ("growing", "getting bigger"),
}
GROUND = {
    "grass": ("on the grass", "in a meadow", "on the lawn"),
    "sand": ("on the sand", "on a sandy beach", "in the desert"),
    "snow": ("on the snow", "in a snowy field", "over the snow"),
    "road": ("on the road", "on a street", "along the road"),
    "sea": ("on the sea", "over the water", "on the waves"),
}
# By default, a caption does not mention daylight or the plain style: the first wording is empty.
SKY = {
    "day": ("", "by day", "on a sunny day"),
    "sunset": ("at sunset", "in the evening", "as the sun goes down"),
    "night": ("at night", "in the dark", "in the moonlight"),
}
STYLE = {
    "plain": ("", "a picture of"),
    "cartoon": ("a cartoon of", "a comic drawing of"),
    "pixel art": ("pixel art of", "a pixelated picture of"),
}
STYLE_LAST = {"cartoon": ("cartoon style", "as a cartoon"), "pixel art": ("pixel art", "pixel art style")}
# Words that only connect others, even if they occur in the wording of a single value.
CONNECTING = {"a", "along", "an", "and", "as", "at", "by", "in", "is", "of", "on", "over", "something", "the", "to"}
DOCUMENTATION = "docs/reference/toyworld.md"


def caption(scene: Scene) -> str:
    """Return the default caption, such as "a cartoon of a blue fish rolling on the sea at night"."""
    style, sky = STYLE[scene.style][0], SKY[scene.sky][0]
    verb = scene.motion if style else f"is {scene.motion}"
    words = (style, f"{_article(scene.colour)} {scene.colour} {scene.object}", verb, GROUND[scene.ground][0], sky)
    return " ".join(word for word in words if word)


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of several thousand wordings of a caption; one in five leaves out the motion."""

    def one_of(wordings: tuple[str, ...]) -> str:
        return wordings[rng.integers(len(wordings))]

    before = after = ""
    if scene.style == "plain" or rng.random() < 0.6:
        before = one_of(STYLE[scene.style])
    else:
        after = ", " + one_of(STYLE_LAST[scene.style])
    thing = f"{_article(scene.colour)} {scene.colour} {scene.object}"
    moving = one_of(MOVING[scene.motion])
    moves = rng.random()
    if moves < 0.2:
        moving = ""
    elif moves < 0.75 and not before:
        moving = f"is {moving}"
    sky = one_of(SKY[scene.sky])
    words = [before, thing, moving, one_of(GROUND[scene.ground]), sky]
    if sky and not before and rng.random() < 0.2:
        words = [f"{sky},", *words[:-1]]
    return " ".join(word for word in words if word) + after


def phrase(attribute: str, value: str) -> str:
    """Return a phrase for one attribute alone: "a ball", "something red", "on the grass", "at night"."""
    if attribute == "object":
        return f"{_article(value)} {value}"
    if attribute == "colour":
        return f"something {value}"
    if attribute == "ground":
        return GROUND[value][0]
    if attribute == "sky":
        return SKY[value][1 if value == "day" else 0]
    return f"a {value} picture"


def partial_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Return a caption that mentions some of the attributes, and the values that it mentions, by attribute."""
    if rng.random() < 0.5:
        name = tuple(ATTRIBUTES)[rng.integers(len(ATTRIBUTES))]
        return phrase(name, getattr(scene, name)), {name: getattr(scene, name)}
    mentioned = {"object": scene.object}
    words = [scene.object]
    if rng.random() < 0.6:
        mentioned["colour"] = scene.colour
        words.insert(0, scene.colour)
    words.insert(0, _article(words[0]))
    if rng.random() < 0.5:
        mentioned["ground"] = scene.ground
        words.append(GROUND[scene.ground][0])
    if rng.random() < 0.5:
        mentioned["sky"] = scene.sky
        words.append(phrase("sky", scene.sky))
    return " ".join(words), mentioned


def described(scene: Scene) -> dict[str, str]:
    """Return the values that a complete caption mentions about a single picture, by attribute."""
    return {name: getattr(scene, name) for name in ATTRIBUTES}


def wordings() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the wordings of each value, by attribute; those of the motion too, which a single picture does not show."""
    style = {name: (*STYLE[name], *STYLE_LAST.get(name, ())) for name in STYLE}
    tables: dict[str, Mapping[str, tuple[str, ...]]] = {
        "object": {name: (name,) for name in OBJECTS},
        "colour": {name: (name,) for name in COLOURS},
        "motion": MOVING,
        "ground": GROUND,
        "sky": SKY,
        "style": style,
    }
    return {
        attribute: {name: tuple(filter(None, table[name])) for name in table} for attribute, table in tables.items()
    }


def vocabulary() -> set[str]:
    """Return every word that a caption may contain."""
    texts = [
        "a an is something",
        *(wording for table in wordings().values() for some in table.values() for wording in some),
    ]
    texts += [phrase(name, value) for name, values in ATTRIBUTES.items() for value in values]
    return {word for text in texts for word in text.replace(",", "").split()}


def meanings() -> dict[str, dict[str, list[str]]]:
    """Return the words that mean one value and nothing else, by attribute and value, such as "meadow" for grass."""
    found: dict[str, set[tuple[str, str]]] = {}
    for attribute, table in wordings().items():
        for value, some in table.items():
            for word in " ".join((*some, value)).split():
                found.setdefault(word, set()).add((attribute, value))
    return {
        attribute: {
            value: [word for word in sorted(found) if found[word] == {(attribute, value)} and word not in CONNECTING]
            for value in table
        }
        for attribute, table in wordings().items()
    }


def vocabulary_record() -> dict[str, Any]:
    """Return the content of the base model's `vocabulary.json`, as `tav_model.vocabulary` reads it."""
    attributes = meanings()
    meaning = {word for values in attributes.values() for words in values.values() for word in words}
    return {
        "summary": f"a {_either(OBJECTS)} on {_either(GROUNDS)}",
        "documentation": DOCUMENTATION,
        "attributes": attributes,
        "categories": {name: CATEGORIES[frozenset({name})] for name in ATTRIBUTES},
        "other_words": sorted(vocabulary() - meaning),
    }


def _either(values: tuple[str, ...]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
