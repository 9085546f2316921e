"""HSML: Hierarchically Structured Meta-learning (Yao, Wei, Huang, Li 2019).

https://arxiv.org/abs/1905.05301

    g = mean of the states of a recurrent encoder over the support pairs, with a decoder that gives them back  (section 4.1)
    p_k = softmax_k(-|g - c_k|^2 / (2 sigma^2)), leaf_k = p_k tanh(W_k g + b_k)                        (equations 5, 6)
    node_i = sum_k softmax_i(w_i leaf_k + b_i) tanh(U_i leaf_k + d_i),  h = sum_i tanh(R node_i + r)    (section 4.2)
    theta_0i = theta_0 * sigmoid(W_theta [g, h] + b_theta), from which the inner steps start            (equation 8)
    L = L_query(theta_i) + embedding_weight * L_reconstruction                                        (equation 10)

MAML from an initialisation that is scaled, weight by weight, for the cluster of tasks that the task belongs to.

Differences from the paper and its official code (huaxiuyao/HSML):
- Images enter the encoder as the features of the backbone, before any adaptation, beside the one-hot label. The official code
  has a convolutional network of its own for that.
- `spread` is the official code's sigma, which stands there for the paper's sigma^2: 2 for functions, 10 for images; its
  `embedding` is 40 and 128. Its runs have 5 inner steps of 0.001 and of 0.01, Adam at 0.001, and 25 and 4 tasks a step.
- The encoder is the recurrent one; the paper also has one that takes means. It reads the support set in its class-major order.
  Its gated unit is PyTorch's, which resets the state after the product with the weights; TensorFlow's does before.
- Clusters do not grow in number while tasks arrive (the paper's continual setting).
- The gates start nearly open, at sigmoid(4), so training begins near MAML's theta_0; the official code's begin half open.
  A norm's scale and shift have gates too, and adapt; there they do neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from metarun.core import Backbone, Episodes, Spec
from metarun.ops.inner_loop import Params, call, parameters
from metarun.ops.numerics import one_hot, precise

POINTS = 20  # the width to which pairs of numbers are brought first, as in the official code
OPEN = 4.0  # added to the gates' scores


def recur(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """One step of a gated recurrent unit, of plain operations, which vmap knows."""
    reset, update, new = F.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, -1)
    h_reset, h_update, h_new = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    keep = torch.sigmoid(update + h_update)
    return (1 - keep) * torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new) + keep * h


class HSML(MAML):
    """MAML with gates for its initialisation; `embedding` is the width of g and h, `leaves` and `nodes` count the clusters.

    Args:
        inner_steps: The gradient steps on a task's support set.
        inner_lr: The inner learning rate, for a mean-reduced loss.
        test_inner_steps: The gradient steps at test time; null is as in training.
        first_order: Whether second derivatives are dropped.
        embedding: The width of g and h; the official code has 40 for functions, 128 for images.
        leaves: The clusters of the first level.
        nodes: The clusters of the second level.
        spread: Half of what squared distances to a centre are divided by; the official code has 10 for images, 2 for
            functions.
        embedding_weight: The weight of the loss of reconstruction.
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
        embedding: PositiveInt = 40,
        leaves: PositiveInt = 4,
        nodes: PositiveInt = 2,
        spread: PositiveFloat = 10.0,
        embedding_weight: NonNegativeFloat = 0.01,
    ) -> None:
        super().__init__(
            backbone,
            spec,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            test_inner_steps=test_inner_steps,
            first_order=first_order,
        )
        weights = parameters(self)
        numbers = spec.kind == "regression"
        pair = spec.input_shape[0] + spec.outputs if numbers else backbone.features + spec.outputs
        self.entry = nn.Linear(pair, POINTS) if numbers else nn.Identity()
        width = POINTS if numbers else pair
        self.encoder, self.decoder = nn.GRUCell(width, embedding), nn.GRUCell(width, embedding)
        self.exit = nn.Linear(embedding, width)
        self.centres = nn.Parameter(torch.randn(leaves, embedding) * embedding**-0.5)
        self.leaves = nn.ModuleList(nn.Linear(embedding, embedding) for _ in range(leaves))
        self.route = nn.Linear(embedding, nodes)
        self.nodes = nn.ModuleList(nn.Linear(embedding, embedding) for _ in range(nodes))
        self.root = nn.Linear(embedding, embedding)
        self.gates = nn.ModuleDict(
            {name.replace(".", "_"): nn.Linear(2 * embedding, value.numel()) for name, value in weights.items()}
        )
        self.spread, self.embedding_weight = spread, embedding_weight

    def represent(self, support_x: Tensor, support_y: Tensor) -> tuple[Tensor, Tensor]:
        """One task's g `[embedding]`, and how far the decoder is from giving back the pairs (scalar)."""
        if self.spec.kind == "regression":
            pairs = self.entry(torch.cat([support_x, support_y], dim=-1))
        else:
            labels = one_hot(support_y, self.spec.outputs)
            pairs = torch.cat([precise(self.backbone(support_x)), labels], dim=-1)
        state, states, given_back = torch.zeros_like(self.root.bias), [], []
        for pair in pairs:
            state = recur(self.encoder, pair, state)
            states.append(state)
        found = torch.zeros_like(pairs[0])
        for _ in pairs:
            state = recur(self.decoder, found, state)
            found = self.exit(state)
            given_back.append(found)
        reconstruction = F.mse_loss(torch.stack(given_back[::-1]), pairs)  # the last is given back first
        return torch.stack(states).mean(0), reconstruction

    def assignment(self, g: Tensor) -> Tensor:
        """The shares of the leaves in a task, `[leaves]`."""
        return (-(g - self.centres).square().sum(-1) / (2 * self.spread)).softmax(0)

    def climb(self, g: Tensor) -> Tensor:
        """h `[embedding]`, what the tree of clusters says of a task."""
        leaves = torch.stack([torch.tanh(leaf(g)) for leaf in self.leaves]) * self.assignment(g)[:, None]
        routes = self.route(leaves).softmax(-1)  # [leaves, nodes]
        nodes = [(routes[:, i, None] * torch.tanh(node(leaves))).sum(0) for i, node in enumerate(self.nodes)]
        return torch.tanh(self.root(torch.stack(nodes))).sum(0)

    def begin(self, support_x: Tensor, support_y: Tensor) -> tuple[Params, Tensor]:
        """One task's gated initialisation, and the loss of its embedding."""
        g, reconstruction = self.represent(support_x, support_y)
        told = torch.cat([g, self.climb(g)])
        weights = {name: value for name, value in parameters(self).items() if name.startswith(("backbone.", "head."))}
        gates = {name: torch.sigmoid(OPEN + precise(self.gates[name.replace(".", "_")](told))) for name in weights}
        return {name: value * gates[name].view(value.shape) for name, value in weights.items()}, reconstruction

    def adapt_from(self, weights: Params, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """As `adapt`, from a gated initialisation."""
        return self.inner.adapt(
            lambda params: self.task_loss(call(self, params, support_x), support_y),
            weights,
            steps,
        )

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        return self.adapt_from(self.begin(support_x, support_y)[0], support_x, support_y, steps)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Tensor, ...]:
            weights, reconstruction = self.begin(support_x, support_y)
            (adapted,) = self.adapt_from(weights, support_x, support_y, [self.inner.steps])
            prediction = call(self, adapted, query_x, support_x)
            return self.task_loss(prediction, query_y), reconstruction, prediction.detach()

        losses, reconstruction, predictions = self.over_tasks(task, *episodes.tensors)
        shown = {"reconstruction": reconstruction.mean().detach(), **self.scores(predictions, episodes.query_y)}
        return losses.mean() + self.embedding_weight * reconstruction.mean(), shown
