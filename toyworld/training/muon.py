"""The optimizer: Muon for matrices and kernels, AdamW for the rest (Jordan et al., 2024; Liu et al., arXiv 2502.16982).

Small networks on few samples a second are short of steps, not of arithmetic, and an orthogonalised update makes more of
each step. `torch.optim.Muon` takes matrices only; here a convolution's kernel is the matrix of its outputs by the rest.
"""

from __future__ import annotations

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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                update = (self._orthogonal if group["orthogonal"] else self._adam)(parameter.grad, state)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)

    @staticmethod
    def _orthogonal(gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 0.05)
        matrix = orthogonalised(gradient.lerp(momentum, 0.95).reshape(len(gradient), -1))
        return (0.2 * max(matrix.shape) ** 0.5 * matrix).reshape(gradient.shape)

    @staticmethod
    def _adam(gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if not state:
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["steps"] = torch.zeros((), dtype=torch.float32)
        state["steps"] += 1
        steps = state["steps"].item()
        mean, square = state["mean"].lerp_(gradient, 0.1), state["square"].lerp_(gradient.square(), 0.01)
        return (mean / (1 - 0.9**steps)) / ((square / (1 - 0.99**steps)).sqrt() + 1e-8)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix whose singular values are all 1. ``matrix``: (rows, columns).

    Each iteration multiplies by a polynomial of the Gram matrix. All of these commute, so the iteration runs on the
    Gram matrix, which is the smaller, and the matrix itself is multiplied once.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).float()
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    product = torch.eye(len(x), device=x.device)
    for _ in range(ITERATIONS):
        polynomial = torch.addmm(b * gram, gram, gram, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return (x if wide else x.T).to(matrix.dtype)
