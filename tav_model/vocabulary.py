"""The vocabulary of a base model that knows only certain words, and what it does not know of a prompt.

Stable Diffusion's tokenizer was trained on the text of the web, so nothing can be said about its limits. A base model
with a closed vocabulary declares it in `vocabulary.json`, next to its parts:

    {
      "summary": what the model shows, in a few words,
      "documentation": where all words are listed: a path in the project, or an address,
      "attributes": {ATTRIBUTE: {VALUE: [words that mean this value and nothing else]}},
      "categories": {ATTRIBUTE: the category of an edit that changes it alone},
      "other_words": [the other words that it knows]
    }

An attribute, such as the colour, has one value in a video, so a prompt that names two values cannot come out right. Categories
are optional.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tav_model.errors import TavError
from tav_model.files import read_json

FILE = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """The words of a base model.

    Attributes:
        summary: what the model shows, in a few words.
        documentation: where all words are listed.
        meanings: what a word means, as (attribute, value), for the words that mean one value.
        words: all words.
        categories: of edits, by the attribute that they change.
    """

    summary: str
    documentation: str
    meanings: dict[str, tuple[str, str]]
    words: frozenset[str]
    categories: dict[str, str] = field(default_factory=dict)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a prompt that the model does not know, each once, in order."""
        return [word for word in prompt_words(text) if word not in self.words]

    def category(self, caption: str, prompt: str) -> str | None:
        """Return the category of an edit: that of the attributes whose words differ between the caption and the prompt.

        None where no attribute differs that has a category; "multiple" where several differ whose categories are not the same.
        """
        before, after = (
            dict(self.meanings[word] for word in prompt_words(text) if word in self.meanings)
            for text in (caption, prompt)
        )
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        categories = {self.categories[name] for name in changed if name in self.categories}
        return "multiple" if len(categories) > 1 else next(iter(categories), None)

    def conflicts(self, text: str) -> dict[str, list[str]]:
        """Return the attributes for which a prompt names more than one value, with these values in order."""
        named: dict[str, list[str]] = {}
        for word in prompt_words(text):
            if word in self.meanings:
                attribute, value = self.meanings[word]
                values = named.setdefault(attribute, [])
                if value not in values:
                    values.append(value)
        return {attribute: values for attribute, values in named.items() if len(values) > 1}

    def problems(self, texts: Iterable[str]) -> str:
        """Describe what the model does not know of some prompts, as a clause; empty if it knows everything."""
        texts = list(texts)
        unknown = list(dict.fromkeys(word for text in texts for word in self.unknown_words(text)))
        quoted = [f'"{word}"' for word in unknown]
        clauses = [f"does not know {_listed(quoted, 'or')}"] if quoted else []
        conflicts = [conflict for text in texts for conflict in self.conflicts(text).items()]
        clauses += dict.fromkeys(f"shows only one {name}, not {_listed(values, 'and')}" for name, values in conflicts)
        return "; ".join(clauses)


def read_vocabulary(base: str) -> Vocabulary | None:
    """Return the vocabulary of a base model; None if it does not declare one, as Stable Diffusion does not.

    Args:
        base: the base model's folder or hub id.

    Raises:
        TavError: the file is damaged.
    """
    path = Path(base) / FILE
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        meanings = {
            word.lower(): (attribute, value)
            for attribute, values in record["attributes"].items()
            for value, words in values.items()
            for word in words
        }
        others = {word.lower() for word in record["other_words"]}
        categories = {str(name): str(category) for name, category in record.get("categories", {}).items()}
        words = frozenset(others | {*meanings})
        return Vocabulary(str(record["summary"]), str(record["documentation"]), meanings, words, categories)
    except (KeyError, TypeError, AttributeError) as error:
        raise TavError(f"{path}: not a vocabulary ({type(error).__name__}: {error})") from None


def prompt_words(text: str) -> list[str]:
    """Return the words of a prompt in lower case, as CLIP's tokenizer separates them; punctuation is left out."""
    return list(dict.fromkeys(re.findall(r"[^\W\d_]+|\d+", text.lower())))


def _listed(words: list[str], conjunction: str) -> str:
    return f" {conjunction} ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
