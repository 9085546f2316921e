"""MANN: One-shot Learning with Memory-Augmented Neural Networks (Santoro, Bartunov, Botvinick et al. 2016).

https://arxiv.org/abs/1605.06065

An LSTM goes through a task's images in mixed order, told each label one step late: (x_1, null), (x_2, y_1), ... It
classifies each image from its state h_t and from what its heads read of a memory M, each with a key k_t made of h_t:

    w^r_t(i) = softmax_i cos(k_t, M_t(i)),  r_t = sum_i w^r_t(i) M_t(i)     (equations 2 to 4)
    w^u_t = gamma w^u_t-1 + w^r_t + w^w_t                                   (5, the usage, over all heads)
    w^lu_t(i) = 1 where w^u_t(i) is among the n smallest, else 0            (6, n the number of reads)
    w^w_t = sigmoid(alpha) w^r_t-1 + (1 - sigmoid(alpha)) w^lu_t-1          (7)
    M_t(i) = M_t-1(i) + w^w_t(i) k_t                                        (8, least used slots set to zero before)

A training task is one sequence, support and queries alike, and every step counts in the loss. At test the support is
shown with its labels, and each query by itself right after it; `measures` has the paper's accuracy by instance.

Two additions are ours; without them Omniglot stays at chance for minutes: which labels were told least is learned first,
and a key written where it is read hides, by its cosine of 1, the slot it looks for. `queries_apart` trains as is tested.
`late_write` writes a vector of its own (as ntm-one-shot), which starts as the last step's key, of normalised features.
Differences (no official code is known to us; compared with tristandeleu/ntm-one-shot):
- The LSTM sees a backbone's features; there 20x20 pixels (backbone=mlp is nearest), in the paper shifted and turned.
- `usage_decay` is 0.95 there, in a summary of the paper 0.99; `key_strength` (1) and clipping are ours. A head writes to
  one of the n slots, as there (equations: all n); all n are zeroed, not one. Nothing is used at first (there: slot 0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import NonNegativeFloat, PositiveInt, Share
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.batch_norm import Norm, both_sets
from metarun.ops.draws import rand
from metarun.ops.metrics import hits
from metarun.ops.numerics import full_precision, precise
from metarun.ops.support import of_support

State = tuple[Tensor, ...]  # memory, cell, hidden, what was read, read weights and usage, each [B, ...]


class MANN(Algorithm):
    """An LSTM of `controller` units with `reads` heads on a memory of `memory_slots` rows of `memory_width` numbers.

    Args:
        memory_slots: The rows of the memory, at least as many as `reads`.
        memory_width: The numbers of a row.
        controller: The units of the LSTM.
        reads: The heads that read and write.
        usage_decay: What the usage of a row is multiplied by at each step.
        key_strength: The factor of the cosines between a key and the rows.
        late_write: Whether an item is written one step late, together with its label.
        queries_apart: Whether each query is asked alone after the support set.
    """

    fixed_ways = whole_batch = True  # the sequences of all tasks are one batch
    needs_queries = soft_labels = False  # labels are inputs, too

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        memory_slots: PositiveInt = 128,
        memory_width: PositiveInt = 40,
        controller: PositiveInt = 200,
        reads: PositiveInt = 4,
        usage_decay: Share = 0.95,
        key_strength: NonNegativeFloat = 1.0,
        late_write: bool = False,
        queries_apart: bool = False,
    ) -> None:
        super().__init__(backbone, spec)
        if memory_slots < reads:
            raise UserError(f"algo.memory_slots={memory_slots}: must be at least algo.reads={reads}")
        self.slots, self.reads, self.usage_decay, self.key_strength = memory_slots, reads, usage_decay, key_strength
        self.queries_apart, words, unit = queries_apart, reads * memory_width, (controller,)
        self.shapes = [(memory_slots, memory_width), unit, unit, (words,), (reads, memory_slots), (memory_slots,)]
        self.input = nn.Linear(backbone.features + spec.outputs, 4 * controller)
        self.recurrent = nn.Linear(controller + words, 4 * controller, bias=False)
        self.key, self.gate = nn.Linear(controller, words), nn.Linear(controller, reads)
        self.head = nn.Linear(controller + words, spec.outputs)
        self.norm = Norm(backbone.features, backbone.norm if late_write else "none")
        self.written = nn.Linear(controller, words) if late_write else None
        if self.written:
            turn = nn.init.orthogonal_(torch.empty(controller, controller))  # what the next step does to a state
            self.recurrent.weight.data[3 * controller :, :controller] = 3 * turn
            nn.init.normal_(self.input.weight)  # so a label weighs as much as all features together
            self.input.weight.data[:, : backbone.features] *= backbone.features**-0.5
            self.written.weight.data = nn.init.normal_(self.key.weight, std=2 * controller**-0.5).data @ turn.T
            self.input.bias.data[:controller] -= 2  # forget

    def least_used(self, usage: Tensor) -> Tensor:
        """Equation 6, a row a head: `[..., reads, slots]`."""
        return F.one_hot(usage.topk(self.reads, largest=False).indices, self.slots).to(usage.dtype)

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """(h_t, r_t) and the next state, of what `input` made of x_t and y_t-1."""
        memory, cell, hidden, read, w_read, usage = state
        forget, enter, leave, new = (inputs + self.recurrent(torch.cat([hidden, read], -1))).chunk(4, -1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        keys = self.key(hidden).tanh().unflatten(-1, (self.reads, -1))
        written = self.written(hidden).tanh().view_as(keys) if self.written else keys
        alpha, least = self.gate(hidden).sigmoid()[..., None], self.least_used(usage)
        w_write = alpha * w_read + (1 - alpha) * least
        memory = memory * (1 - least.sum(-2))[..., None] + w_write.mT @ written
        lengths = keys.square().sum(-1)[..., None] * memory.square().sum(-1)[..., None, :]
        w_read = (self.key_strength * (keys @ memory.mT) / (lengths + 1e-6).sqrt()).softmax(-1)  # 0 for empty slots
        read = (w_read @ memory).flatten(-2)
        usage = self.usage_decay * usage + (w_read + w_write).detach().sum(-2)
        return torch.cat([hidden, read], -1), (memory, cell, hidden, read, w_read, usage)

    def present(self, features: Tensor, labels: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits for images in sequences `[T, S, ...]`, and the state after; with a state given, `labels` come in time."""
        told, outputs = F.one_hot(labels, self.spec.outputs).to(features.dtype), []
        if state is None:
            told = F.pad(told[:, :-1], (0, 0, 1, 0))
            state = tuple(features.new_zeros(len(features), *shape) for shape in self.shapes)
        with full_precision(features):
            for inputs in self.input(torch.cat([features, told], -1)).unbind(1):
                output, state = self.step(inputs, state)
                outputs.append(output)
            return self.head(torch.stack(outputs, 1)), state

    def normed_features(self, episodes: Episodes) -> Tensor:
        """Of the support and then of the queries, `[T, N*K + N*Q, features]`."""

        def task(support_x: Tensor, query_x: Tensor) -> Tensor:
            return torch.cat(both_sets(lambda x, n: self.norm(self.backbone(x, n), n), support_x, query_x))

        return precise(self.over_tasks(task, episodes.support_x, episodes.query_x))

    def mixed(self, episodes: Episodes, order: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of the tasks' images in the order `[T or 1, S]`."""
        labels = torch.cat([episodes.support_y, episodes.query_y], 1).take_along_dim(order, 1)
        return self.present(self.normed_features(episodes).take_along_dim(order[..., None], 1), labels)[0], labels

    def after(self, episodes: Episodes, order: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of queries each by itself right after the support, which is in the order `[T or 1, S]`."""
        support, queries = self.normed_features(episodes).split([order.shape[1], episodes.query_y.shape[1]], 1)
        labels = episodes.support_y.take_along_dim(order, 1)
        _, state = of_support(lambda: self.present(support.take_along_dim(order[..., None], 1), labels))
        last, *copies = (part.repeat_interleave(queries.shape[1], 0) for part in (labels[:, -1:], *state))
        logits, _ = self.present(queries.flatten(0, 1)[:, None], last, tuple(copies))
        return logits.view(*queries.shape[:2], -1), episodes.query_y

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = episodes.support_y.shape[1] + (0 if self.queries_apart else episodes.query_y.shape[1])
        order = rand(episodes.n_tasks, images, device=episodes.support_y.device).argsort(1)
        logits, labels = self.after(episodes, order) if self.queries_apart else self.mixed(episodes, order)
        return self.loss_and_scores(logits, labels)

    def predict(self, episodes: Episodes) -> Tensor:
        return self.after(episodes, episodes.classes_in_turn()[None])[0]

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """The accuracy on the first, second, ... image of a class, in a mixed order, the same for all tasks.

        Nothing where classes have other numbers of images.
        """
        if episodes.shots or episodes.queries or episodes.divided:
            return {}
        sizes, ways = [y.shape[1] for y in (episodes.support_y, episodes.query_y)], episodes.ways
        images = torch.cat([part.view(ways, -1) for part in torch.arange(sum(sizes)).split(sizes)], 1)[:, :10].flatten()
        order = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        logits, labels = self.mixed(episodes, order[None].to(episodes.support_y.device))
        return {"acc_by_instance": by_instance(hits(logits, labels), labels, ways)}


def by_instance(right: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The share of `right` `[T, S]` among the first, second, ... images of the classes, `[T, S / ways]`."""
    members = F.one_hot(labels, ways)
    number = (members.cumsum(1) * members).sum(-1)
    return right.float().take_along_dim(number.argsort(dim=1, stable=True), 1).unflatten(1, (-1, ways)).mean(-1)
