"""The private kernels against the formula, and their absence."""

from types import SimpleNamespace

import pytest
import torch

from tav_model.networks import cpu_kernels
from tests.support.models import noise


def test_attention_and_the_logarithm_of_its_denominator():
    query, key, value = (noise(2, 3, n, 4, seed=seed).double() for seed, n in enumerate((5, 7, 7)))
    out, logsumexp = cpu_kernels.flash_attention(query, key, value)
    scores = query @ key.mT / 2
    torch.testing.assert_close(out, scores.softmax(-1) @ value)
    torch.testing.assert_close(logsumexp, scores.logsumexp(-1))


def test_gradients():
    query, key, value = (noise(2, 3, n, 4, seed=seed).double().requires_grad_() for seed, n in enumerate((5, 7, 7)))
    grad_out = noise(2, 3, 5, 4, seed=3).double()
    expected = torch.autograd.grad((query @ key.mT / 2).softmax(-1) @ value, (query, key, value), grad_out)
    with torch.no_grad():
        out, logsumexp = cpu_kernels.flash_attention(query, key, value)
        gradients = cpu_kernels.flash_attention_backward(grad_out, query, key, value, out, logsumexp)
    torch.testing.assert_close(gradients, expected)


NAMES = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:], ()], ids=["both", "forward", "backward", "neither"])
def test_the_kernels_are_available_where_torch_has_both(monkeypatch, names):
    assert cpu_kernels.available()
    monkeypatch.setattr(cpu_kernels, "_aten", SimpleNamespace(**dict.fromkeys(names)))
    assert cpu_kernels.available() == (names == NAMES)
