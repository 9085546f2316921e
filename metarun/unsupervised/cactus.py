"""CACTUs: Unsupervised Learning via Meta-Learning (Hsu, Levine, Finn 2019).

https://arxiv.org/abs/1810.02334

    z = embedding(x) of every training image
    P partitions: k-means of z, and of z with each dimension scaled at random (section 2.2)
    a task: N clusters of one partition, K + Q images of each (algorithm 1)

The embedding is that of the paper's choice; here it is one of
- the principal components of the pixels, or of the vectors where `encoder=` has replaced the images by such (null),
- the features of the backbone of an earlier run of metarun (`embedding=RUN`), which may itself have been unsupervised,
- those of a network of torchvision or timm (`network=`), with the weights that `weights=` names.

As in the official code (kylehkhsu/cactus-maml): the first partition is of the embedding as it is, the scales of each other
one are uniform in [0, 1) for every dimension, k-means starts by k-means++, and a cluster with fewer images than a task needs is left
out. There Omniglot has 500 clusters of 24,000 images. Differences:
- The paper's embeddings (BiGAN, ACAI, DeepCluster) are not here.
- Pixels are reduced to their principal components, without whitening unless `whiten` is set, after images are brought to at most
  32 pixels a side; the official code whitens all pixels (ZCA).
- The official code repeats k-means, except on pixels, until three quarters of the clusters are large enough; here as many as a task
  has are enough. With a single partition it takes the best of ten starts, here there is one.
- Where the data set counts rotated images as further classes, each cluster turned is a further cluster. The images are clustered
  as they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metarun import files
from metarun.backbones.pretrained import Pretrained
from metarun.config.types import FilePath, NameOrPath, PositiveInt, Seed
from metarun.core import Backbone, Episodes, TaskShape
from metarun.data.image_batches import generator, to_shape
from metarun.data.image_source import ImageSource
from metarun.data.origin import Origin
from metarun.data.roots import cache_root
from metarun.data.sampler import ClassSampler, uniforms
from metarun.data.source import PURPOSE, DataSource, EpisodeSampler, Split
from metarun.engine import checkpoint, origins
from metarun.errors import UserError
from metarun.inference import store
from metarun.inference.learner import Learner
from metarun.runs import seen
from metarun.target.base import features, with_statistics
from metarun.text import counted, shown_path
from metarun.unsupervised.base import PseudoTasks

CLUSTER = 40  # images of a cluster on average, where their number is not given; the paper's Omniglot has 48
MOST = 500  # clusters, where their number is not given
SIDE = 32  # pixels of an image that principal components are of, at most
EMBEDDED_AT_ONCE = 512  # images that are embedded together

log = logging.getLogger("metarun")


class Cactus(PseudoTasks):
    """Tasks whose classes are clusters of an embedding.

    Args:
        validation: What the weights are selected on: made-up tasks of the validation images, or the labels of these.
        clusters: The clusters of the training images; null is one for every 40 images, at most 500.
        partitions: The clusterings, of which each task takes one.
        scaled: Whether the partitions after the first are of an embedding with randomly scaled dimensions, instead of
            other starts of k-means.
        components: The principal components that an embedding is reduced to; null leaves features as they are.
        whiten: Whether the components are scaled to the same variance.
        embedding: A finished run whose backbone embeds the images; null embeds by the pixels, or by `network`.
        network: A network of a library that embeds the images, torchvision:NAME or timm:NAME.
        weights: The network's weights: pretrained or a name has the library fetch them, else an address or a file.
        checksum: The SHA-256 of the file of weights; an address needs it.
        cluster_seed: The seed of the clusterings, which is not the run's.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        validation: Literal["pseudo", "labels"] = "pseudo",
        clusters: PositiveInt | None = None,
        partitions: PositiveInt = 10,
        scaled: bool = True,
        components: PositiveInt | None = 64,
        whiten: bool = False,
        embedding: FilePath | None = None,
        network: str | None = None,
        weights: NameOrPath = "pretrained",
        checksum: str | None = None,
        cluster_seed: Seed = 0,
    ) -> None:
        super().__init__(source, validation)
        if embedding is not None and network is not None:
            raise UserError("unsupervised: has both embedding= and network=; take one of them")
        if self.item == "text":
            raise UserError(
                "unsupervised: clusters points, but the items are texts, whose word pieces have numbers that mean no place; add "
                "encoder=minilm or encoder=tfidf"
            )
        if self.item != "image" and (embedding is not None or network is not None):
            raise UserError(
                f"unsupervised: embeds images, but the items are {self.item}s, which are clustered as they are"
            )
        if self.item == "image" and embedding is None and network is None and components is None:
            raise UserError(
                "unsupervised.components=null: the pixels are many; take a number of components, such as 64"
            )
        self.clusters, self.partitions, self.scaled = clusters, partitions, scaled
        self.components, self.whiten, self.cluster_seed = components, whiten, cluster_seed
        self.learner: Learner | None = None
        self.missing: UserError | None = None  # the run that embeds: a test of what was learned goes without it
        self.embedded_by: Origin | None = None
        self.network: Backbone | None = None
        self.images = source.underlying if isinstance(source.underlying, ImageSource) else None
        what = "pixels" if self.item == "image" else f"{self.item}s"
        self.origin: dict[str, Any] = {
            "embedding": what if components is None else f"principal components of the {what}"
        }
        if embedding is not None:
            self.learner = self._trained(embedding)
        if network is not None:
            self.network = Pretrained(
                self.input_shape,
                name=network,
                weights=weights,
                checksum=checksum,
                standardized=self.images is not None and self.images.normalize,
            )
            self.origin = {"embedding": network, "sha256": _digest(self.network)}
            self.embedded_by = Origin(f"unsupervised.network={network}")
        self._partitions: dict[Split, np.ndarray] = {}

    def _trained(self, embedding: str) -> Learner | None:
        """What a run learned; None, and `missing`, where there is no such run any more."""
        key = "unsupervised.embedding"
        try:
            held = store.load(Path(embedding), key)
        except UserError as error:
            if files.typed_path(embedding).exists():
                raise
            self.missing, self.origin = error, {"embedding": "backbone of a run"}
            return None
        self.embedded_by = origins.of_run(key, embedding)
        seen.refuse_test_classes(self.embedded_by.seen, self.source, f"{key}={embedding}")
        self.origin = {
            "embedding": "backbone of a run",
            "sha256": checkpoint.digest(held.origin),
            "its labels": self.embedded_by.labels_read,
        }
        return Learner(held, "cpu")

    @property
    def origins(self) -> Sequence[Origin]:
        return [*super().origins, *([self.embedded_by] if self.embedded_by else [])]

    def how(self) -> dict[str, Any]:
        return {
            "classes": "clusters",
            **self.origin,
            "clusters": self._count("train"),
            "partitions": self.partitions,
            "scaled": self.scaled,
            "components": self.components,
            "whiten": self.whiten,
            "cluster_seed": self.cluster_seed,
        }

    def _count(self, split: Split) -> int:
        """The number of clusters of a split: that of the training images, in proportion."""
        images = len(self.pool(split))
        whole = len(self.pool("train"))
        clusters = self.clusters or max(2, min(MOST, whole // CLUSTER))
        return max(2, min(images, round(clusters * images / whole)))

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """The embedding of images, float32 `[n, D]`."""
        read = self.reader(torch.device("cpu"))

        def images(chosen: np.ndarray) -> torch.Tensor:
            return read(chosen[:, None], np.zeros(len(chosen), np.int64))[:, 0]

        def inputs(chosen: np.ndarray) -> torch.Tensor:
            if self.learner is None:
                return images(chosen)
            assert self.images is not None
            pixels = self.images.table.images[chosen]
            # As the run saw the files of its own data set: the table may hold their negatives.
            shown = torch.from_numpy(255 - pixels if self.images.inverted else np.array(pixels))
            return self.learner.held.preprocessing.of_pixels(shown)

        network = self.network if self.learner is None else self.learner.algorithm.backbone
        parts = [rows[start : start + EMBEDDED_AT_ONCE] for start in range(0, len(rows), EMBEDDED_AT_ONCE)]
        if network is None:
            flat = [self._small(images(part)).flatten(1).numpy() for part in parts]
        else:
            few = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(np.int64)]
            fixed = with_statistics(network, inputs(few))
            flat = [features(fixed, inputs(part)).numpy() for part in parts]
        return np.concatenate(flat).astype(np.float32)

    @staticmethod
    def _small(x: torch.Tensor) -> torch.Tensor:
        """Images of at most `SIDE` pixels a side; vectors as they are."""
        if x.ndim < 4:
            return x
        shape = (x.shape[1], *(min(side, SIDE) for side in x.shape[2:]))
        return to_shape(x, shape)

    def partitions_of(self, split: Split) -> np.ndarray:
        """The cluster of each image of a split's pool in each partition, int64 `[partitions, n]`.

        They are made once, and kept beside the tables of images.

        Raises:
            UserError: The file of them was damaged, or there is nothing to embed the images by.
        """
        if self.missing is not None:
            raise self.missing
        if split not in self._partitions:
            key = {
                "fingerprint": self.source.fingerprint,
                "split": split,
                "clusters": self._count(split),
                "normalize": self.images is not None and self.images.normalize,
                **self.how(),
                "version": 1,
            }
            folder = cache_root()
            files.make_folder(folder)
            file = folder / f"clusters-{files.digest(key)}.npz"
            if not file.is_file():
                with files.locked(file.with_suffix(".lock"), "unsupervised: another process clusters these images"):
                    if not file.is_file():
                        files.save_arrays(file, labels=self._cluster(split), key=np.array(files.digest(key)))
            self._partitions[split] = self._stored(file, split, files.digest(key))
        return self._partitions[split]

    def _stored(self, file: Path, split: Split, key: str) -> np.ndarray:
        """The partitions that a file holds, where they are those that it is named after."""
        kept = files.read_arrays(file, files.MADE_AGAIN, ["labels"])
        labels, rows, clusters = kept["labels"], len(self.pool(split)), self._count(split)
        if str(kept.get("key", key)) != key:  # one of an earlier version has none
            reason = "it holds the clusters of other images or settings"
        elif labels.shape != (self.partitions, rows) or not np.issubdtype(labels.dtype, np.integer):
            reason = (
                f"its labels are {labels.dtype} {list(labels.shape)}, not whole numbers [{self.partitions}, {rows}]"
            )
        elif labels.min() < 0 or labels.max() >= clusters:
            reason = f"its labels are not those of {clusters} clusters"
        else:
            found: np.ndarray = labels.astype(np.int64)
            return found
        raise UserError(f"{shown_path(file)}: is damaged ({reason}); {files.MADE_AGAIN}")

    def _cluster(self, split: Split) -> np.ndarray:
        from sklearn.cluster import KMeans

        rows, clusters = self.pool(split), self._count(split)
        log.info(
            "unsupervised: %d partitions of %d %s images into %d clusters", self.partitions, len(rows), split, clusters
        )
        self.make_ready(torch.device("cpu"), split)
        z = self.embed(rows)
        if self.components is not None:
            z = principal_components(z, self.components, self.whiten)
        found = []
        for number in range(self.partitions):
            random = generator("cactus", self.cluster_seed, split, number)
            scale = random.random(z.shape[1]) if self.scaled and number else np.ones(z.shape[1])
            model = KMeans(clusters, n_init=1, random_state=int(random.integers(2**31)))
            found.append(model.fit_predict((z * scale).astype(np.float32)))
        return np.stack(found)

    def pseudo_sampler(self, split: Split, task: TaskShape, seed: int, device: torch.device) -> EpisodeSampler:
        pool = self.pool(split)
        turned = self.turns
        ways, shots, queries = task.numbers
        needed = shots + queries
        key = "train.task" if split == "train" else "test.task"
        other = (
            "" if split == "train" else ", or take the data set's own for validation: unsupervised.validation=labels"
        )
        if len(pool) < (fewest := -(-ways // turned) * needed):  # too few however they are clustered
            raise UserError(
                f"unsupervised: there {'is' if len(pool) == 1 else 'are'} {counted(len(pool), f'{PURPOSE[split]} image')}, and a task of "
                f"{key}.ways={ways} needs {fewest}; set {key}.ways, shots or queries lower{other}"
            )
        labels = self.partitions_of(split)
        orders, samplers = [], []
        for partition in labels:
            sizes = np.bincount(partition)
            large = np.flatnonzero(sizes >= needed)
            if len(large) * turned >= ways:
                orders.append(pool[np.argsort(partition, kind="stable")])
                offsets = np.concatenate([[0], np.cumsum(sizes)])
                samplers.append(ClassSampler(offsets, large, task, seed, split, rotations=turned))
        if not samplers:
            most = max(int((np.bincount(partition) >= needed).sum()) for partition in labels) * turned
            clusters, advice = self._count(split), f"set unsupervised.clusters lower, or {key}.queries, or {key}.ways"
            if clusters * turned < ways:  # of which a split has its share
                enough = -(-(-(-ways // turned) * len(self.pool("train"))) // len(pool))
                advice = f"set unsupervised.clusters to {enough}, or {key}.ways lower"
            raise UserError(
                f"unsupervised: of the {clusters} clusters of the {split} images {most} have {key}.shots + queries = {needed} "
                f"images, and a task needs {ways}; {advice}{other}"
            )
        read = self.reader(device)
        names = torch.arange(ways, device=device)

        def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
            which = int(uniforms(seed, f"{split}/partition", number, number + 1, 1)[0, 0] * len(samplers))
            places, turns = samplers[which].draw(number, number + 1)
            return orders[which][places], turns

        def episodes(start: int, stop: int) -> Episodes:
            rows, turns = (np.concatenate(part) for part in zip(*map(drawn, range(start, stop)), strict=True))
            x = read(rows, turns)

            def flat(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return part.flatten(1, 2), names.repeat_interleave(part.shape[2]).expand(stop - start, -1)

            return Episodes(*flat(x[:, :, :shots]), *flat(x[:, :, shots:]), ways=ways)

        return episodes


def principal_components(z: np.ndarray, components: int, whiten: bool = False) -> np.ndarray:
    """The first principal components of points.

    Args:
        z: The points, `[n, D]`.
        components: The number of components; at most min(n, D) are returned.
        whiten: Whether each has unit variance.

    Returns:
        The centred points in the basis of the largest variances, float32 `[n, components]`.
    """
    centred = z.astype(np.float64) - z.mean(0, dtype=np.float64)
    variances, basis = np.linalg.eigh(centred.T @ centred / len(z))
    count = min(components, *z.shape)
    basis, variances = basis[:, ::-1][:, :count], variances[::-1][:count]
    basis *= np.where(basis[np.abs(basis).argmax(0), np.arange(count)] < 0, -1, 1)  # the sign of an axis is anybody's
    found: np.ndarray = centred @ basis
    return (found / np.sqrt(np.maximum(variances, 1e-12)) if whiten else found).astype(np.float32)


def _digest(network: Backbone) -> str:
    """SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(store.tensors(network).items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
