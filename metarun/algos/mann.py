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

No official code is known to us; compared with tristandeleu/ntm-one-shot. Differences:
- The LSTM sees the features of a backbone that learns with it. The paper's sees 20x20 pixels; backbone=mlp is nearest.
- As there, each head writes to one of the n slots; the equations have each write to all n. Here all n are set to zero
  (there the least used one), and the key is what is written (there a vector of its own).
- Nothing is used, read or stored at first (there: slot 0, and 1e-6). Ties of usage are between slots of equal content.
- `usage_decay` is 0.95 there; a summary of the paper says 0.99. The paper has no `key_strength` on the cosines (1).
- Images are not shifted or turned at random. Labels are one-hot, without the paper's strings of letters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.functional import precise

State = tuple[Tensor, ...]  # memory, cell, hidden, what was read, read weights and usage, each [B, ...]


class MANN(Algorithm):
    """An LSTM of `controller` units with `reads` heads on a memory of `memory_slots` rows of `memory_width` numbers."""

    fixed_ways = True
    whole_batch = True  # the orders of all tasks are one draw, and their sequences one batch
    needs_queries = False
    soft_labels = False  # labels are inputs, too

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        memory_slots: int = 128,
        memory_width: int = 40,
        controller: int = 200,
        reads: int = 4,
        usage_decay: float = 0.95,
        key_strength: float = 1.0,
    ) -> None:
        super().__init__(backbone, spec)
        sizes = [("reads", reads, 1), ("memory_slots", memory_slots, reads), ("memory_width", memory_width, 1)]
        for name, size, least in [*sizes, ("controller", controller, 1), ("key_strength", key_strength, 0)]:
            if size < least:
                raise UserError(f"algo.{name}={size}: must be at least {least}")
        if not 0 <= usage_decay <= 1:
            raise UserError(f"algo.usage_decay={usage_decay}: must be from 0 to 1")
        self.slots, self.reads, self.usage_decay, self.key_strength = memory_slots, reads, usage_decay, key_strength
        words = reads * memory_width  # read in a step
        self.shapes = [(memory_slots, memory_width), (controller,), (controller,), (words,)]  # of the state
        self.shapes += [(reads, memory_slots), (memory_slots,)]
        self.input = nn.Linear(backbone.features + spec.outputs, 4 * controller)
        self.recurrent = nn.Linear(controller + words, 4 * controller, bias=False)
        self.key, self.gate = nn.Linear(controller, words), nn.Linear(controller, reads)
        self.head = nn.Linear(controller + words, spec.outputs)

    def least_used(self, usage: Tensor) -> Tensor:
        """Equation 6, a row a head: `[..., reads, slots]`."""
        slots = usage.topk(self.reads, largest=False).indices
        return (slots[..., None] == torch.arange(self.slots, device=usage.device)).to(usage.dtype)

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """(h_t, r_t) and the next state, of what `input` made of x_t and y_t-1."""
        memory, cell, hidden, read, w_read, usage = state
        forget, enter, leave, new = (inputs + self.recurrent(torch.cat([hidden, read], -1))).chunk(4, -1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        keys = self.key(hidden).tanh().unflatten(-1, (self.reads, -1))
        alpha, least = self.gate(hidden).sigmoid()[..., None], self.least_used(usage)
        w_write = alpha * w_read + (1 - alpha) * least
        memory = memory * (1 - least.sum(-2))[..., None] + w_write.mT @ keys
        lengths = keys.square().sum(-1)[..., None] * memory.square().sum(-1)[..., None, :]
        w_read = (self.key_strength * (keys @ memory.mT) / (lengths + 1e-6).sqrt()).softmax(-1)  # 0 for empty slots
        read = (w_read @ memory).flatten(-2)
        usage = self.usage_decay * usage + (w_read + w_write).detach().sum(-2)
        return torch.cat([hidden, read], -1), (memory, cell, hidden, read, w_read, usage)

    def present(self, features: Tensor, labels: Tensor) -> tuple[Tensor, State]:
        """Logits for every image of sequences `[T, S, ...]`, and the state after the last one."""
        late = F.pad(F.one_hot(labels, self.spec.outputs)[:, :-1], (0, 0, 1, 0)).to(features.dtype)
        outputs, state = [], tuple(features.new_zeros(len(features), *shape) for shape in self.shapes)
        with torch.autocast(features.device.type, enabled=False):
            for inputs in self.input(torch.cat([features, late], -1)).unbind(1):
                output, state = self.step(inputs, state)
                outputs.append(output)
            return self.head(torch.stack(outputs, 1)), state

    def features(self, episodes: Episodes) -> Tensor:
        """Of the support and then of the queries, `[T, N*K + N*Q, features]`."""
        sets = episodes.support_x, episodes.query_x
        return precise(self.over_tasks(lambda s, q: self.backbone(torch.cat([s, q]), len(s)), *sets))

    def mixed(self, episodes: Episodes, order: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of the tasks' images in the order `[T or 1, S]`."""
        labels = torch.cat([episodes.support_y, episodes.query_y], 1).take_along_dim(order, 1)
        return self.present(self.features(episodes).take_along_dim(order[..., None], 1), labels)[0], labels

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = episodes.support_y.shape[1] + episodes.query_y.shape[1]
        order = torch.rand(episodes.n_tasks, images, device=episodes.support_y.device).argsort(1)
        logits, labels = self.mixed(episodes, order)
        return self.task_loss(logits, labels), self.scores(logits, labels)

    def predict(self, episodes: Episodes) -> Tensor:
        features, n_support = self.features(episodes), episodes.support_y.shape[1]
        order = torch.arange(n_support, device=features.device).view(episodes.ways, -1).T.flatten()  # classes in turn
        _, state = self.present(features[:, order], episodes.support_y[:, order])

        def task(queries: Tensor, label: Tensor, *state: Tensor) -> Tensor:
            copies = tuple(part.expand(len(queries), *part.shape) for part in state)
            inputs = self.input(torch.cat([queries, label.expand(len(queries), -1)], -1))
            return self.head(self.step(inputs, copies)[0])

        with torch.autocast(features.device.type, enabled=False):
            last = F.one_hot(episodes.support_y[:, order[-1]], self.spec.outputs).to(features.dtype)
            return self.over_tasks(task, features[:, n_support:], last, *state)

    def measures(self, episodes: Episodes) -> dict[str, Tensor]:
        """The accuracy on the first, second, ... image of a class, in a mixed order, the same for all tasks."""
        sizes = [episodes.support_y.shape[1], episodes.query_y.shape[1]]
        by_class = [part.view(episodes.ways, -1) for part in torch.arange(sum(sizes)).split(sizes)]
        images = torch.cat(by_class, 1)[:, :10].flatten()
        order = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        logits, labels = self.mixed(episodes, order[None].to(episodes.support_y.device))
        return {"acc_by_instance": by_instance(logits.argmax(-1) == labels, labels, episodes.ways)}


def by_instance(right: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The share of `right` `[T, S]` among the first, second, ... images of the classes, `[T, S / ways]`."""
    members = F.one_hot(labels, ways)
    number = (members.cumsum(1) * members).sum(-1)
    return right.float().take_along_dim(number.argsort(dim=1, stable=True), 1).unflatten(1, (-1, ways)).mean(-1)
