"""The mode of a network, training or evaluation, which its dropouts and norms go by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode within; afterwards, and after an error too, back in the mode that it had."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
