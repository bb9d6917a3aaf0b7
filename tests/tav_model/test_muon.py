"""Muon: orthogonalized updates of matrices, and Adam for the rest."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model.muon import Muon, orthogonalized


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_orthogonalized_is_near_the_polar_factor(rows: int, columns: int, seed: int):
    matrix = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
    result = u.T @ orthogonalized(matrix) @ v.T
    large = singular > 0.1 * singular.max()
    assert ((result.diagonal()[large] > 0.6) & (result.diagonal()[large] < 1.3)).all()
    assert (result - torch.diag(result.diagonal())).abs().max() < 1e-3


def test_muon_leaves_tables_and_vectors_to_adam():
    table, matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (4, 4), (3,)))
    optimizer = Muon([table, matrix, vector], 0.1, embeddings=[table])
    for parameter in (table, matrix, vector):
        parameter.grad = torch.full(parameter.shape, 1e-3)
    optimizer.step()
    # The first step of Adam is the learning rate along each gradient's sign.
    assert torch.allclose(table, torch.full_like(table, -0.1), atol=1e-3)
    assert torch.allclose(vector, torch.full_like(vector, -0.1), atol=1e-3)
    assert torch.linalg.matrix_rank(matrix.detach()) == 1 and 0 < matrix.abs().max() < 0.1
