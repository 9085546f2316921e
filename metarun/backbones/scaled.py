"""A frozen backbone whose weights are scaled and shifted; see algos/mtl.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import functional_call

from metarun.core import ActivationHook, Backbone


class ScaledBackbone(Backbone):
    """A frozen backbone; its kernels are scaled by 1 + rate * phi, its vectors (biases, a norm's scale) shifted by rate * phi."""

    def __init__(self, frozen: Backbone, rate: float) -> None:
        super().__init__()
        self.frozen, self.rate = frozen.requires_grad_(False), rate
        self.features, self.widths, self.norm = frozen.features, frozen.widths, frozen.norm
        self.channels_last, self.pretrained = frozen.channels_last, frozen.pretrained
        self.name, self.saw = getattr(frozen, "name", type(frozen).__name__), frozen.saw
        self.reads_texts, self.vectorizable, self.draws = frozen.reads_texts, frozen.vectorizable, frozen.draws
        self.phi = nn.ParameterDict()
        for name, value in frozen.named_parameters():
            shape = (*value.shape[:2], *(1 for _ in value.shape[2:]))  # a linear layer has 1x1 kernels
            self.phi[name.replace(".", "_")] = nn.Parameter(value.new_zeros(shape))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.frozen.blocks

    @property
    def whole_blocks(self) -> Sequence[Sequence[nn.Module]]:
        return self.frozen.whole_blocks

    @property
    def token_blocks(self) -> Sequence[nn.Module] | None:
        """Those of a vision transformer."""
        return getattr(self.frozen, "token_blocks", None)

    @property
    def image_size(self) -> int | None:
        """The side that images are resized to, of a backbone that resizes them."""
        return getattr(self.frozen, "image_size", None)

    def weights(self) -> dict[str, Tensor]:
        """The frozen backbone's weights, scaled and shifted."""
        scaled = {}
        for name, value in self.frozen.named_parameters():
            # A change of the weights that was registered later keeps the value that it is made of under another name.
            own = name.replace(".parametrizations.", ".").removesuffix(".original").replace(".", "_")
            if own not in self.phi:
                continue
            change = self.rate * self.phi[own]
            scaled[name] = value * (1 + change) if value.ndim > 1 else value + change
        return scaled

    def forward(self, x: Tensor, n_support: int | None = None, activation_hook: ActivationHook | None = None) -> Tensor:
        self.frozen.channels_last = self.channels_last
        return functional_call(self.frozen, self.weights(), (x, n_support, activation_hook))
