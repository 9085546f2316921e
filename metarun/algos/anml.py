"""ANML: Learning to Continually Learn (Beaulieu et al. 2020).

https://arxiv.org/abs/2002.09571

    f(x) = sigmoid(G h(x)) * g(x)      a second network h says which features of g take part, and so which weights learn
    a trajectory: images of one class; inner steps of g and of the head, one for each image; h is fixed
    the outer loss, of all weights: on the trajectory's images and on images of all classes

At test time all but the head is fixed, and the head is new.

As in the official code (uvm-neurobotics-lab/ANML): a trajectory is of one class, the inner rate is 0.1, Adam's 0.001, 64 images are to
be remembered, the rows of a trajectory's class are drawn anew before it, and inner gradients are constants
(`first_order`). Differences:
- h has the architecture of the backbone, with weights of its own; the official one is narrower (112 channels against 256).
- The official code normalises each image by its own statistics alone (batch normalisation of batches of one);
  `backbone.norm=group`, the YAML's, does so for groups of channels.
- The official trajectory is all 20 images of a class, and the outer loss is measured on these again; the YAML's is 10, and the
  outer loss is measured on the other 10 too.
- `adapt_body=false`, the YAML's, leaves inner steps to the head, as OML does, which is many times as fast.
- What else differs is as in OML (`metarun/algos/oml.py`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from metarun.algos.oml import OML
from metarun.config.types import NonNegativeFloat, NonNegativeInt
from metarun.core import Backbone, Episodes, Spec
from metarun.ops.inner_loop import Params, gradient
from metarun.ops.numerics import precise
from metarun.ops.online import with_new_rows

GATE = ("modulation.", "gate.")  # what the names of the neuromodulatory network's weights begin with


class ANML(OML):
    """OML whose features are gated by a second network. Test ways may be any.

    Args:
        inner_lr: The learning rate of inner steps, for the cross-entropy of one image.
        test_inner_lr: That of the head at test time; null is as in training.
        remembered: The images of all training classes that the outer loss is measured on, beside those of the trajectory.
        reset: Whether the rows of a trajectory's classes are drawn anew before it.
        replayed: Whether the outer loss is measured on the images of the trajectory too.
        adapt_body: Whether inner steps move the gated network too, and not its head alone.
        first_order: Whether the gradients of inner steps are constants, where these move the network.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_lr: NonNegativeFloat = 0.1,
        test_inner_lr: NonNegativeFloat | None = None,
        remembered: NonNegativeInt = 64,
        reset: bool = True,
        replayed: bool = True,
        adapt_body: bool = True,
        first_order: bool = True,
    ) -> None:
        super().__init__(
            backbone, spec, inner_lr=inner_lr, test_inner_lr=test_inner_lr, remembered=remembered, reset=reset
        )
        self.replayed, self.adapt_body, self.first_order = replayed, adapt_body, first_order
        self.modulation = copy.deepcopy(backbone)
        for module in self.modulation.modules():
            if callable(anew := getattr(module, "reset_parameters", None)):
                anew()
        self.gate = nn.Linear(backbone.features, backbone.features)

    def features_of(self, x: Tensor, n_support: int | None = None) -> Tensor:
        gate = self.gate(precise(self.modulation(x, n_support))).sigmoid()
        return precise(self.backbone(x, n_support)) * gate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features_of(x))

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.replayed:
            episodes = Episodes(
                episodes.support_x,
                episodes.support_y,
                torch.cat([episodes.query_x, episodes.support_x], 1),
                torch.cat([episodes.query_y, episodes.support_y], 1),
                episodes.ways,
            )
        if not self.adapt_body:
            return super().loss(episodes, step)
        trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
        fixed = {name: value for name, value in trained.items() if name.startswith(GATE)}
        inner: Params = {name: value for name, value in trained.items() if name not in fixed}

        def logits(params: Params, x: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(self, {**fixed, **params}, (x,))
            return found

        def task(support_x: Tensor, support_y: Tensor, query_x: Tensor, rows: Tensor) -> Tensor:
            params: Params = {**inner}
            if self.reset:
                params["head.weight"] = with_new_rows(params["head.weight"], support_y, rows)
            for place in range(len(support_y)):
                x, y = support_x[place : place + 1], support_y[place : place + 1]
                found = gradient(
                    lambda p, x=x, y=y: self.task_loss(logits(p, x), y),  # type: ignore[misc]
                    params,
                    create_graph=torch.is_grad_enabled() and not self.first_order,
                )
                params = {name: value - self.inner_lr * found[name] for name, value in params.items()}
            return precise(logits(params, query_x))

        found = self.over_tasks(task, *episodes.tensors[:3], self.new_rows(episodes))
        return self.loss_and_scores(found, episodes.query_y)
