"""What an edit takes over from the source branch: against direct computations, and through the whole pipeline."""

import math

import pytest
import torch
from einops import rearrange
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tav_model import ddim_inversion
from tav_model.attention_control import AttentionControl, AttentionControlOptions, WordMaps
from tav_model.text import encode_prompts
from tests.support.models import CONTEXT_DIM, noise, pipeline, relative, text_encoder, tokenizer, video_unet

LENGTH, SIZE = 10, (3, 8, 8)
STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def exact_trajectory(pipe, prompt, steps=STEPS):
    """The trajectory whose every step DDIM sampling without guidance leads back."""
    text = encode_prompts(pipe.tokenizer, pipe.text_encoder, [prompt])
    x = 0.5 * noise(1, 4, *SIZE)
    return ddim_inversion(pipe.unet, pipe.scheduler, x, text, steps, iterations=40, tolerance=1e-7)


@pytest.fixture(scope="module")
def trajectory(pipe):
    return exact_trajectory(pipe, "a man")


def trajectory_of(pipe, prompt="a man", **kwargs):
    """The latents after every step, from the last of the inversion to the result."""
    states = []

    def collect(_, __, ___, tensors):
        states.append(tensors["latents"])
        return {}

    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "callback_on_step_end": collect}
    pipe(prompt, **arguments | kwargs)
    return states


def control(options, prompts, source="a man", **kwargs):
    arguments = {"tokenizer": tokenizer(LENGTH), "length": LENGTH, "num_steps": STEPS, "size": SIZE}
    return AttentionControl(AttentionControlOptions(**options), prompts, source, **arguments | kwargs)


INJECTIONS = {
    "attention": {"n_self_replace": 1.0},
    "attention in all layers": {"n_self_replace": 1.0, "self_replace_layers": "all"},
    "features": {"n_residual_replace": 1.0},
    "half of the steps": {"n_self_replace": 0.5, "n_residual_replace": 0.5},
    "words replaced": {"edit_type": "replace", "n_cross_replace": 1.0},
    "words refined": {"edit_type": "refine", "n_cross_replace": 0.5},
    "everything": {"n_self_replace": 1.0, "n_residual_replace": 1.0, "edit_type": "replace", "n_cross_replace": 1.0},
}


@pytest.mark.parametrize("kind", INJECTIONS)
def test_own_prompt_of_the_source_reproduces_its_trajectory(pipe, trajectory, kind):
    states = trajectory_of(
        pipe, guidance_scale=1.0, trajectory=trajectory, source_prompt="a man", cross_attention_kwargs=INJECTIONS[kind]
    )
    for i, state in enumerate(states):
        assert relative(state, trajectory[STEPS - 1 - i]) < 1e-4


@pytest.mark.parametrize("kind", INJECTIONS)
def test_another_prompt_is_drawn_towards_the_source(pipe, trajectory, kind):
    arguments = {"prompt": "a dog", "guidance_scale": 1.0, "trajectory": trajectory, "source_prompt": "a man"}
    plain, *_ = reversed(trajectory_of(pipe, **arguments))
    injected, *_ = reversed(trajectory_of(pipe, **arguments, cross_attention_kwargs=INJECTIONS[kind]))
    assert relative(injected, plain) > 1e-4


def test_source_adds_one_row_only_as_long_as_it_is_needed(pipe, trajectory):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    options = {"n_self_replace": 0.5, "n_residual_replace": 0.25}
    arguments = {"trajectory": trajectory, "source_prompt": "a man", "cross_attention_kwargs": options}
    trajectory_of(pipe, ["a dog", "a cat"], guidance_scale=7.5, **arguments)
    trajectory_of(pipe, ["a dog", "a cat"], guidance_scale=1.0, **arguments)
    hook.remove()
    assert rows == [5, 5, 4, 4, 3, 3, 2, 2]


def test_source_row_is_the_trajectory_under_the_source_prompt(pipe, trajectory):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0][0], inputs[2][0])))
    trajectory_of(
        pipe, "a dog", trajectory=trajectory, source_prompt="a man", cross_attention_kwargs={"n_self_replace": 1.0}
    )
    hook.remove()
    (text,) = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a man"])
    for i, (latents, embeds) in enumerate(seen):
        assert torch.equal(latents, trajectory[STEPS - i][0]) and torch.equal(embeds, text)


@pytest.mark.parametrize("options", [INJECTIONS["everything"], {"edit_type": "refine", "n_cross_replace": 0.8}])
def test_prompts_of_a_batch_are_edited_as_alone(pipe, trajectory, options):
    arguments = {"trajectory": trajectory, "source_prompt": "a man", "cross_attention_kwargs": options}
    together = trajectory_of(pipe, ["a dog", "a bird"], guidance_scale=7.5, **arguments)[-1]
    for i, prompt in enumerate(["a dog", "a bird"]):
        assert relative(together[i : i + 1], trajectory_of(pipe, prompt, guidance_scale=7.5, **arguments)[-1]) < 1e-4


def test_injected_attention_is_that_of_the_source(pipe):
    """Rows of different latents have the source's queries and keys, so with its values they have its output."""
    unet = video_unet()
    block = unet.up_blocks[1].attentions[1].transformer_blocks[0]
    seen = {}
    for name in ("attn1", "attn_temp"):
        for part in ("to_q", "to_k", "to_v"):
            layer = getattr(getattr(block, name), part)
            layer.register_forward_hook(lambda _, __, output, key=(name, part): seen.update({key: output}))
    injecting = control({"n_self_replace": 0.5}, None)
    with torch.no_grad(), injecting.attached(unet):
        for step in (1, 2):
            injecting.begin_step(step, 3)
            unet(noise(3, 4, *SIZE), 100, noise(3, LENGTH, CONTEXT_DIM))
            for (_, part), output in seen.items():
                source, *others = output.unflatten(0, (3, -1))
                equal = [torch.equal(source, other) for other in others]
                assert equal == [part != "to_v" and step < 2] * 2


def test_features_are_injected_before_the_skip_connection():
    unet = video_unet()
    layer = unet.up_blocks[1].resnets[1]
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((module.conv_shortcut(inputs[0]), output)))
    injecting = control({"n_residual_replace": 1.0}, None)
    with torch.no_grad(), injecting.attached(unet):
        injecting.begin_step(0, 2)
        unet(noise(2, 4, *SIZE), 100, noise(2, LENGTH, CONTEXT_DIM))
    ((shortcut, output),) = seen
    branch = output - shortcut
    assert relative(branch[1], branch[0]) < 1e-4 and relative(shortcut[1], shortcut[0]) > 0.01


def test_network_is_left_as_it_was(pipe, trajectory):
    plain = pipe("a dog", latents=trajectory[-1], num_inference_steps=2, output_type="latent").frames
    arguments = {"trajectory": trajectory, "source_prompt": "a man", "callback_on_step_end": lambda *_: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        pipe("a dog", **arguments, cross_attention_kwargs=INJECTIONS["everything"])
    again = pipe("a dog", latents=trajectory[-1], num_inference_steps=2, output_type="latent").frames
    assert torch.equal(again, plain)


def test_auto_replaces_words_where_there_are_as_many(pipe, trajectory):
    def edited(prompt, edit_type):
        options = {"edit_type": edit_type, "n_cross_replace": 1.0}
        arguments = {"trajectory": trajectory, "source_prompt": "a man", "cross_attention_kwargs": options}
        return trajectory_of(pipe, prompt, num_inference_steps=1, **arguments)[-1]

    assert torch.equal(edited("a dog", "auto"), edited("a dog", "replace"))
    assert torch.equal(edited("a red man", "auto"), edited("a red man", "refine"))


# Words, against a direct computation


def direct_attention(layer, hidden, context, change):
    """softmax(Q K^T / sqrt(d)) V with one explicit map for each row, head and frame; `change(maps)` edits the last rows.

    `hidden` is `(b f) n c`, `context` is `b m c`; the maps are `b f heads n m`.
    """
    b, heads = len(context), layer.heads
    query = rearrange(layer.to_q(hidden), "(b f) n (h d) -> b f h n d", b=b, h=heads)
    key, value = (rearrange(p(context), "b m (h d) -> b 1 h m d", h=heads) for p in (layer.to_k, layer.to_v))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    exponential = torch.exp(scores - scores.max())
    maps = exponential / exponential.sum(-1, keepdim=True)
    out = rearrange(change(maps) @ value, "b f h n d -> (b f) n (h d)")
    return layer.to_out[0](out)


@settings(max_examples=15)
@given(
    prompts=st.lists(st.sampled_from(["a dog", "a bird", "ox", "the man", "a man ran"]), min_size=1, max_size=2),
    guided=st.booleans(),
    edit_type=st.sampled_from(["replace", "refine", None]),
    strength=st.sampled_from([None, 0.0, 4.0]),
    step=st.integers(0, STEPS - 1),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
@example(prompts=["the man", "a man ran"], guided=False, edit_type="refine", strength=0.0, step=0, share=0.0)
def test_words_are_those_of_a_direct_softmax(prompts, guided, edit_type, strength, step, share):
    if edit_type == "replace":
        prompts = [prompt for prompt in prompts if len(prompt.split()) == 2] or ["a dog"]
    last = min((prompt.split()[-1] for prompt in prompts), key=len)
    prompts = [f"{prompt.rsplit(' ', 1)[0] if ' ' in prompt else 'b'} {last}" for prompt in prompts]
    options = {"edit_type": edit_type, "n_cross_replace": share}
    if strength is not None:
        options |= {"equalizer_words": [last], "equalizer_strengths": [strength]}
    controlled = control(options, prompts)
    unet = video_unet()
    rows = 1 + len(prompts) * (2 if guided else 1)
    hidden, context = noise(rows * 3, 64, 8), noise(rows, LENGTH, CONTEXT_DIM, seed=1)
    layer = unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    letters = {"a man": [(1,), (2, 3, 4)]} | {
        prompt: [
            tuple(range(start, start + len(word)))
            for word, start in zip(
                prompt.split(), [1 + sum(len(w) for w in prompt.split()[:i]) for i in range(9)], strict=False
            )
        ]
        for prompt in prompts
    }

    def change(maps):
        maps = maps.clone()
        source = maps[0]
        for i, prompt in enumerate(prompts):
            edited = maps[rows - len(prompts) + i]
            if edit_type == "replace" and step < share * STEPS:
                words = list(zip(letters["a man"], letters[prompt], strict=True))
                new = torch.zeros_like(edited)
                shift = 0
                for (before, after), texts in zip(words, zip(("a", "man"), prompt.split(), strict=True), strict=True):
                    if texts[0] == texts[1] or len(before) == len(after):
                        new[..., list(after)] = source[..., list(before)]
                    else:
                        new[..., list(after)] = source[..., list(before)].sum(-1, keepdim=True) / len(after)
                    shift = after[-1] - before[-1]
                new[..., 0] = source[..., 0]
                for j in range(5, LENGTH):
                    new[..., min(j + shift, LENGTH - 1)] += source[..., j]
                edited[:] = new
            elif edit_type == "refine" and step < share * STEPS:
                ids = [tokenizer(LENGTH)(text).input_ids for text in ("a man", prompt)]
                edited[:] = refined(source, edited, *ids)
            if strength is not None:
                for word, places in zip(prompt.split(), letters[prompt], strict=True):
                    if word == last:  # Twice in "a man man".
                        edited[..., list(places)] *= strength
        return maps

    with torch.no_grad(), controlled.attached(unet):
        controlled.begin_step(step, rows)
        ours = layer(hidden, context)
        expected = direct_attention(layer, hidden, context, change)
    assert relative(ours, expected) < 1e-5


def refined(source, edited, source_ids, ids):
    """Columns of tokens in the longest common subsequence (of the first such in order) come from the source."""
    import functools

    @functools.cache
    def best(i, j):
        if i == len(source_ids) or j == len(ids):
            return ()
        options = [best(i + 1, j), best(i, j + 1)]
        if source_ids[i] == ids[j]:
            options.append(((i, j), *best(i + 1, j + 1)))
        return max(options, key=lambda pairs: (len(pairs), [(-i, -j) for i, j in pairs]))

    out = edited.clone()
    for i, j in best(0, 0):
        out[..., j] = source[..., i]
    out[..., len(ids) :] = source[..., len(ids) :]
    return out


def test_maps_are_computed_in_pieces(monkeypatch):
    unet = video_unet()
    layer = unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    hidden, context = noise(3 * 3, 64, 8), noise(3, LENGTH, CONTEXT_DIM, seed=1)
    results = []
    for limit in (2**26, 3 * 2 * LENGTH * 50):
        monkeypatch.setattr("tav_model.attention_control.MAP_ELEMENTS", limit)
        controlled = control({"edit_type": "replace"}, ["a dog"], word_mask=True)
        with torch.no_grad(), controlled.attached(unet):
            controlled.begin_step(0, 3)
            results.append((layer(hidden, context), controlled.word_maps.maps()))
    assert relative(results[1][0], results[0][0]) < 1e-6 and relative(results[1][1], results[0][1]) < 1e-6


def test_a_share_for_each_word():
    options = {"edit_type": "refine", "n_cross_replace": {"default_": 0.0, "red": 1.0}}
    controlled = control(options, ["a red b"], source="a red")
    controlled.begin_step(2, 2)
    source, edited = noise(1, 1, 5, LENGTH), noise(1, 1, 5, LENGTH, seed=1)
    replaced = controlled._replaced(source, edited)
    assert torch.equal(replaced[..., 2:5], source[..., 2:5])
    assert torch.equal(replaced[..., :2], edited[..., :2]) and torch.equal(replaced[..., 5:], edited[..., 5:])


# Maps of words


def test_word_maps_are_sums_of_the_columns_of_the_words():
    maps = WordMaps([[1, 2]], [[3]], (2, 4, 4))
    source, edited = noise(1, 2, 8, LENGTH), noise(1, 2, 8, LENGTH, seed=1)
    for _ in range(2):
        maps.add(source, edited, (2, 2), 0)
    first, second = (2 * x.mean(1) for x in (source[0][..., [1, 2]].sum(-1)[None], edited[0][..., [3]].sum(-1)[None]))
    expected = torch.stack([first, second]).view(2, 1, 2, 2, 2)
    torch.testing.assert_close(maps.maps(), expected)


def test_maps_come_from_the_layers_nearest_to_16_by_16():
    unet = video_unet(block_out_channels=(8, 8, 16))
    for side, level in ((16, 0), (32, 1), (64, 2)):
        size = (1, side, side)
        controlled = control({}, ["a dog"], size=size, word_mask=True)
        with torch.no_grad(), controlled.attached(unet):
            controlled.begin_step(0, 2)
            unet(noise(2, 4, *size), 100, noise(2, LENGTH, CONTEXT_DIM))
        assert controlled.word_maps.maps().shape == (2, 1, 1, side // 2**level, side // 2**level)


def test_nothing_else_is_kept(pipe, trajectory):
    controlled = control({"edit_type": "replace", "n_self_replace": 1.0}, ["a dog", "a cat"], word_mask=True)
    with torch.no_grad(), controlled.attached(pipe.unet):
        controlled.begin_step(0, 3)
        pipe.unet(noise(3, 4, *SIZE), 100, noise(3, LENGTH, CONTEXT_DIM))
    kept = sum(x.numel() for x in controlled.word_maps._sums.values())
    assert kept == 2 * 2 * 3 * 8 * 8


# Errors

ERRORS = {
    "unknown name": ({"cross_replace": 1}, r"cross_attention_kwargs: 'cross_replace' must be one of edit_type, "),
    "unknown type": ({"edit_type": "swap"}, r"edit_type: 'swap' must be one of replace, refine, auto"),
    "unknown layers": ({"self_replace_layers": "low"}, r"self_replace_layers: 'low' must be one of upper, all"),
    "no share": ({"n_self_replace": 1.5}, r"n_self_replace: 1.5 must be a number from 0 to 1"),
    "no share of a word": ({"n_cross_replace": {"dog": -1}}, r"n_cross_replace: -1 must be a number from 0 to 1"),
    "strengths": ({"equalizer_words": ["dog"]}, r"equalizer_strengths: 0 for 1 equalizer_words"),
    "missing word": ({"equalizer_words": ["ox"], "equalizer_strengths": [2]}, r"'a dog' has no word 'ox'"),
    "missing blend words": ({"local_blend_words": ["man"]}, r"local_blend_words: .* each of the 1 prompts"),
    "other number of words": ({"edit_type": "replace"}, r"replace needs as many words", "a red man"),
    "nothing changed": ({}, r"mask: 'a dog' has no word that differs", "a dog"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_options_that_cannot_be_are_named(pipe, trajectory, case):
    options, message, *source = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        pipe(
            "a dog",
            trajectory=trajectory,
            source_prompt=(source or ["a man"])[0],
            cross_attention_kwargs=options,
            mask="words" if case == "nothing changed" else None,
            num_inference_steps=1,
        )


@pytest.mark.parametrize(
    "options", [{"n_self_replace": 0.5}, {"edit_type": "replace"}, {"local_blend_words": ["man", "dog"]}]
)
def test_source_needs_the_trajectory(pipe, options):
    with pytest.raises(ValueError, match=rf"trajectory: needed for {next(iter(options))}"):
        pipe("a dog", latents=noise(1, 4, *SIZE), source_prompt="a man", cross_attention_kwargs=options)


def test_words_need_texts(pipe, trajectory):
    with pytest.raises(ValueError, match=r"source_prompt and prompt are needed as texts"):
        pipe("a dog", trajectory=trajectory, cross_attention_kwargs={"edit_type": "replace"})


def test_long_prompts_and_tokenizers():
    """A tokenizer of 40 tokens: words keep their places."""
    long = pipeline(tokenizer=tokenizer(40), text_encoder=text_encoder(max_tokens=40))
    trajectory = exact_trajectory(long, "a man sits by the sea")
    states = trajectory_of(
        long,
        "a man sits by the sea",
        guidance_scale=1.0,
        trajectory=trajectory,
        source_prompt="a man sits by the sea",
        cross_attention_kwargs={"edit_type": "refine", "n_cross_replace": 1.0},
    )
    assert relative(states[-1], trajectory[0]) < 1e-4
