"""The mode that a network is in while something is found out with it."""

from __future__ import annotations

import pytest
from torch import nn

from metarun.ops.modes import evaluating


@pytest.mark.parametrize("training", [True, False])
def test_a_network_has_its_mode_back_after_it_was_evaluated_and_after_an_error_too(training: bool) -> None:
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2))).train(training)

    def modes() -> set[bool]:
        return {part.training for part in network.modules()}

    with evaluating(network):
        assert modes() == {False}
    assert modes() == {training}
    with pytest.raises(ValueError, match="no"), evaluating(network):
        raise ValueError("no")
    assert modes() == {training}
