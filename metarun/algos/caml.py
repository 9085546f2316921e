"""CAML: Context-Aware Meta-Learning (Fifty et al. 2024).

https://arxiv.org/abs/2310.10971

In-context learning on image features: a query and its support set are a sequence without order, whose tokens are a feature beside the
encoding of a label; an unknown label, a learned vector, is beside the query. A transformer of full attention reads the sequence, and the
query's own output token is mapped to the logits of the classes:

    tokens:  [f(query) ; u], [f(x_1) ; phi(y_1)], ..., [f(x_S) ; phi(y_S)]

phi is ELMES, an equal-length and maximally equiangular set of vectors: N vectors of unit length, each two with inner
product -1 / (N - 1), turned into the space of label encodings by a random matrix with orthonormal columns, and scaled by a learned number.
The weights of the transformer are trained on tasks of the source's classes.

Differences from the official code (cfifty/CAML):
- Features come into a token of `width - label_width` numbers by a learned linear map; there they are taken as they are, 768 of CLIP, and
  labels have 256. So any feature goes with any width, and the transformer is small: 4 layers of 256 and 4 heads; there 24 of 1024 and 16.
- There the image encoder is pretrained and frozen; here that is `frozen`, or the vectors of an encoder as the data set, and otherwise the
  backbone is trained with the transformer.
- It trains on ImageNet, Fungi, COCO and WikiArt, with 5 ways; here on the source's tasks, with the ways of these.
- The transformer's layers start as PyTorch's linear layers do; there queries, keys, values and hidden layers start Xavier-uniform, and
  the blocks' biases at 0 or within some millionths of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.config.types import PositiveInt
from metarun.core import Algorithm, Backbone, Episodes, Spec
from metarun.errors import UserError
from metarun.ops.numerics import one_hot


class CAML(Algorithm):
    """A transformer that reads a task's features with their labels, and a query. Test tasks have the ways of training.

    Args:
        layers: The blocks of the transformer.
        heads: The heads of attention of a block.
        width: The numbers of a token.
        label_width: The numbers of a token that hold its label.
        hidden: The width of a block's hidden layer.
        frozen: Whether the backbone stays as it is, and the transformer alone is trained.
    """

    fixed_ways = True
    codes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spec: Spec,
        *,
        layers: PositiveInt = 4,
        heads: PositiveInt = 4,
        width: PositiveInt = 256,
        label_width: PositiveInt = 64,
        hidden: PositiveInt = 512,
        frozen: bool = False,
    ) -> None:
        super().__init__(backbone, spec)
        if width % heads:
            raise UserError(f"algo.width={width}: must be a multiple of algo.heads={heads}")
        if not spec.outputs <= label_width < width:
            raise UserError(
                f"algo.label_width={label_width}: must be at least the {spec.outputs} ways, and below algo.width={width}"
            )
        if frozen:
            backbone.requires_grad_(False)
        self.frozen = frozen
        self.project = nn.Linear(backbone.features, width - label_width)
        self.unknown = nn.Parameter(torch.zeros(label_width))
        self.label_scale = nn.Parameter(torch.ones(()))
        self.register_buffer("codes", elmes(spec.outputs, label_width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, spec.outputs, bias=False)

    def train(self, mode: bool = True) -> CAML:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def loss(self, episodes: Episodes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_and_scores(self.predict(episodes), episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        support, queries = (self.project(each) for each in self.embed(episodes))
        labels = self.label_scale * one_hot(episodes.support_y, self.spec.outputs, self.codes.dtype) @ self.codes
        known = torch.cat([support, labels.to(support.dtype)], dim=-1)  # [T, S, width]
        asked = torch.cat([queries, self.unknown.to(queries.dtype).expand(*queries.shape[:2], -1)], dim=-1)
        size = asked.shape[1]
        tokens = torch.cat([asked[:, :, None], known[:, None].expand(-1, size, -1, -1)], dim=2).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens)  # [T Q, 1 + S, width]
        found: Tensor = self.head(self.norm(tokens[:, 0]))
        return found.unflatten(0, (-1, size))


class EncoderBlock(nn.Module):
    """A block of a vision transformer: attention, and a hidden layer, each after a layer norm and beside its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, n, width]` to the same shape."""
        parts = self.attention(self.norms[0](tokens)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.output(read)
        seen: Tensor = tokens + self.hidden(self.norms[1](tokens))
        return seen


def elmes(count: int, width: int) -> Tensor:
    """`count` unit vectors, `[count, width]`, each two with inner product -1 / (count - 1), in a random position.

    Source:
        Fifty et al. (2024), the definition of ELMES.
    """
    simplex = math.sqrt(count / max(count - 1, 1)) * (torch.eye(count) - 1 / count)
    turned, _ = torch.linalg.qr(torch.rand(width, count))
    return simplex @ turned.mT
