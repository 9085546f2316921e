"""iMAML: Meta-Learning with Implicit Gradients (Rajeswaran, Finn, Kakade, Levine 2019).

https://arxiv.org/abs/1909.04630

    phi = argmin_phi' L_support(phi') + lambda/2 |phi' - theta|^2                       (equation 4)
    d L_query / d theta = (I + H / lambda)^-1 grad L_query(phi),  H the Hessian of L_support at phi    (equation 6)

Inner steps are gradient descent on equation 4; conjugate gradients solve the system of equation 6 (algorithm 2).
Only phi counts, not the way there, so memory does not grow with the inner steps. `loss` shows the mean query loss; its
gradient is the implicit one.

The defaults are those of the paper's 5-way Omniglot runs (table 2; 20-way: 25 steps), with the rates, the tasks a step
and the damping of the official code (aravindr93/imaml_dev). Differences from that code:
- Its inner steps descend on L_support alone, with one step of the proximal term after the last; here, as in the paper,
  every step descends on both. It tests without the term, here a test task is learned as a training task is.
- It solves with 2 I + H / (lambda + 10) where equation 6 has I + H / lambda. For lambda = 2, up to a factor of 2, which
  Adam does not feel, that is `damping=22`; with `damping=0`, equation 6, five solver steps are poor in a deep network.
- Conjugate gradients start from the right-hand side, not from zero, and stop where the curvature is not positive, not
  at a small residual: `solver_steps=0`, or such a first direction, leaves the first-order gradient at phi.
- The Hessian-free inner solver and a learned lambda are left out. There Adam's epsilon is 1e-3, and all layers start
  Xavier-uniform (gain 1.73); our head starts near zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt, PositiveFloat
from metarun.core import Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.inner_loop import Params, adapt, call, gradient, parameters
from metarun.ops.tasks import vectorized


class IMAML(MAML):
    """Learns an initialisation to which `inner_steps` of gradient descent are drawn, with an implicit meta-gradient.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        proximal_weight: The weight of the proximal term, lambda.
        solver_steps: The steps of conjugate gradients that solve for the meta-gradient.
        damping: What is added to lambda in the solver.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: NonNegativeInt = 16,
        inner_lr: NonNegativeFloat = 0.1,
        test_inner_steps: NonNegativeInt | None = None,
        proximal_weight: PositiveFloat = 2.0,
        solver_steps: NonNegativeInt = 5,
        damping: NonNegativeFloat = 22.0,
    ) -> None:
        super().__init__(backbone, spec, inner_steps=inner_steps, inner_lr=inner_lr, test_inner_steps=test_inner_steps)
        if inner_lr * proximal_weight >= 2:
            raise UserError(
                f"algo.inner_lr={inner_lr}: inner steps would leap over the initialisation, ever further; with "
                f"algo.proximal_weight={proximal_weight} it must be below {2 / proximal_weight:g}"
            )
        self.proximal_weight = proximal_weight
        self.solver_steps = solver_steps
        self.damping = damping

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's parameters after each of the numbers of inner steps in `steps`, as constants."""
        start = {name: value.detach() for name, value in parameters(self).items()}

        def regularised(params: Params) -> Tensor:
            distance = (flat(params) - flat(start)).square().sum()
            return self.task_loss(call(self, params, support_x), support_y) + self.proximal_weight / 2 * distance

        return adapt(regularised, start, steps=steps, learning_rate=self.inner.lr, first_order=True)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        strength = self.proximal_weight + self.damping

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Tensor, ...]:
            (adapted,) = self.adapt(support_x, support_y, [self.inner.steps])

            def support_loss(params: Params) -> Tensor:
                return self.task_loss(call(self, params, support_x), support_y)

            def support_slope(params: Params) -> tuple[Tensor, Tensor]:
                slope = flat(gradient(support_loss, params, create_graph=True))
                return slope, slope

            def query_loss(params: Params) -> tuple[Tensor, Tensor]:
                prediction = call(self, params, query_x, support_x)
                return self.task_loss(prediction, query_y), prediction

            loss, prediction, pull = pullback(query_loss, adapted)
            first_order = pull(torch.ones_like(loss))
            _, _, curve = pullback(support_slope, adapted)  # the Hessian is symmetric
            direction = conjugate_gradients(
                lambda vector: vector + curve(vector) / strength, first_order, self.solver_steps
            )
            return loss, prediction, direction

        losses, predictions, directions = self.over_tasks(task, *episodes.tensors)
        surrogate = (flat(parameters(self)) * directions.mean(0)).sum()
        return surrogate - surrogate.detach() + losses.mean(), self.scores(predictions, episodes.query_y)


def flat(params: Params) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([value.flatten() for value in params.values()])


def pullback(
    function: Callable[[Params], tuple[Tensor, Tensor]], params: Params
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The two results of `function` as constants, and what takes v to v times the first one's Jacobian, in one vector.

    The graph of `function` is built once, however many the products.
    """
    if vectorized():
        value, pull, other = torch.func.vjp(function, params, has_aux=True)  # type: ignore[misc]
        return value.detach(), other.detach(), lambda vector: flat(pull(vector)[0])
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        value, other = function(leaves)

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(value, list(leaves.values()), vector, retain_graph=True, materialize_grads=True)
        return flat(dict(zip(leaves, found, strict=True)))

    return value.detach(), other.detach(), product


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """x with product(x) = target for a symmetric positive definite `product`, from x = target, after at most `steps`."""
    x, residual = target, target - product(target)
    direction, size = residual, residual.square().sum()
    going = size > 0
    for _ in range(steps):
        curved = product(direction)
        curvature = (direction * curved).sum()
        going = going & (curvature > 0)
        # Nothing here asks for a number's value: so it runs under `vmap`, and on a GPU without waiting for it.
        length = torch.where(going, size / curvature, 0.0)
        x, residual = x + length * direction, residual - length * curved
        before, size = size, residual.square().sum()
        direction = residual + size / before.clamp_min(torch.finfo(before.dtype).tiny) * direction
    return x
