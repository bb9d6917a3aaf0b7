"""The optimizer: Muon for matrices and kernels, AdamW for the rest (Jordan et al., 2024; Liu et al., arXiv 2502.16982).

The training of these small networks is limited by the number of steps rather than by arithmetic, and an orthogonalized
update makes more progress per step. `torch.optim.Muon` accepts only matrices; here, a convolution's kernel is treated as
a matrix with a row for each output channel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import overload

import torch

# Quintic Newton-Schulz iteration, which moves every singular value towards 1 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with AdamW for vectors and embedding tables.

    Args:
        parameters: parameters of any shape; updates of those with two or more dimensions are orthogonalized.
        learning_rate: factor of an update with root mean square 0.2, like AdamW's (Liu et al., section 2.2).
        weight_decay: decoupled weight decay.
        embeddings: embedding tables, which AdamW updates although they are matrices.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        weight_decay: float = 0.0,
        embeddings: Iterable[torch.Tensor] = (),
    ) -> None:
        tables = {id(table) for table in embeddings}
        everything = list(parameters)
        matrices = [p for p in everything if p.ndim >= 2 and id(p) not in tables]
        others = [p for p in everything if p.ndim < 2 or id(p) in tables]
        shared = {"lr": learning_rate, "weight_decay": weight_decay}
        super().__init__(
            [{"params": matrices, "orthogonal": True, **shared}, {"params": others, "orthogonal": False, **shared}], {}
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have gradients.

        Args:
            closure: computes the loss and the gradients again, if given.

        Returns:
            The loss of the closure, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            update = self._orthogonal_updates if group["orthogonal"] else self._adam_updates
            for parameter, change in zip(parameters, update(parameters, gradients), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * change)
        return loss

    def _orthogonal_updates(
        self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return Muon's updates; matrices of equal shape are orthogonalized together, as many small products are slow."""
        updates: list[torch.Tensor] = []
        shapes = defaultdict(list)
        for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 0.05)
            updates.append(gradient.lerp(momentum, 0.95))
            shapes[updates[place].flatten(1).shape].append(place)
        for shape, places in shapes.items():
            matrices = orthogonalized(torch.stack([updates[place].flatten(1) for place in places]))
            for place, matrix in zip(places, matrices, strict=True):
                updates[place] = (0.2 * max(shape) ** 0.5 * matrix).reshape(updates[place].shape)
        return updates

    def _adam_updates(
        self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        return map(self._adam_update, parameters, gradients)

    def _adam_update(self, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["steps"] = torch.zeros((), dtype=torch.float32)
        state["steps"] += 1
        steps = state["steps"].item()
        mean, square = state["mean"].lerp_(gradient, 0.1), state["square"].lerp_(gradient.square(), 0.01)
        return (mean / (1 - 0.9**steps)) / ((square / (1 - 0.99**steps)).sqrt() + 1e-8)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Return approximately the nearest matrices whose singular values are all 1, for matrices (..., rows, columns).

    Each iteration multiplies by a polynomial of the Gram matrix. These polynomials commute, so the iteration runs on the
    Gram matrix, which is smaller, and multiplies the matrix itself only once.
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
