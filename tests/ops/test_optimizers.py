"""Optimisers without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from metarun.ops.optimizers import uncompiled

KINDS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {"lr": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.RMSprop, {"lr": 0.1}),
    (torch.optim.Adafactor, {"lr": 0.1}),
]


def descended(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> list[torch.Tensor]:
    """Parameters after steps with two groups and a schedule, between which the optimiser's state is stored and taken again."""
    torch.manual_seed(0)
    one, two = (torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2))

    def made() -> tuple[torch.optim.Optimizer, CosineAnnealingLR]:
        optimizer = kind([{"params": [one]}], **settings)  # type: ignore[call-arg]
        optimizer.add_param_group({"params": [two], "lr": 0.01})
        return optimizer, CosineAnnealingLR(optimizer, 5)

    optimizer, schedule = made()
    for step in range(5):
        if step == 3:
            stored = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = made()
            optimizer.load_state_dict(stored[0])
            schedule.load_state_dict(stored[1])
        optimizer.zero_grad()
        (one.sin().sum() * two.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return [one.detach(), two.detach()]


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=lambda it: getattr(it, "__name__", ""))
def test_it_moves_parameters_as_torch_does_to_the_last_bit(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a schedule that missed the optimiser's steps would say so
        ours = descended(uncompiled(kind), settings)
    for one, other in zip(ours, descended(kind, settings), strict=True):
        assert torch.equal(one, other)


def test_a_closure_is_called_with_gradients_and_the_step_has_none() -> None:
    value = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = uncompiled(torch.optim.SGD)([value], lr=0.25)
    optimizer.zero_grad()

    def closure() -> torch.Tensor:
        loss = value.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert value.item() == 1.0
    assert torch.is_grad_enabled()


def test_what_another_class_says_itself_stays() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return super().step(closure)

    value = torch.nn.Parameter(torch.tensor([2.0]))
    value.grad = torch.ones(1)
    optimizer = uncompiled(Twice)([value], lr=0.25)
    optimizer.step()
    assert value.item() == 1.5
    assert type(optimizer).__name__ == "Twice"


def test_a_run_does_not_import_the_compiler() -> None:
    lines = f"""
import sys
import torch
from metarun.config import construct
from metarun.ops.optimizers import uncompiled
from omegaconf import OmegaConf
value = torch.nn.Parameter(torch.zeros(2))
value.grad = torch.ones(2)
for kind in {[f"{kind.__module__}.{kind.__name__}" for kind, _ in KINDS]}:
    optimizer = construct(OmegaConf.create({{"_target_": kind, "lr": 0.1}}), "train.optimizer", params=[value])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=False)
assert (value < 0).all()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", lines], check=False).returncode == 0
