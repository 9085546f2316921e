"""Every image a class of its own: UMTRA (Khodadadeh, Boloni, Shah 2019) and ProtoCLR of ProtoTransfer (Medina et al. 2020).

https://arxiv.org/abs/1811.11819, https://arxiv.org/abs/2006.11325

    N images are drawn at random from all training images and are the N classes of a task.
    The support example of a class is the image itself, its queries are the image distorted at random.

UMTRA argues that N of very many images are mostly of different classes (its section 3). ProtoCLR is the same with a large N
(50) and several queries (3) of each image. Settings of the distortions are those of the official codes for Omniglot:
`conf/unsupervised/umtra.yaml` and `prototransfer.yaml`; `_photos` are in their manner for photographs, with numbers of our own.

Differences from the papers and their official codes (siavash-khodadadeh/UMTRA-Release, indy-lab/ProtoTransfer):
- A task with more shots than one has distorted images as its further shots. UMTRA trains with one shot only.
- Where the data set counts rotated images as further classes, an image and the same image turned are two classes.
- UMTRA's code shifts by up to 6 of 28 pixels, to the nearest pixel; here by up to a fifth of the side (5.6), between pixels
  (bilinear), so that strokes are blurred.
- A crop whose window is larger than the image shrinks it; in the official code of ProtoTransfer such a crop is drawn again.
- The papers' distortions of hue and saturation are not here; a share of the images turns grey instead.
- ProtoTransfer trains on the validation images of Omniglot too (`--merge_train_val`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch

from metarun.config.types import DropRate, Ge, Interval, Len, PositiveFloat, Share
from metarun.core import Episodes, TaskShape
from metarun.data.image_batches import generator
from metarun.data.sampler import distinct, uniforms
from metarun.data.source import DataSource, EpisodeSampler, Split
from metarun.errors import UserError
from metarun.unsupervised.base import PseudoTasks
from metarun.unsupervised.distortions import Distortions


class Instances(PseudoTasks):
    """Tasks whose classes are single images; queries are distorted copies.

    Args:
        validation: What the weights are selected on: made-up tasks of the validation images, or the labels of these.
        distort_support: Whether the first shot is distorted too, instead of the image itself.
        shift: The largest shift along each axis, as a part of the image's side.
        degrees: The largest turn to either side, in degrees.
        area: The smallest and the largest share of the image that a random crop takes; above 1 the image shrinks.
        stretch: The largest ratio of the sides of a crop.
        flip: Whether half of the distorted images are mirrored left to right.
        flip_vertical: Whether half of the distorted images are mirrored top to bottom.
        zeroed: The share of the pixels that is set to 0.
        rescaled: Whether the other pixels are divided by 1 - zeroed, as dropout does.
        erased: The share of the distorted images of which a rectangle is set to 0.
        brightness: The most that all pixels are multiplied by, less 1.
        contrast: The most that the distances from an image's mean are multiplied by, less 1.
        grey: The share of colour images that lose their colours.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        validation: Literal["pseudo", "labels"] = "pseudo",
        distort_support: bool = False,
        shift: Share = 0.0,
        degrees: Annotated[float, Interval(ge=0, le=180)] = 0.0,
        area: Annotated[list[PositiveFloat], Len(2, 2)] | None = None,
        stretch: Annotated[float, Ge(1)] = 1.0,
        flip: bool = False,
        flip_vertical: bool = False,
        zeroed: DropRate = 0.0,
        rescaled: bool = False,
        erased: Share = 0.0,
        brightness: Share = 0.0,
        contrast: Share = 0.0,
        grey: Share = 0.0,
    ) -> None:
        super().__init__(source, validation)
        if self.item != "image":
            raise UserError(f"unsupervised: distorts images, but the items are {self.item}s; take unsupervised=cactus")
        low, high = area or (1.0, 1.0)
        if low > high:
            raise UserError(f"unsupervised.area=[{low},{high}]: the smallest share is above the largest")
        self.distort_support = distort_support
        self.distortions = Distortions(
            shift=shift,
            degrees=degrees,
            area=(low, high),
            stretch=stretch,
            flip=flip,
            flip_vertical=flip_vertical,
            zeroed=zeroed,
            rescaled=rescaled,
            erased=erased,
            brightness=brightness,
            contrast=contrast,
            grey=grey,
        )
        if self.distortions == Distortions():
            raise UserError(
                "unsupervised: nothing distorts the images, so that a query is its own support example; set "
                "unsupervised.shift=0.2, say"
            )

    def how(self) -> dict[str, Any]:
        return {"classes": "single images", "distortions": self.distortions.describe()}

    def pseudo_sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        pool, turned = self.pool(split), self.turns
        ways, shots, queries = task.numbers
        if len(pool) * turned < ways:
            raise UserError(
                f"{'train' if split == 'train' else 'test'}.task.ways={ways}: is above the {len(pool) * turned} images of "
                f"the {split} split, each of which is a class"
            )
        read = self.reader(device)
        copies = shots + queries
        untouched = 0 if self.distort_support else 1
        labels = torch.arange(ways, device=device)

        def chosen(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            draws = uniforms(seed, f"{split}/instances", start, stop, 2 * ways)
            sizes = np.full(stop - start, len(pool) * turned)
            places = distinct(draws[:, :ways], draws[:, ways:], sizes)
            return pool[places // turned], places % turned

        def episodes(start: int, stop: int) -> Episodes:
            rows, turns = chosen(start, stop)
            images = read(rows[..., None], turns)  # [T, N, 1, C, H, W]
            x = images.expand(-1, -1, copies, *images.shape[3:]).clone()
            for number in range(stop - start):
                random = generator("distortions", seed, split, start + number)
                changed = x[number, :, untouched:]
                x[number, :, untouched:] = self.distortions(changed.flatten(0, 1), random).view_as(changed)

            def flat(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return part.flatten(1, 2), labels.repeat_interleave(part.shape[2]).expand(stop - start, -1)

            return Episodes(*flat(x[:, :, :shots]), *flat(x[:, :, shots:]), ways=ways)

        return episodes
