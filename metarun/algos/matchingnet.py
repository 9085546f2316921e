"""MatchingNet: Matching Networks for One Shot Learning (Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016).

https://arxiv.org/abs/1606.04080

    P(y | x, S) = sum_i a(x, x_i) y_i                                                         (equation 1)
    a(x, x_i) = softmax_i(s * cosine(f(x), g(x_i)))                                           (section 2.1.1)

With `full_context` the embeddings f', g' of the backbone are changed by the support set S (section 2.1.2, appendix
A):

    hat h_k, c_k = LSTM(f'(x), [h_k-1, r_k-1], c_k-1),  h_k = hat h_k + f'(x)                 (equations 3, 4)
    r_k-1 = sum_i softmax_i(h_k-1 . g(x_i)) g(x_i),  f(x, S) = h_K                            (equations 5, 6)
    g(x_i, S) = forward h_i + backward h_i + g'(x_i),  h of a bidirectional LSTM over the g'  (A.2)

No official code is known to us. Checked against CloserLookFewShot (wyharveychen) and few-shot (oscarknagg).
Differences:
- The scale s, which is 1 in the paper: cosines lie in [-1, 1], so even a query that equals its support image and is
  opposite to all others gets only e / (e + (N - 1) / e), 0.65 of 5 ways and 0.11 of 60: the loss cannot fall and
  training is slow (few-shot reports 92% on Omniglot). CloserLookFewShot takes 100, the default here; it also cuts
  negative cosines off, which is not done here. Found on Omniglot, 60 ways, 300 steps, validation: 91.4% with 100,
  93.4% with 10, 94.8% with 10 and full context.
- f' and g' are one backbone. The paper does not say what K is; few-shot takes 2, CloserLookFewShot one step for each
  support image. Both start from h_0 = f'(x) and c_0 = 0, as here. The support set goes through its LSTM in the order of
  the episode, way by way.
- LSTM(f', [h, r], c) is a cell that reads [f', r] and has the state h: the same sums with the columns in another
  order. (few-shot adds h and r instead.)
- No fine-tuning on the support set at test time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import PositiveFloat, PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.ops.numerics import full_precision


class FullContext(nn.Module):
    """Embeddings of support sets `[T, N*K, D]` and queries `[T, N*Q, D]`, made to depend on the support set."""

    def __init__(self, features: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.support = nn.LSTM(features, features, batch_first=True, bidirectional=True)
        self.query = nn.LSTMCell(2 * features, features)

    def forward(self, support: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        forwards, backwards = self.support(support)[0].chunk(2, dim=-1)
        support = support + forwards + backwards
        hidden, cell = queries, torch.zeros_like(queries).flatten(0, 1)
        for _ in range(self.steps):
            read = (hidden @ support.mT).softmax(-1) @ support
            state, cell = self.query(torch.cat([queries, read], dim=-1).flatten(0, 1), (hidden.flatten(0, 1), cell))
            hidden = queries + state.view_as(queries)
        return support, hidden


class MatchingNet(Algorithm):
    """Classifies a query by attention over the support images. Train and test ways may differ.

    Args:
        scale: The factor of the cosines; 1 is the paper's, 100 learns faster.
        full_context: Whether the support set changes the embeddings.
        processing_steps: The steps of attention that embed a query, with full_context.
    """

    metric = True
    recordable = True

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        scale: PositiveFloat = 100.0,
        full_context: bool = False,
        processing_steps: PositiveInt = 2,
    ) -> None:
        super().__init__(backbone, spec)
        self.scale = scale
        self.context = FullContext(backbone.features, processing_steps) if full_context else None

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Embeddings of the support sets `[T, N*K, D]` and of the queries `[T, N*Q, D]`."""
        support, queries = super().embed(episodes)
        if self.context is None:
            return support, queries
        with full_precision(queries):
            return self.context(support, queries)

    def log_attention(self, episodes: Episodes) -> Tensor:
        """The logarithm of each query's attention to the support images, `[T, N*Q, N*K]`."""
        support, queries = (F.normalize(x, dim=-1) for x in self.embed(episodes))
        with full_precision(queries):
            return (self.scale * queries @ support.mT).log_softmax(-1)

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        """Log-probabilities: of each class the attention to all of its support images."""
        attention = self.log_attention(episodes)[..., None]
        others = episodes.support_y[:, None, :, None] != torch.arange(episodes.ways, device=attention.device)
        return attention.masked_fill(others, -torch.inf).logsumexp(2)
