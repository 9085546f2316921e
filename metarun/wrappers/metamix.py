"""MetaMix: Improving Generalization in Meta-learning via Task Augmentation (Yao et al. 2021).

https://arxiv.org/abs/2007.13040

    X_mix = lambda X_query + (1 - lambda) X_support, at the input or at a hidden layer drawn anew each time
    L = L(X_mix, lambda Y_query + (1 - lambda) Y_support),   lambda ~ Beta(alpha, alpha)    (section 4.1)

The inner loop is left alone; the outer loss is that of mixed queries, at the layers below the mixture with the adapted weights.

Differences from the paper and its official code (huaxiuyao/MetaMix):
- Each query is mixed with any support example, drawn with replacement. The official code permutes the support set, which
  there is as large as the query set.
- Mixture weight, layer and partners are drawn once a step, for all of its tasks.
- The loss is that of mixed labels. The official code mixes two losses instead, which for the cross-entropy is the same.
- Queries and their partners go through the lower layers as one set, so they share the statistics of `norm=batch` there.
- `alpha` is the official code's 2 for images; for the regression of poses it has 0.5.
- The paper's other augmentation, channel shuffle, is not here; the official runs have it in half of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from metarun.config.types import Len, NonNegativeInt, PositiveFloat
from metarun.core import Algorithm, Episodes, TaskShape, largest
from metarun.data.source import EpisodeSampler
from metarun.errors import UserError
from metarun.ops.draws import of_the_step
from metarun.ops.numerics import one_hot
from metarun.text import listed
from metarun.wrappers.base import Wrapper


class MetaMix(Wrapper):
    """Trains a method on queries mixed with its support examples.

    Args:
        alpha: Both parameters of the Beta distribution that the share of the query is drawn from.
        layers: The places to mix at: 0 is the input and i the input of block i of the backbone; null is all.
    """

    def __init__(
        self,
        method: Algorithm,
        validation: EpisodeSampler,
        *,
        alpha: PositiveFloat = 2.0,
        layers: Annotated[list[NonNegativeInt], Len(1)] | None = None,
    ) -> None:
        super().__init__(method)
        if not method.soft_labels:
            raise UserError(
                f"wrapper=metamix: {type(method).__name__} takes no mixed labels of queries; leave out wrapper="
            )
        if method.backbone.reads_texts:
            raise UserError(
                "wrapper=metamix: mixes items, but this backbone reads texts, whose word pieces have numbers that mean no place; add "
                "encoder=minilm or encoder=tfidf, or leave the wrapper out"
            )
        # The input of the first block is the input of a backbone that has none.
        known = list(range(max(len(method.backbone.blocks), 1)))
        self.layers = known if layers is None else list(layers)
        if not set(self.layers) <= set(known):
            raise UserError(f"wrapper.layers={layers}: the backbone has {listed(known)}; null is all of them")
        self.alpha = alpha

    def check_tasks(self, task: TaskShape, test_task: TaskShape) -> None:
        if self.layers == [0]:
            return
        if task.varies:
            raise UserError(
                f"wrapper.layers={self.layers}: above the input MetaMix tells the queries of a task by the size of its sets, and "
                "tasks differ in it; add wrapper.layers=[0]"
            )
        support, queries = largest(task.ways) * largest(task.shots), largest(task.ways) * largest(task.queries)
        unlabelled = (largest(task.ways) + task.distractors) * task.unlabelled if self.method.uses_unlabelled else 0
        if support == 2 * queries + unlabelled:
            raise UserError(
                f"train.task.queries={largest(task.queries)}: MetaMix tells the queries of a task, with their partners, by the size of "
                f"their set, and the support set is as large ({support} items); choose another number, or add wrapper.layers=[0]"
            )

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        n_support, n_query = episodes.support_x.shape[1], episodes.query_x.shape[1]
        episodes = replace(episodes, queries=None)  # a mixed query is of two classes
        with of_the_step():
            share = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
            layer = self.layers[int(torch.randint(len(self.layers), ()))]
            partner = torch.randint(n_support, (n_query,)).to(episodes.query_x.device)
        support_x = episodes.support_x[:, partner]
        labels = [self.soft(y, episodes.ways) for y in (episodes.query_y, episodes.support_y[:, partner])]
        query_y = share * labels[0] + (1 - share) * labels[1]
        if layer == 0:
            query_x = share * episodes.query_x + (1 - share) * support_x
            return self.method.loss(replace(episodes, query_x=query_x, query_y=query_y), step)
        query_x = torch.cat([episodes.query_x, support_x], dim=1)
        unlabelled = episodes.unlabelled_x if self.method.uses_unlabelled else None
        after = 0 if unlabelled is None else unlabelled.shape[1]  # they go through the backbone with the queries
        sizes = {2 * n_query + after, n_support + 2 * n_query + after}
        with self._mixing(layer, n_query, after, sizes, share):
            return self.method.loss(replace(episodes, query_x=query_x, query_y=query_y), step)

    def soft(self, y: Tensor, ways: int) -> Tensor:
        """Labels as probabilities; the targets of a regression as they are."""
        return y if self.method.spec.kind == "regression" else one_hot(y, ways)

    @contextmanager
    def _mixing(self, layer: int, queries: int, after: int, sizes: set[int], share: float) -> Iterator[None]:
        """Mixes, before block `layer`, `queries` rows into as many before them, in batches of one of the `sizes`.

        The last `after` rows stay as they are.
        """

        def mix(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x, *more = inputs
            if len(x) not in sizes:
                return None
            other, query, support, rest = x.split([len(x) - 2 * queries - after, queries, queries, after])
            return torch.cat([other, share * query + (1 - share) * support, rest]), *more

        handle = self.method.backbone.blocks[layer].register_forward_pre_hook(mix)
        try:
            yield
        finally:
            handle.remove()
