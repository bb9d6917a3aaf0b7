"""The optimizer: Muon for matrices and kernels, AdamW for the rest (Jordan et al., 2024; Liu et al., arXiv 2502.16982).

Small networks on few samples a second are short of steps, not of arithmetic, and an orthogonalised update makes more of
each step. `torch.optim.Muon` takes matrices only; here a convolution's kernel is the matrix of its outputs by the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

# Quintic Newton-Schulz iteration: pushes every singular value towards 1 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Args:
    parameters: of any shapes; those with two or more dimensions are orthogonalised.
    learning_rate: of an update whose entries have the root mean square 0.2, as AdamW's have (Liu et al., section 2.2).
    embeddings: parameters that AdamW updates although they are matrices: tables of vectors.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        weight_decay: float = 0.0,
        embeddings: Iterable[torch.nn.Parameter] = (),
    ) -> None:
        tables = {id(table) for table in embeddings}
        everything = list(parameters)
        matrices = [p for p in everything if p.ndim >= 2 and id(p) not in tables]
        others = [p for p in everything if p.ndim < 2 or id(p) in tables]
        shared = {"lr": learning_rate, "weight_decay": weight_decay}
        super().__init__(
            [{"params": matrices, "orthogonal": True, **shared}, {"params": others, "orthogonal": False, **shared}], {}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = self._orthogonal(parameters) if group["orthogonal"] else map(self._adam, parameters)
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)

    def _orthogonal(self, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Matrices of one shape are orthogonalised together: many small products are slow one by one."""
        updates: list[torch.Tensor] = [parameter.grad for parameter in parameters]
        shapes = defaultdict(list)
        for place, parameter in enumerate(parameters):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter.grad)
            momentum = state["momentum"].lerp_(parameter.grad, 0.05)
            updates[place] = parameter.grad.lerp(momentum, 0.95)
            shapes[updates[place].flatten(1).shape].append(place)
        for shape, places in shapes.items():
            matrices = orthogonalised(torch.stack([updates[place].flatten(1) for place in places]))
            for place, matrix in zip(places, matrices, strict=True):
                updates[place] = (0.2 * max(shape) ** 0.5 * matrix).reshape(updates[place].shape)
        return updates

    def _adam(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["steps"] = torch.zeros((), dtype=torch.float32)
        state["steps"] += 1
        steps = state["steps"].item()
        mean, square = state["mean"].lerp_(gradient, 0.1), state["square"].lerp_(gradient.square(), 0.01)
        return (mean / (1 - 0.9**steps)) / ((square / (1 - 0.99**steps)).sqrt() + 1e-8)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest matrices whose singular values are all 1. ``matrices``: (..., rows, columns).

    Each iteration multiplies by a polynomial of the Gram matrix. All of these commute, so the iteration runs on the
    Gram matrix, which is the smaller, and the matrix itself is multiplied once.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    product = None
    for i in range(ITERATIONS):
        polynomial = b * gram + c * (gram @ gram)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if i < ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    x = product @ x
    return (x if wide else x.mT).to(matrices.dtype)
