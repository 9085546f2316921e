"""Inner steps: gradient descent on a support loss, of first or second order, with or without recomputation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metarun.errors import UserError
from metarun.ops import draws
from metarun.ops.batch_norm import both_sets
from metarun.ops.tasks import vectorized

Params = dict[str, Tensor]


def gradient(loss: Callable[[Params], Tensor], params: Params, *, create_graph: bool) -> Params:
    """Computes the derivative of a loss with respect to parameters.

    Args:
        loss: A function from parameters to a scalar.
        params: The parameters, by name.
        create_graph: Whether the result can be differentiated again; otherwise no graph of it is built.

    Returns:
        d loss / d params, by name, each of the shape of its parameter; zeros for one that the loss does not depend on.
    """
    return gradient_and_value(loss, params, create_graph=create_graph)[0]


def gradient_and_value(
    loss: Callable[[Params], Tensor], params: Params, *, create_graph: bool
) -> tuple[Params, Tensor]:
    """Computes `gradient`, and the detached loss itself.

    Args:
        loss: A function from parameters to a scalar.
        params: The parameters, by name.
        create_graph: Whether the gradient can be differentiated again.

    Returns:
        The gradient by name, and the loss, a detached scalar.
    """
    if vectorized():
        with torch.set_grad_enabled(create_graph and torch.is_grad_enabled()):
            gradients, value = torch.func.grad_and_value(loss)(params)
        return dict(gradients), value.detach()
    with torch.enable_grad():
        if not create_graph:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        value = loss(params)
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, gradients, strict=True)), value.detach()


def adapt(
    loss: Callable[[Params], Tensor],
    params: Params,
    *,
    steps: Sequence[int],
    learning_rate: float | Tensor | Mapping[str, Tensor],
    first_order: bool = False,
    recompute: bool = False,
) -> list[Params]:
    """Takes steps of gradient descent on a loss: theta_k+1 = theta_k - learning_rate * d loss / d theta_k.

    Second order: the result is differentiable through every step (MAML). First order: the inner gradients are constants, so
    the result's derivative with respect to `params` is the identity (FOMAML). Either way it is differentiable with respect to
    a learning rate that is a tensor. Under `torch.no_grad()` nothing keeps a graph.

    Args:
        loss: A function from parameters to a scalar.
        params: The parameters theta_0, by name.
        steps: The numbers of steps after which parameters are returned, each at least 0; the largest is how many are taken.
        learning_rate: The inner learning rate: one for all parameters, or one by name, of a shape that broadcasts to its
            parameter's.
        first_order: Whether the inner gradients are constants.
        recompute: Whether the graphs of the inner steps are made again, one at a time, on the way back, instead of kept: the
            same derivative, in memory that hardly grows with the steps, for about a sixth more time. `loss` must then depend
            on nothing that is trained but its argument.

    Returns:
        The parameters after each of `steps`, in that order.

    Raises:
        UserError: `recompute` under `vmap`.

    Source:
        Finn, Abbeel, Levine (2017), equation 1; section 5.2 for the first order.
    """
    second_order = torch.is_grad_enabled() and not first_order
    if second_order and recompute:
        return _recomputed(loss, params, steps, learning_rate)
    kept = [params]
    for _ in range(max(steps)):
        gradients = gradient(loss, kept[-1], create_graph=second_order)
        kept.append(_descend(kept[-1], gradients, learning_rate))
        if len(kept) - 2 not in steps:
            kept[-2] = {}
    return [kept[step] for step in steps]


@dataclass
class InnerLoop:
    """The settings of an inner loop, as the methods of MAML's family share them.

    Args:
        steps: Inner steps of a training task.
        lr: The inner learning rate, the same for all parameters.
        test_steps: Inner steps of a test task; None is as in training.
        first_order: Whether inner gradients are constants.
        recompute: Whether the graphs of inner steps are made again on the way back instead of kept.
    """

    steps: int
    lr: float
    test_steps: int | None = None
    first_order: bool = False
    recompute: bool = False

    def check(self, norm: str) -> None:
        """Checks that the norm of the backbone goes with these settings.

        Args:
            norm: A kind of `metarun.ops.batch_norm`.

        Raises:
            UserError: It does not.
        """
        if self.recompute and norm == "running":
            raise UserError(
                "algo.recompute=true: would count every step twice in the averages of backbone.norm=running"
            )

    def adapt(
        self,
        loss: Callable[[Params], Tensor],
        params: Params,
        steps: Sequence[int],
        lr: float | Tensor | Mapping[str, Any] | None = None,
    ) -> list[Params]:
        """Calls `adapt` with these settings.

        Args:
            loss: A function from parameters to a scalar.
            params: The parameters, by name.
            steps: The numbers of steps after which parameters are returned.
            lr: What takes the place of the inner learning rate: one for all parameters, or one by name.

        Returns:
            The parameters after each of `steps`, in that order.
        """
        return adapt(
            loss,
            params,
            steps=steps,
            learning_rate=self.lr if lr is None else lr,
            first_order=self.first_order,
            recompute=self.recompute,
        )


def _descend(params: Params, gradients: Params, learning_rate: float | Tensor | Mapping[str, Tensor]) -> Params:
    return {name: value - rate(learning_rate, name) * gradients[name] for name, value in params.items()}


def _recomputed(
    loss: Callable[[Params], Tensor],
    params: Params,
    steps: Sequence[int],
    learning_rate: float | Tensor | Mapping[str, Tensor],
) -> list[Params]:
    if vectorized():
        raise UserError("algo.recompute=true: needs the tasks in a loop; add hardware.vectorize=false")
    rates = [rate(learning_rate, name) for name in params]
    learned = [value for value in rates if isinstance(value, Tensor)]
    apply: Callable[..., tuple[Tensor, ...]] = _Recomputed.apply
    flat = apply(loss, list(params), list(steps), rates, *params.values(), *learned)
    return [dict(zip(params, flat[i : i + len(params)], strict=True)) for i in range(0, len(flat), len(params))]


class _Recomputed(torch.autograd.Function):
    """Inner steps of which only the parameters theta_0 ... theta_K are kept.

    From v_K = d L / d theta_K back: v_k = v_k+1 - H_k (alpha v_k+1), with H_k the Hessian of the inner loss at theta_k.
    """

    @staticmethod
    def forward(ctx: Any, loss: Any, names: list[str], steps: list[int], rates: list[Any], *tensors: Tensor) -> Any:
        params = dict(zip(names, tensors, strict=False))
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.trajectory = [params]
        ctx.random = []  # a dropout has to drop the same again
        for _ in range(max(steps)):
            ctx.random.append(draws.snapshot(tensors[0].device))
            gradients = gradient(loss, ctx.trajectory[-1], create_graph=False)
            ctx.trajectory.append(_descend(ctx.trajectory[-1], gradients, dict(zip(names, rates, strict=True))))
        ctx.loss, ctx.steps, ctx.rates = loss, steps, rates
        # Not the very tensors that are kept: an output that its own node holds is never freed.
        return tuple(value.clone() for step in steps for value in ctx.trajectory[step].values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        count = len(ctx.rates)
        device, dtype, enabled = ctx.autocast
        arriving = {step: gradients[i * count : (i + 1) * count] for i, step in enumerate(ctx.steps)}
        v = [torch.zeros_like(value) for value in gradients[:count]]
        of_rates = [torch.zeros_like(value) if isinstance(value, Tensor) else None for value in ctx.rates]
        for step in range(len(ctx.trajectory) - 1, -1, -1):
            v = [a + b for a, b in zip(v, arriving[step], strict=True)] if step in arriving else v
            if step == 0:
                break
            current = {name: value.detach().requires_grad_() for name, value in ctx.trajectory[step - 1].items()}
            with ctx.random[step - 1](), torch.enable_grad():
                with torch.autocast(device, dtype=dtype, enabled=enabled):
                    value = ctx.loss(current)
                inner = torch.autograd.grad(value, list(current.values()), create_graph=True, materialize_grads=True)
            curved = torch.autograd.grad(
                inner,
                list(current.values()),
                [alpha * a for alpha, a in zip(ctx.rates, v, strict=True)],
                materialize_grads=True,
            )
            of_rates = [
                None if old is None else old - (a * g.detach()).sum_to_size(old.shape)
                for old, a, g in zip(of_rates, v, inner, strict=True)
            ]
            v = [a - b for a, b in zip(v, curved, strict=True)]
        return None, None, None, None, *v, *(value for value in of_rates if value is not None)


def rate(learning_rate: float | Tensor | Mapping[str, Tensor], name: str) -> float | Tensor:
    """Looks up the inner learning rate of one parameter.

    Args:
        learning_rate: One for all parameters, or one by name.
        name: The parameter.
    """
    return learning_rate[name] if isinstance(learning_rate, Mapping) else learning_rate


def call(module: nn.Module, params: Params, x: Tensor, support_x: Tensor | None = None) -> Tensor:
    """Calls a module that has a `backbone` with other parameters than its own.

    Where the backbone's norm is `support`, the queries are normalised with the statistics of the support set, for which both
    sets go through together. Every other norm sees `x` alone.

    Args:
        module: The module.
        params: The parameters that take the place of its own, by name.
        x: The items, `[B, ...]`.
        support_x: The support set, `[N*K, ...]`, where `x` are queries.

    Returns:
        The outputs for `x`, `[B, outputs]`.
    """
    if support_x is None or getattr(module.backbone, "norm", None) != "support":
        outputs: Tensor = torch.func.functional_call(module, params, (x,))
        return outputs
    return both_sets(lambda rows, n: torch.func.functional_call(module, params, (rows, n)), support_x, x)[1]


def parameters(module: nn.Module) -> Params:
    """Collects the trainable parameters of a module by name, as `torch.func.functional_call` takes them.

    Args:
        module: The module; parameters without gradients are left out.
    """
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
