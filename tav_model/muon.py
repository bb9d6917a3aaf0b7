"""The optimizer: Muon for matrices and kernels, AdamW for the rest (Jordan et al., 2024; Liu et al., arXiv 2502.16982).

The training of these small networks is limited by the number of steps rather than by arithmetic, and an orthogonalized
update makes more progress per step. `torch.optim.Muon` accepts only matrices; here, a convolution's kernel is treated as
a matrix with a row for each output channel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
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
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            update = self._orthogonal_updates if group["orthogonal"] else self._adam_updates
            changes = update(parameters, gradients)
            torch._foreach_mul_(changes, group["lr"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, changes)
        return loss

    def _orthogonal_updates(
        self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return Muon's updates; matrices of equal shape are orthogonalized together, as many small products are slow."""
        momenta = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momenta.append(state["momentum"])
        torch._foreach_lerp_(momenta, gradients, 0.05)
        updates = list(torch._foreach_lerp(gradients, momenta, 0.95))
        shapes = defaultdict(list)
        for place, update in enumerate(updates):
            shapes[update.flatten(1).shape].append(place)
        for shape, places in shapes.items():
            matrices = orthogonalized(torch.stack([updates[place].flatten(1) for place in places]))
            for place, matrix in zip(places, 0.2 * max(shape) ** 0.5 * matrices, strict=True):
                updates[place] = matrix.reshape(updates[place].shape)
        return updates

    def _adam_updates(self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if not state:
                state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                state["steps"] = torch.zeros((), dtype=torch.float32)  # On the CPU, which reads it.
            state["steps"] += 1
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["steps"].item() for state in states]
        means, squares = [state["mean"] for state in states], [state["square"] for state in states]
        torch._foreach_lerp_(means, gradients, 0.1)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 0.01)
        updates = list(torch._foreach_div(means, [1 - 0.9**number for number in steps]))
        roots = torch._foreach_sqrt(torch._foreach_div(squares, [1 - 0.99**number for number in steps]))
        torch._foreach_div_(updates, torch._foreach_add(roots, 1e-8))
        return updates


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
