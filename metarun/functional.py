"""Tasks and inner steps: the only place that knows a loop from `vmap`, and a first-order from a second-order step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]

_vectorized: ContextVar[bool] = ContextVar("vectorized", default=False)


def vectorized() -> bool:
    """Whether the caller runs under `over_tasks(..., vectorize=True)`, where tensors carry a hidden task axis."""
    return _vectorized.get()


@contextmanager
def _inside_vmap() -> Iterator[None]:
    token = _vectorized.set(True)
    try:
        yield
    finally:
        _vectorized.reset(token)


def _stack(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    if isinstance(first, Mapping):
        return {key: _stack([result[key] for result in results]) for key in first}
    return type(first)(_stack(list(items)) for items in zip(*results, strict=True))


def over_tasks(function: Callable[..., Any], *tensors: Tensor, vectorize: bool = False) -> Any:
    """`function(*(tensor[t] for tensor in tensors))` for every task t, its results stacked along a new first axis.

    A Python loop, or one `vmap`: the same values up to float order. On a CPU the loop is faster for convolutions and
    `vmap` for small MLPs; on a GPU the loop is bound by kernel launches. `function` returns a tensor, or a dict or
    tuple of tensors. Random numbers differ between tasks in both forms.
    """
    if vectorize:
        with _inside_vmap():
            return torch.func.vmap(function, randomness="different")(*tensors)
    return _stack([function(*task) for task in zip(*tensors, strict=True)])


def gradient(loss: Callable[[Params], Tensor], params: Params, *, create_graph: bool) -> Params:
    """d loss / d params. With `create_graph` the result can be differentiated again; without, no such graph is built."""
    return gradient_and_value(loss, params, create_graph=create_graph)[0]


def gradient_and_value(
    loss: Callable[[Params], Tensor], params: Params, *, create_graph: bool
) -> tuple[Params, Tensor]:
    """`gradient`, and the detached loss itself."""
    if vectorized():
        with torch.set_grad_enabled(create_graph and torch.is_grad_enabled()):
            gradients, value = torch.func.grad_and_value(loss)(params)
        return dict(gradients), value.detach()
    with torch.enable_grad():
        if not create_graph:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        value = loss(params)
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=create_graph)
    return dict(zip(params, gradients, strict=True)), value.detach()


def adapt(
    loss: Callable[[Params], Tensor],
    params: Params,
    *,
    steps: Sequence[int],
    learning_rate: float | Tensor | Mapping[str, Tensor],
    first_order: bool = False,
) -> list[Params]:
    """Gradient descent from `params` on `loss`: theta_k+1 = theta_k - learning_rate * d loss / d theta_k.

    Second order: the result is differentiable through every step (MAML). First order: no graph of the inner gradients
    is built, and the result's derivative with respect to `params` is the identity (FOMAML, section 5.2 of the MAML
    paper). Under `torch.no_grad()` neither keeps a graph. Returns the parameters after each of the numbers of steps in
    `steps`, of which the largest is the number of steps taken.
    """
    second_order = torch.is_grad_enabled() and not first_order
    current = params if second_order else {name: value.detach() for name, value in params.items()}
    kept = {0: current}
    for step in range(1, max(steps) + 1):
        gradients = gradient(loss, current, create_graph=second_order)
        current = {name: value - rate(learning_rate, name) * gradients[name] for name, value in current.items()}
        kept[step] = current if step in steps else {}
    if torch.is_grad_enabled() and first_order:
        return [straight_through(params, kept[step]) for step in steps]
    return [kept[step] for step in steps]


def rate(learning_rate: float | Tensor | Mapping[str, Tensor], name: str) -> float | Tensor:
    """The inner learning rate of one parameter."""
    return learning_rate[name] if isinstance(learning_rate, Mapping) else learning_rate


def straight_through(params: Params, adapted: Params) -> Params:
    """Exactly the values of `adapted`, with the identity as derivative with respect to `params`."""
    return {name: adapted[name].detach() + (value - value.detach()) for name, value in params.items()}


def call(module: nn.Module, params: Params, x: Tensor, support_x: Tensor | None = None) -> Tensor:
    """`module(x)` with `params` in place of its own, for a module with a `backbone`.

    Where the backbone's norm is `support`, the queries `x` are normalised with the statistics of `support_x`, for which
    both sets go through together. Every other norm sees `x` alone.
    """
    if support_x is None or getattr(module.backbone, "norm", None) != "support":
        return torch.func.functional_call(module, params, (x,))
    return torch.func.functional_call(module, params, (torch.cat([support_x, x]), len(support_x)))[len(support_x) :]


def precise(x: Tensor) -> Tensor:
    """`x` in single precision at least: losses, distances and sums of squares lose too much in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def parameters(module: nn.Module) -> Params:
    """The trainable parameters of a module by name, as `torch.func.functional_call` takes them."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def linear_head(features: int, outputs: int, std: float = 0.01) -> nn.Linear:
    """A linear layer with truncated-normal weights (two standard deviations) and zero bias, as in the MAML code."""
    head = nn.Linear(features, outputs)
    nn.init.trunc_normal_(head.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(head.bias)
    return head
