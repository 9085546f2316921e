"""Meta-Curvature (Park, Oliva 2019).

https://arxiv.org/abs/1902.03356

    MC(G) = G x_3 M_f x_2 M_i x_1 M_o,  G the gradient of a convolution as a tensor [outputs, inputs, height*width]
    theta' = theta - alpha * MC(grad_theta L_support(theta))
    theta, M <- theta, M - beta * grad_(theta, M) L_query(theta')

x_n is the product with a matrix along the n-th mode: on the flattened gradient MC is the Kronecker product of M_o, M_i
and M_f, a full matrix a layer for the price of three small ones. A linear layer has M_o and M_i; a vector (bias, scale,
shift) has a number for each element. All start as identities, so training begins as MAML's, and are trained like the
weights.

The authors' code for Omniglot and sinusoids (silverbottlep/maml) is MAML's with these matrices, whose shapes, identities and
vectors' numbers are those here; code for mini-ImageNet was not published. Differences:
- Inner and outer rate, outer loss and the head's start are those of our MAML: the inner rate of 0.4 there is for a sum
  over the ways, 0.5 is for a mean.
- There the outputs' matrix acts from the right, here every matrix from the left: its transpose, as learned.
- The authors take one inner step for Omniglot. With more, all steps share the matrices, as there at test time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Backbone, Spec
from metarun.ops.inner_loop import Params, call, gradient, parameters
from metarun.ops.numerics import full_precision


def identities(weight: Tensor) -> list[Tensor]:
    """What leaves a gradient of this shape as it is: ones for a vector or a number, or a matrix a mode (outputs, inputs, filter)."""
    if weight.ndim < 2:
        return [torch.ones_like(weight)]
    sizes = weight.shape if weight.ndim == 2 else (*weight.shape[:2], weight[0, 0].numel())
    return [torch.eye(size, dtype=weight.dtype, device=weight.device) for size in sizes]


def curved(gradient: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """MC(G), with the factors as `identities` makes them."""
    if gradient.ndim < 2:
        return factors[0] * gradient
    result = gradient.flatten(2) if gradient.ndim > 2 else gradient
    with full_precision(gradient):  # a step of the weights needs single precision
        for mode, matrix in enumerate(factors):
            result = torch.tensordot(matrix, result, dims=([1], [mode])).movedim(0, mode)
    return result.reshape(gradient.shape)


class MetaCurvature(MAML):
    """Learns an initialisation, and matrices that turn and scale the inner gradients of each of its tensors.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether inner gradients are constants; the matrices still learn.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 1,
        inner_lr: NonNegativeFloat = 0.5,
        test_inner_steps: NonNegativeInt | None = None,
        first_order: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            spec,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            test_inner_steps=test_inner_steps,
            first_order=first_order,
        )
        self.curvature = nn.ModuleDict(
            {name.replace(".", "_"): nn.ParameterList(identities(value)) for name, value in parameters(self).items()}
        )

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's weights after each of the numbers of inner steps in `steps`."""
        weights = {name: value for name, value in parameters(self).items() if not name.startswith("curvature.")}
        kept = [weights]
        for _ in range(max(steps)):
            gradients = gradient(
                lambda params: self.task_loss(call(self, params, support_x), support_y),
                kept[-1],
                create_graph=torch.is_grad_enabled() and not self.inner.first_order,
            )
            kept.append({
                name: value - self.inner.lr * curved(gradients[name], self.factors(name))
                for name, value in kept[-1].items()
            })  # fmt: skip
        return [kept[step] for step in steps]

    def factors(self, name: str) -> list[Tensor]:
        """The matrices of one of the weights, in the order of its modes."""
        return list(self.curvature[name.replace(".", "_")].parameters())
