"""Words of a prompt and their tokens, and how the words of one prompt correspond to those of another.

The tokens' places in the text come from the tokenizer, so words of any number of tokens and prompts of any length serve.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tav_model.text import expand_tokens

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_WORD = re.compile(r"[^\s,.;:!?\"()]+")
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Attributes:
        text: as it is written, in lower case.
        tokens: positions of its tokens in the sequence; none where the prompt was cut off before it.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder sees it.

    Attributes:
        text: the prompt.
        ids: the tokens, from the start to the end token, without padding.
        words: its words in order.
        length: tokens of the padded sequence.
    """

    text: str
    ids: tuple[int, ...]
    words: tuple[Word, ...]
    length: int

    def tokens_of(self, phrase: str) -> list[int]:
        """Return the tokens of every occurrence of a word, or of several words in a row.

        Raises:
            ValueError: the prompt does not have it.
        """
        wanted = [match.group().lower() for match in _WORD.finditer(phrase)]
        texts = [word.text for word in self.words]
        tokens = [
            token
            for start in range(len(texts) - len(wanted) + 1)
            if wanted and texts[start : start + len(wanted)] == wanted
            for word in self.words[start : start + len(wanted)]
            for token in word.tokens
        ]
        if not tokens:
            raise ValueError(f"the prompt {self.text!r} has no word {phrase!r}")
        return tokens


def tokenize(tokenizer: CLIPTokenizer, prompt: str, length: int) -> TokenizedPrompt:
    """Split a prompt into words and tokens, cut off at `length` tokens."""
    prompt = expand_tokens(tokenizer, prompt)
    encoded = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
    words = []
    for match in _WORD.finditer(prompt):
        tokens = tuple(
            i
            for i, (start, stop) in enumerate(encoded.offset_mapping)
            if start < stop and start < match.end() and stop > match.start()
        )
        words.append(Word(match.group().lower(), tokens))
    return TokenizedPrompt(prompt, tuple(encoded.input_ids), tuple(words), length)


def changed_words(source: TokenizedPrompt, target: TokenizedPrompt) -> tuple[list[int], list[int]]:
    """Return the tokens of the words that only `source` has, and of those that only `target` has.

    Words are compared in order. Articles count only where nothing else differs.
    """
    texts, target_texts = ([word.text for word in prompt.words] for prompt in (source, target))
    before: list[Word] = []
    after: list[Word] = []
    for tag, i, i_stop, j, j_stop in difflib.SequenceMatcher(None, texts, target_texts, autojunk=False).get_opcodes():
        if tag != "equal":
            before += source.words[i:i_stop]
            after += target.words[j:j_stop]
    if any(word.text not in _ARTICLES for word in before + after):
        before, after = ([word for word in words if word.text not in _ARTICLES] for words in (before, after))
    return [token for word in before for token in word.tokens], [token for word in after for token in word.tokens]


def replacement_matrix(source: TokenizedPrompt, target: TokenizedPrompt) -> torch.Tensor:
    """Return how attention to the source's tokens becomes attention to the target's, `n n`, for `A_source @ matrix`.

    The k-th word corresponds to the k-th word (Prompt-to-Prompt, arXiv 2208.01626, "word swap"). A word with another
    number of tokens shares its attention equally among the tokens of its replacement.

    Raises:
        ValueError: numbers of words that differ.
    """
    if len(source.words) != len(target.words):
        raise ValueError(
            f"edit_type: replace needs as many words in both prompts; {source.text!r} has {len(source.words)}, "
            f"{target.text!r} has {len(target.words)}: use refine"
        )
    n = source.length
    blocks = {
        before.tokens[0]: (before.tokens, after.tokens)
        for before, after in zip(source.words, target.words, strict=True)
        if before.text != after.text and before.tokens and after.tokens
    }
    matrix = torch.zeros(n, n)
    i = j = 0
    while i < n:
        if i in blocks:
            before, after = blocks[i]
            if len(before) == len(after):
                matrix[list(before), list(after)] = 1
            else:
                matrix[torch.tensor(before)[:, None], torch.tensor(after)] = 1 / len(after)
            i, j = before[-1] + 1, after[-1] + 1
        else:
            # Past the end, the padding of the longer prompt counts for the last token, so that no attention is lost.
            matrix[i, min(j, n - 1)] = 1
            i, j = i + 1, j + 1
    return matrix


def refinement_matrix(source: TokenizedPrompt, target: TokenizedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as `replacement_matrix`, and which of the target's tokens have a counterpart, `n` of 0 and 1.

    Tokens are aligned by Needleman and Wunsch with gap 0, match 1 and mismatch -1 (Prompt-to-Prompt, "prompt refinement").
    Tokens without a counterpart keep their own attention. Padding corresponds to padding.
    """
    n = source.length
    matrix, aligned = torch.zeros(n, n), torch.ones(n)
    aligned[: len(target.ids)] = 0
    for i, j in _alignment(source.ids, target.ids):
        matrix[i, j] = 1
        aligned[j] = 1
    for j in range(len(target.ids), n):
        matrix[j, j] = 1
    return matrix, aligned


def _alignment(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of equal tokens in an optimal global alignment.

    A mismatch costs more than two gaps, so an optimal alignment has none and is a longest common subsequence.
    """
    rows, columns = len(source), len(target)
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + (1 if source[i] == target[j] else -1))
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if source[i] == target[j] and best[i][j] == best[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def token_weights(prompt: TokenizedPrompt, values: Mapping[str, float], default: float = 1.0) -> torch.Tensor:
    """Return a number for each token, `n`: that of its word in `values`, otherwise the default.

    Raises:
        ValueError: a word that the prompt does not have.
    """
    weights = torch.full((prompt.length,), float(default))
    for word, value in values.items():
        weights[prompt.tokens_of(word)] = float(value)
    return weights
