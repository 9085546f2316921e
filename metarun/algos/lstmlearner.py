"""LSTM meta-learner: Optimization as a Model for Few-Shot Learning (Ravi, Larochelle 2017).

https://openreview.net/forum?id=rJY0-Kcll

    theta_t = f_t * theta_t-1 - i_t * grad_t,   grad_t = grad_theta L_t(theta_t-1)      (an LSTM's cell, section 3.1)
    i_t = sigmoid(W_I [h_t, theta_t-1, i_t-1] + b_I),   f_t = sigmoid(W_F [h_t, theta_t-1, f_t-1] + b_F)
    h_t = LSTM([(grad_t), (L_t)], h_t-1),   (x) = (log |x| / p, sgn x) where |x| >= e^-p, else (-1, e^p x),   p = 10

The learner's parameters are the cell state of an LSTM whose candidate is minus their gradient: the input gate is a learning
rate and the forget gate a decay, for every coordinate and step. All coordinates share W, b and the LSTM before the gates, but
each has its own state (section 3.2). theta_0 is learned too. The meta-gradient is that of the queries' loss after the
last step, with every grad_t and L_t taken as a constant. With f = 1 and i = alpha it is gradient descent at rate alpha.

Batch norm as in section 3.4: statistics of the support set for the queries at test time, nothing kept between tasks: that is
`norm=support`, the default of its YAML.

Differences from the paper and its official code (twitter-research/meta-learning-lstm):
- The official code normalises the queries of a training task with their own statistics and those of a test task with a
  running average over the steps (weight 0.9 on the newest, 5-shot 0.95), which ends with theta_T-1; here both have
  those of the support set at theta_T.
- It divides the gradient of the mean loss by the size of the batch once more. Here it is the gradient of the mean.
- It feeds back the gates before their sigmoid; here the gates, as in the paper's equations, with zeros for the first.
- It draws b_F from [4, 5] and b_I from [-5, -4], for a start near gradient descent at a small rate; here they start at the
  middle, which are settings: a rate of 0.011 grows slowly, and `input_bias=0` (0.5) is better for a training of minutes.
- `inner_steps` are the 12 passes of its 1-shot config; its 5-shot config has 8. Each step sees the whole support set.
- theta_0 starts as MAML's does here, with a head near zero; there as torch's layers do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.algos.maml import MAML
from metarun.config.types import NonNegativeInt, PositiveInt
from metarun.core import Backbone, Spec
from metarun.ops.inner_loop import Params, call, gradient_and_value, parameters
from metarun.ops.numerics import precise

LOG_RANGE = 10.0  # p
State = tuple[Tensor, Tensor]


def preprocess(x: Tensor) -> Tensor:
    """`[2, n]` of `[n]`: the size of each number as a logarithm, and its sign; both are continuous at |x| = e^-p."""
    size = x.abs().clamp(min=math.exp(-LOG_RANGE)).log() / LOG_RANGE
    return torch.stack([size, (x * math.exp(LOG_RANGE)).clamp(-1, 1)])


def unflatten(flat: Tensor, like: Params) -> Params:
    """`[n]` as tensors of the names and shapes of `like`."""
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def support_gradient(method: MAML, like: Params, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the loss on a support set.

    Args:
        method: Whose loss and network they are.
        like: Tensors of the names and shapes of the weights.
        theta: The weights, flat, `[n]`.
        x: The support set, `[N*K, ...]`.
        y: Its labels, int64 `[N*K]`, or values.

    Returns:
        The gradient `[n]`, and the loss, a scalar; both are constants.
    """

    def loss(params: Params) -> Tensor:
        return method.task_loss(call(method, unflatten(params["theta"], like), x), y)

    gradients, value = gradient_and_value(loss, {"theta": theta.detach()}, create_graph=False)
    return gradients["theta"], value


class CoordinateLSTM(nn.Module):
    """An LSTM cell of one set of weights for n coordinates: `[inputs, n]` and a state, two `[hidden, n]`, to the next state."""

    def __init__(self, inputs: int, hidden: int, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)  # input, forget, output, candidate
        self.gates.bias.data[hidden : 2 * hidden] += forget_bias

    def forward(self, x: Tensor, state: State | None) -> State:
        output, cell = state or (x.new_zeros(self.hidden, x.shape[1]),) * 2
        # Coordinates last: on a CPU each gate is then one contiguous block.
        total = precise(self.gates.weight @ torch.cat([x, output])) + self.gates.bias[:, None]
        write, forget, show, candidate = total.chunk(4)
        cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
        return show.sigmoid() * cell.tanh(), cell


class LSTMMetaLearner(MAML):
    """Learns an initialisation and, as the gates of an LSTM, how far each weight moves in each of `inner_steps`.

    Args:
        inner_steps: The updates on a task's support set; the official config has 12 for 1-shot and 8 for 5-shot
            tasks.
        test_inner_steps: The updates at test time; null is as in training.
        hidden: The units of the LSTM before the gates.
        forget_bias: Where the bias of the forget gate starts.
        input_bias: Where the bias of the input gate starts.
    """

    recordable = False

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        inner_steps: PositiveInt = 12,
        test_inner_steps: NonNegativeInt | None = None,
        hidden: PositiveInt = 20,
        forget_bias: float = 4.5,
        input_bias: float = -4.5,
    ) -> None:
        super().__init__(backbone, spec, inner_steps=inner_steps, test_inner_steps=test_inner_steps, first_order=True)
        self.lstm = CoordinateLSTM(4, hidden)
        self.gates = nn.Linear(hidden + 2, 2)  # forget, input
        for weights in (*self.lstm.parameters(), self.gates.weight):
            nn.init.uniform_(weights, -0.01, 0.01)
        self.gates.bias.data = torch.tensor([float(forget_bias), float(input_bias)])

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: Sequence[int]) -> list[Params]:
        """One task's parameters after each of the numbers of inner steps in `steps`."""
        learner = {name: value for name, value in parameters(self).items() if not name.startswith(("lstm.", "gates."))}
        theta = torch.cat([value.flatten() for value in learner.values()])
        of_output, of_theta, of_gates = self.gates.weight.split([self.lstm.hidden, 1, 1], dim=1)
        gates, state = theta.new_zeros(2, len(theta)), None
        kept = {0: theta}
        for step in range(1, max(steps) + 1):
            gradient, loss = support_gradient(self, learner, theta, support_x, support_y)
            state = self.lstm(torch.cat([preprocess(gradient), preprocess(loss[None]).expand(2, len(theta))]), state)
            total = precise(of_output @ state[0]) + of_theta * theta + of_gates * gates + self.gates.bias[:, None]
            gates = total.sigmoid()
            theta = gates[0] * theta - gates[1] * gradient
            if step in steps:
                kept[step] = theta
        return [unflatten(kept[step], learner) for step in steps]
