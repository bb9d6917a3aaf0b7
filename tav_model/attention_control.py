"""What an edit's network takes over from the source branch: attention, features, and attention to words.

The source branch is one more row of the batch, the first: `[source, negative * b, prompt * b]`. Its latents are those of the
inversion's trajectory. What is taken over is computed in the same pass, so no attention map is kept, except for sums of the
columns of single words, from which masks are made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import ceil, log
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from tav_model.compiling import uncompiled
from tav_model.networks.dot_product_attention import attend
from tav_model.words import (
    TokenizedPrompt,
    changed_words,
    refinement_matrix,
    replacement_matrix,
    token_weights,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from tav_model.networks.attention import Attention
    from tav_model.networks.transformer import BasicTransformerBlock
    from tav_model.networks.unet import UNet3DConditionModel
    from tav_model.windows import Window

EDIT_TYPES = ("replace", "refine", "auto")
LAYERS = ("upper", "all")
MASK_TOKENS = 16 * 16
"""Masks are made from the attention maps whose number of positions is the closest to this one."""
MAP_ELEMENTS = 2**26
"""Attention maps are computed in pieces of at most so many numbers (256 MiB)."""
DEFAULT_WORD = "default_"


@dataclass(frozen=True)
class AttentionControlOptions:
    """The items of `cross_attention_kwargs`, named as in diffusers' community pipeline `pipeline_prompt2prompt`.

    Shares of steps are from 0 to 1 and count from the first step.

    Attributes:
        edit_type: "replace": attention to each word is that of the source to the word in its place; "refine": words that
            both prompts have keep the source's attention, others have their own; "auto": the former for prompts with as many
            words as the source's, else the latter. None: neither.
        n_cross_replace: share of the steps with `edit_type`; or a share for each word, `default_` for the others.
        n_self_replace: share of the steps in which spatio-temporal and temporal attention have the source's queries and keys
            (Plug-and-Play, arXiv 2211.12572; FateZero, arXiv 2303.09535; TokenFlow, arXiv 2307.10373).
        self_replace_layers: "upper": only in the upper part of the network, as Plug-and-Play; "all", as FateZero.
        n_residual_replace: share of the steps in which the residual branch of `up_blocks[1].resnets[1]` is the source's
            (Plug-and-Play).
        local_blend_words: for the source prompt and for each prompt, the word or words that a mask is made from.
        equalizer_words: words whose attention is multiplied.
        equalizer_strengths: the factor of each.
    """

    edit_type: str | None = None
    n_cross_replace: float | Mapping[str, float] = 0.4
    n_self_replace: float = 0.0
    self_replace_layers: str = "upper"
    n_residual_replace: float = 0.0
    local_blend_words: Sequence[str | Sequence[str]] | None = None
    equalizer_words: Sequence[str] = ()
    equalizer_strengths: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.edit_type not in (None, *EDIT_TYPES):
            raise ValueError(f"edit_type: {self.edit_type!r} must be one of {', '.join(EDIT_TYPES)}")
        if self.self_replace_layers not in LAYERS:
            raise ValueError(f"self_replace_layers: {self.self_replace_layers!r} must be one of {', '.join(LAYERS)}")
        shares = {"n_self_replace": self.n_self_replace, "n_residual_replace": self.n_residual_replace}
        for name, value in (shares | {"n_cross_replace": max(self.word_shares.values())}).items():
            check_share(name, value)
        for value in self.word_shares.values():
            check_share("n_cross_replace", value)
        if len(self.equalizer_words) != len(self.equalizer_strengths):
            raise ValueError(
                f"equalizer_strengths: {len(self.equalizer_strengths)} for {len(self.equalizer_words)} equalizer_words"
            )

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any] | None) -> Self:
        """Return the options in `cross_attention_kwargs`.

        Raises:
            ValueError: unknown names, or values that are not allowed.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(kwargs or {}) - set(known)):
            raise ValueError(f"cross_attention_kwargs: {unknown[0]!r} must be one of {', '.join(known)}")
        return cls(**(kwargs or {}))

    @property
    def word_shares(self) -> Mapping[str, float]:
        """`n_cross_replace` by word, with that of other words as `default_`."""
        if isinstance(self.n_cross_replace, Mapping):
            return {DEFAULT_WORD: 1.0, **self.n_cross_replace}
        return {DEFAULT_WORD: self.n_cross_replace}


def check_share(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: {value!r} must be a number from 0 to 1")


class WordMaps:
    """Sums over steps and layers of the attention to single words, averaged over heads: one map for each frame.

    Args:
        source_tokens: the columns of the source's map, for each prompt.
        tokens: the columns of the prompt's own map, for each prompt.
        size: of the latents, (f, h, w).
    """

    def __init__(
        self, source_tokens: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], size: tuple[int, int, int]
    ) -> None:
        self.source_tokens, self.tokens, self.size = source_tokens, tokens, size
        self._sums: dict[tuple[int, int], torch.Tensor] = {}  # by the size of the maps: 2 b (f n), source and prompts

    def add(
        self,
        source: torch.Tensor,
        edited: torch.Tensor,
        size: tuple[int, int],
        start: int,
        window: Window | None = None,
    ) -> None:
        """Add the maps of one layer, for some of its positions.

        Args:
            source: `1 heads q n`.
            edited: `b heads q n`.
            size: height and width of the layer.
            start: index of the first of the q among the positions of all frames, `(f h w)`.
            window: the frames that the layer sees; None: all. Frames of several windows have larger sums; masks compare the
                positions of one frame only.
        """
        if size not in self._sums:
            positions = self.size[0] * size[0] * size[1]
            self._sums[size] = torch.zeros(2, len(self.tokens), positions, device=edited.device)
        if window is not None:
            positions = size[0] * size[1]
            of_anchor = max(positions - start, 0) if window.anchored else 0
            source, edited = source[:, :, of_anchor:], edited[:, :, of_anchor:]
            start += of_anchor + (window.start - window.anchored) * positions
        stop = start + edited.shape[2]
        for i, (source_tokens, tokens) in enumerate(zip(self.source_tokens, self.tokens, strict=True)):
            self._sums[size][0, i, start:stop] += source[0, :, :, list(source_tokens)].sum(-1).mean(0)
            self._sums[size][1, i, start:stop] += edited[i, :, :, list(tokens)].sum(-1).mean(0)

    @property
    def empty(self) -> bool:
        """Whether nothing was added yet."""
        return not self._sums

    def maps(self) -> torch.Tensor:
        """Return the sums, `2 b f h' w'`: of the source's words, and of the prompts'."""
        ((h, w), sums), *_ = self._sums.items()
        return sums.unflatten(-1, (self.size[0], h, w))


class AttentionControl:
    """Apply `AttentionControlOptions` to a UNet while it samples.

    Args:
        options: what is taken over.
        prompts: the prompts of the batch; needed for words.
        source_prompt: the prompt of the source branch; needed for words.
        tokenizer: of the prompts.
        length: number of tokens of a padded prompt.
        num_steps: number of sampling steps.
        size: of the latents, (f, h, w).
        word_mask: whether `word_maps` is filled.

    Attributes:
        word_maps: the maps of the words that a mask is made from; None without them.

    Raises:
        ValueError: options for words without prompts; words that a prompt does not have; prompts that cannot be compared.
    """

    def __init__(
        self,
        options: AttentionControlOptions,
        prompts: Sequence[str] | None,
        source_prompt: str | None,
        *,
        tokenizer: CLIPTokenizer,
        length: int,
        num_steps: int,
        size: tuple[int, int, int],
        word_mask: bool = False,
    ) -> None:
        self.options, self.num_steps, self.size = options, num_steps, size
        self.word_maps: WordMaps | None = None
        self._matrix = self._aligned = self._shares = self._equalizer = torch.empty(0)
        self._step = self._rows = 0
        self._window: Window | None = None
        word_mask = word_mask or options.local_blend_words is not None
        if not (word_mask or options.edit_type or options.equalizer_words):
            self._num_prompts = 0
            return
        if prompts is None or (source_prompt is None and (word_mask or options.edit_type)):
            raise ValueError("source_prompt and prompt are needed as texts where words are compared")
        self._num_prompts = len(prompts)
        source = tokenize(tokenizer, source_prompt or "", length)
        targets = [tokenize(tokenizer, prompt, length) for prompt in prompts]
        if options.edit_type:
            self._compare(source, targets)
        if options.equalizer_words:
            factors = dict(zip(options.equalizer_words, options.equalizer_strengths, strict=True))
            self._equalizer = torch.stack([token_weights(target, factors) for target in targets])
        if word_mask:
            self.word_maps = self._word_maps(source, targets)

    def _compare(self, source: TokenizedPrompt, targets: Sequence[TokenizedPrompt]) -> None:
        matrices = []
        for target in targets:
            alike = len(source.words) == len(target.words)
            if self.options.edit_type == "replace" or (self.options.edit_type == "auto" and alike):
                matrices.append((replacement_matrix(source, target), torch.ones(target.length)))
            else:
                matrices.append(refinement_matrix(source, target))
        self._matrix, self._aligned = (torch.stack(parts) for parts in zip(*matrices, strict=True))
        shares = dict(self.options.word_shares)
        default = shares.pop(DEFAULT_WORD)
        self._shares = torch.stack([token_weights(target, shares, default) for target in targets])

    def _word_maps(self, source: TokenizedPrompt, targets: Sequence[TokenizedPrompt]) -> WordMaps:
        words = self.options.local_blend_words
        if words is None:
            pairs = [changed_words(source, target) for target in targets]
            for (before, after), target in zip(pairs, targets, strict=True):
                if not before and not after:
                    raise ValueError(f"mask: {target.text!r} has no word that differs from those of the source prompt")
        else:
            if len(words) != 1 + len(targets) or isinstance(words, str):
                raise ValueError(
                    f"local_blend_words: {words!r} must be the words of the source prompt and of each of the "
                    f"{len(targets)} prompts"
                )
            found = [
                [
                    token
                    for phrase in ([entry] if isinstance(entry, str) else entry)
                    for token in prompt.tokens_of(phrase)
                ]
                for entry, prompt in zip(words, [source, *targets], strict=True)
            ]
            pairs = [(found[0], after) for after in found[1:]]
        return WordMaps([before for before, _ in pairs], [after for _, after in pairs], self.size)

    # Steps

    @property
    def uses_source(self) -> bool:
        """Whether the source branch is needed in any step."""
        return any(self.needs_source(step) for step in range(self.num_steps))

    def needs_source(self, step: int) -> bool:
        """Return whether the batch of a step must begin with the source."""
        options = self.options
        shares = [options.n_self_replace, options.n_residual_replace]
        shares += [float(self._shares.max())] if len(self._shares) else []
        return self.word_maps is not None or any(self._active(share, step) for share in shares)

    def begin_step(self, step: int, rows: int, window: Window | None = None) -> None:
        """Announce the next pass of the network: its step, the rows of its batch, and their frames (None: all)."""
        self._step, self._rows, self._window = step, rows, window

    def _active(self, share: float, step: int) -> bool:
        return step < share * self.num_steps

    # The network

    @contextlib.contextmanager
    def attached(self, unet: UNet3DConditionModel) -> Iterator[None]:
        """Control the network until the context ends."""
        options = self.options
        injected: list[tuple[nn.Module, float]] = []
        if options.n_self_replace:
            for block in _self_attention_blocks(unet, options.self_replace_layers):
                layers = [block.attn1, block.attn_temp] if block.temporal else [block.attn1]
                injected += [(linear, options.n_self_replace) for a in layers for linear in (a.to_q, a.to_k)]
        if options.n_residual_replace:
            injected.append((_residual_layer(unet), options.n_residual_replace))
        handles = [module.register_forward_hook(partial(self._inject, share)) for module, share in injected]
        cross = _cross_attention_layers(unet) if self._num_prompts else []
        sizes = {level: (ceil(self.size[1] / 2**level), ceil(self.size[2] / 2**level)) for level, _ in cross}
        mask_level = min(sizes, key=lambda level: abs(log(sizes[level][0] * sizes[level][1] / MASK_TOKENS)), default=0)
        for level, layer in cross:
            layer.attend = partial(self._attend, sizes[level] if level == mask_level else None)
        try:
            with uncompiled(unet) if handles or cross else contextlib.nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for _, layer in cross:
                del layer.attend

    def _inject(self, share: float, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Copy the source's rows of a layer's output, `(batch ...) ...`, over those of the others."""
        if self._active(share, self._step):
            rows = output.unflatten(0, (self._rows, -1))
            rows[1:] = rows[:1]
        return output

    def _attend(
        self,
        mask_size: tuple[int, int] | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        upcast: bool = False,
    ) -> torch.Tensor:
        """Return cross-attention with the maps changed: `b heads (f n) d`, as `attend`, piece by piece."""
        records = mask_size is not None and self.word_maps is not None
        replaces = len(self._shares) > 0 and self._active(float(self._shares.max()), self._step)
        if not (records or replaces or len(self._equalizer)):
            return attend(query, key, value, upcast)
        b, heads, positions, d = query.shape
        size = max(1, MAP_ELEMENTS // (b * heads * key.shape[2]))
        out = []
        for start in range(0, positions, size):
            piece = query[:, :, start : start + size].float()
            maps = (piece * d**-0.5 @ key.float().mT).softmax(dim=-1)
            edited = maps[-self._num_prompts :]
            if records and self.word_maps is not None and mask_size is not None:
                self.word_maps.add(maps[:1], edited, mask_size, start, self._window)
            if replaces:
                edited = self._replaced(maps[:1], edited)
            if len(self._equalizer):
                edited = edited * self._equalizer.to(maps)[:, None, None]
            maps = torch.cat([maps[: -self._num_prompts], edited])
            out.append((maps @ value.float()).to(value.dtype))
        return torch.cat(out, dim=2)

    def _replaced(self, source: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """Return the maps `b heads q n` with the source's, `1 heads q n`, in the columns that are replaced in this step."""
        matrix, aligned, shares = (tensor.to(edited) for tensor in (self._matrix, self._aligned, self._shares))
        replaced = source @ matrix[:, None] + (1 - aligned)[:, None, None] * edited
        active = (self._step < shares * self.num_steps)[:, None, None]
        return torch.where(active, replaced, edited)


def transformer_blocks(module: nn.Module) -> list[BasicTransformerBlock]:
    """Return the transformer blocks of a network or a part of it, in order."""
    from tav_model.networks.transformer import BasicTransformerBlock

    return [block for block in module.modules() if isinstance(block, BasicTransformerBlock)]


def _self_attention_blocks(unet: UNet3DConditionModel, layers: str) -> list[BasicTransformerBlock]:
    """Return the transformer blocks whose self-attention may be the source's.

    Plug-and-Play takes those after `up_blocks[1].resnets[1]`, the layer whose features it takes.
    """
    if layers == "all":
        return transformer_blocks(unet)
    upper = list(unet.up_blocks)[1:]
    before: list[BasicTransformerBlock] = []
    if upper and isinstance(upper[0].attentions, nn.ModuleList):
        before = transformer_blocks(upper[0].attentions[0])
    return [block for part in upper for block in transformer_blocks(part) if block not in before]


def _residual_layer(unet: UNet3DConditionModel) -> nn.Module:
    """Return the last layer of the residual branch of `up_blocks[1].resnets[1]`."""
    return unet.get_submodule("up_blocks.1.resnets.1.conv2")


def _cross_attention_layers(unet: UNet3DConditionModel) -> list[tuple[int, Attention]]:
    """Return the cross-attention layers with their level: at level k, the latents' sides are divided by 2^k."""
    lowest = len(unet.down_blocks) - 1
    parts: list[tuple[int, nn.Module]] = list(enumerate(unet.down_blocks))
    parts.append((lowest, unet.mid_block))
    parts += [(lowest - i, block) for i, block in enumerate(unet.up_blocks)]
    return [(level, block.attn2) for level, part in parts for block in transformer_blocks(part)]
