"""Frames to latents and back: scale, chunks, half precision, and videos that are not finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import TavError
from tav_model.latents import decode_latents, encode_frames, to_frames
from tests.support.models import image_vae, noise


def frames(count=5, height=12, width=16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def spy(vae, method, monkeypatch):
    """How many frames each call of the VAE's method gets."""
    counts = []
    original = getattr(vae, method)
    monkeypatch.setattr(vae, method, lambda batch, *rest: counts.append(len(batch)) or original(batch, *rest))
    return counts


def test_encoding_is_the_vaes_posterior_of_each_frame_scaled():
    vae, video = image_vae(scaling_factor=0.5), frames()
    mean, deviation = encode_frames(vae, video)
    assert mean.shape == deviation.shape == (1, 4, 5, 6, 8)
    assert mean.dtype == deviation.dtype == torch.float32
    for i, frame in enumerate(video):
        image = torch.from_numpy(frame / 127.5 - 1).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = vae.encode(image).latent_dist
        torch.testing.assert_close(mean[:, :, i], 0.5 * posterior.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deviation[:, :, i], 0.5 * posterior.std, rtol=1e-4, atol=1e-5)


def test_decoding_is_the_vaes_decoder_for_each_frame():
    vae, latents = image_vae(scaling_factor=0.5), noise(2, 4, 3, 6, 8)
    video = decode_latents(vae, latents)
    assert video.shape == (2, 3, 3, 12, 16)
    assert video.dtype == torch.float32
    for b in range(2):
        for f in range(3):
            with torch.no_grad():
                image = vae.decode(latents[b, :, f][None] / 0.5).sample[0]
            torch.testing.assert_close(video[b, :, f], (image / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(count=st.integers(1, 7), chunk=st.integers(1, 9), videos=st.integers(1, 2))
def test_decoding_in_chunks_gives_the_same_frames_and_bounds_them(count, chunk, videos):
    vae, latents = image_vae(), noise(videos, 4, count, 4, 4)
    whole = decode_latents(vae, latents, chunk_size=videos * count)
    with pytest.MonkeyPatch.context() as patch:
        seen = spy(vae, "decode", patch)
        parts = decode_latents(vae, latents, chunk_size=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert max(seen) <= chunk
    assert sum(seen) == videos * count


@settings(max_examples=15)
@given(count=st.integers(1, 7), chunk=st.integers(1, 9))
def test_encoding_in_chunks_gives_the_same_latents_and_bounds_them(count, chunk):
    vae, video, told = image_vae(), frames(count, 8, 8), []
    whole = encode_frames(vae, video, chunk_size=count)
    with pytest.MonkeyPatch.context() as patch:
        seen = spy(vae, "encode", patch)
        parts = encode_frames(vae, video, chunk_size=chunk, on_chunk=told.append)
    for part, all_at_once in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-5, atol=1e-6)
    assert max(seen) <= chunk
    assert seen == told
    assert sum(seen) == count


@pytest.mark.parametrize("size", [0, -1])
def test_chunks_of_no_frames_are_refused(size):
    with pytest.raises(ValueError, match=r"chunk_size: .* at least 1"):
        decode_latents(image_vae(), noise(1, 4, 1, 4, 4), chunk_size=size)


def test_float16_vae_decodes_in_float32():
    # Activations of Stable Diffusion's decoder pass 65504, the largest float16: its videos were black or NaN.
    vae, latents = image_vae(), 100 * noise(1, 4, 2, 4, 4)
    vae.decoder.conv_in.weight.data *= 1e4
    vae.half()
    with torch.no_grad():
        assert not vae.decode(latents[:, :, 0].half()).sample.isfinite().all()
    video = decode_latents(vae, latents)
    assert vae.dtype == torch.float32
    assert video.std() > 0.01


def test_bfloat16_vae_decodes_as_it_is():
    vae = image_vae().bfloat16()
    video = decode_latents(vae, noise(1, 4, 2, 4, 4))
    assert vae.dtype == torch.bfloat16
    assert video.dtype == torch.float32
    assert (video - decode_latents(image_vae(), noise(1, 4, 2, 4, 4))).abs().mean() < 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_no_video(value):
    latents = noise(1, 4, 2, 4, 4)
    latents[0, 0, 1, 0, 0] = value
    with pytest.raises(TavError, match=r"\Athe edited video is not finite: .*\Z"):
        decode_latents(image_vae(), latents)


def test_decoder_that_overflows_to_infinity_gives_no_white_video():
    vae = image_vae()
    vae.decoder.conv_out.bias.data += math.inf
    with pytest.raises(TavError, match="not finite"):
        decode_latents(vae, noise(1, 4, 2, 4, 4))


def test_encoder_that_overflows_is_refused_with_what_to_do():
    vae = image_vae()
    vae.encoder.conv_in.weight.data *= 1e6
    with pytest.raises(TavError, match=r"\A.*float16: encode in float32\Z"):
        encode_frames(vae.half(), frames())


def test_frames_survive_the_way_through_floats():
    video = frames()
    assert np.array_equal(to_frames(torch.from_numpy(video / 255).float().permute(3, 0, 1, 2)), video)
