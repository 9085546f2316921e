"""What wraps any method while it is trained; at test time the method is alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from metarun.core import Algorithm, Backbone, Episodes, Spec


class Wrapper(Algorithm):
    """An algorithm that is another one, `method`, but for its training loss. Subclasses define `loss`.

    Built from the config's `wrapper`, with `method` and `validation`, the sampler of validation tasks, handed in.
    """

    configured_by = "wrapper"

    def __init__(self, method: Algorithm) -> None:
        nn.Module.__init__(self)
        self.method = method
        self.regression = method.regression
        self.fixed_ways = method.fixed_ways
        self.whole_batch = method.whole_batch
        self.needs_queries = method.needs_queries
        self.vectorizable = method.vectorizable
        self.soft_labels = method.soft_labels

    # Properties, so that nothing of the method is registered twice.

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        return self.method.backbone

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        return self.method.spec

    @property
    def vectorize(self) -> bool:
        return self.method.vectorize

    @vectorize.setter
    def vectorize(self, value: bool) -> None:
        self.method.vectorize = value

    @property
    def transductive(self) -> bool:
        return self.method.transductive

    @property
    def test_steps(self) -> int:
        return self.method.test_steps

    def predict(self, episodes: Episodes) -> Tensor:
        return self.method.predict(episodes)

    def predict_after(self, episodes: Episodes, steps: Sequence[int]) -> Tensor:
        return self.method.predict_after(episodes, steps)

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        return self.method.measures(episodes)
