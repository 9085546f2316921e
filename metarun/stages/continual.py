"""The stage in which the test classes arrive one after the other."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun import files
from metarun.core.backbone import IMAGES_AT_ONCE
from metarun.data.image_batches import Labelled, generator, make_ready
from metarun.data.source import Split
from metarun.engine.sequence import ClassSequence, linear_probe, online, prototypes
from metarun.errors import UserError
from metarun.ops import batch_norm
from metarun.ops.measures import ACCURACY
from metarun.report.continual import class_curve
from metarun.report.statistics import over_seeds
from metarun.runs import contents, result, seen
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.stages.training_data import warn_namesakes
from metarun.text import counted, printable, shown_path

log = logging.getLogger("metarun")

VALIDATION_ORDERS = 3  # the learning rate is chosen on so many orders of the validation classes


class Continual(Stage):
    """Shows the test classes one after the other, an image at a time, and tests on all classes so far.

    The features are the method's and stay as they are. On them a new linear head takes one step on each image (`online`). Beside
    it stand the nearest class mean (`prototypes`), and a linear head that may look at all images so far again and again
    (`linear_probe`). The learning rate of the online head is chosen on sequences of validation classes.

    Source: the meta-test of Javed and White (2019), section 4, and of Beaulieu et al. (2020), section 3. In the first's code
    (khurramjaved96/mrcl, `evaluate_omniglot.py`) each length has sequences and a learning rate of its own, the best on learned
    images of test classes, and the head has 1000 rows; here the points are of one sequence, with the rate that is best at its end
    on other images of validation classes, and a row for each of its classes.
    """

    needs_weights = True
    measures = result.TEST
    meta_tests = True
    tests_source = True
    reads = ("continual",)

    def prepare(self, run: Run) -> None:
        config, norm = run.config.continual, run.algorithm.backbone.norm
        if run.data.kind != "classification":
            raise UserError(
                "recipe=continual: shows classes one after the other, but the data are regression tasks; try data=omniglot"
            )
        if batch_norm.needs_reference(norm):
            raise UserError(
                f"backbone.norm={norm}: normalises by a set of images, but in recipe=continual they come one at a time; use "
                "backbone.norm=group, running or none"
            )
        for learner in run.learners.values():
            seen.refuse_test_classes(learner.seen, run.data, f"stage {learner.name}")
        self.namesakes = warn_namesakes(run, run.data)
        self.images: dict[Split, Labelled] = {"test": self._images(run, "test")}
        if len(config.rates) > 1:
            self.images["val"] = self._images(run, "val")
        available = len(self.images["test"].names)
        if config.classes is not None and config.classes > available:
            raise UserError(
                f"continual.classes={config.classes}: is above the {available} classes of the test split; take fewer, or another "
                "division of the classes (data.split=lake has 659 of Omniglot for testing)"
            )
        self.classes = config.classes or available
        self.points = self._points(self.classes, config.points)

    def _images(self, run: Run, split: Split) -> Labelled:
        config, fewest = run.config.continual, run.test_task.min_items
        whole = run.data.labelled(None, split)
        images = whole.of_at_least(fewest)
        needed = config.images + config.test_images
        if len(whole.names) < 2:
            raise UserError(f"recipe=continual: the {split} split has fewer than two classes")
        if len(images.names) < 2:
            raise UserError(
                f"recipe=continual: task.min_items={fewest} leaves {len(images.names)} of the {len(whole.names)} classes of the {split} "
                "split; lower it"
            )
        if images.counts.min() < needed:
            name = printable(images.names[int(images.counts.argmin())])
            enough = (images.counts >= needed).sum() > 1
            raise UserError(
                f"continual: images + test_images = {config.images} + {config.test_images} = {needed} is above the "
                f"{counted(int(images.counts.min()), images.item)} of the class {name}; lower continual.images or continual.test_images"
                f"{f', or leave small classes out: task.min_items={needed}' if enough else ''}"
            )
        return images

    @staticmethod
    def _points(classes: int, points: int) -> list[int]:
        return sorted({round(classes * (place + 1) / points) for place in range(points)} - {0})

    def execute(self, run: Run) -> None:
        world, config = run.hardware.world, run.config.continual
        where = run.folder / contents.CONTINUAL
        if world.main:
            files.make_folder(where)
        world.barrier()
        run.algorithm.eval()
        make_ready(run.hardware.device, *self.images.values())
        self.features = {split: self._embed(run, images) for split, images in self.images.items()}
        rate, validated = self._rate(run)
        log.info(
            "continual: learning rate %g%s", rate, f" ({validated:.4f} on validation classes)" if validated else ""
        )
        with run.logger.progress("continual", config.orders) as advance:
            for number in range(config.orders):
                if number % world.size == world.rank:
                    self._measure(run, number, rate)
                advance(number + 1)
        world.barrier()
        found = [files.read_json(where / f"order-{number}.json", files.MADE_AGAIN) for number in range(config.orders)]
        run.result |= self._summary(run, found, rate, validated)

    @torch.no_grad()
    def _embed(self, run: Run, images: Labelled) -> Tensor:
        """Computes the features of all images, float32 `[n, D]`, class after class as `images` are."""
        parts = []
        with run.hardware.autocast():
            for start in range(0, len(images), IMAGES_AT_ONCE):
                places = np.arange(start, min(start + IMAGES_AT_ONCE, len(images)))
                parts.append(run.algorithm.features_of(images.batch(places, run.hardware.device).x).float())
        return torch.cat(parts)

    def _sequence(self, run: Run, split: Split, number: int, classes: int) -> ClassSequence:
        """Classes of a split in an order that is a function of (seed, split, number), and which images of them are learned."""
        config, images = run.config.continual, self.images[split]
        random = generator("continual", run.config.seed, split, number)
        order = random.permutation(len(images.names))[:classes]
        ends = np.concatenate([[0], np.cumsum(images.counts)])
        members = np.argsort(images.labels, kind="stable")
        needed = config.images + config.test_images
        rows = np.stack([members[ends[c] + random.permutation(images.counts[c])[:needed]] for c in order])
        found = self.features[split][torch.from_numpy(rows).to(self.features[split].device)]
        return ClassSequence(found[:, : config.images], found[:, config.images :])

    def _rate(self, run: Run) -> tuple[float, float | None]:
        """Chooses the learning rate of the online head that is best on validation classes; returns its accuracy there, too."""
        config, world = run.config.continual, run.hardware.world
        rates = [float(rate) for rate in config.rates]
        if len(rates) == 1:
            return rates[0], None
        file = run.folder / contents.CONTINUAL / "rates.json"
        classes = min(self.classes, len(self.images["val"].names))
        if world.main and not file.is_file():
            sequences = [self._sequence(run, "val", number, classes) for number in range(VALIDATION_ORDERS)]
            scores = []
            for rate in rates:
                try:
                    tried = [online(one, [classes], rate, config.optimizer, run.config.seed)[0][0] for one in sequences]
                    scores.append(float(np.mean(tried)))
                except UserError:  # too high a rate
                    scores.append(0.0)
            files.save_json(file, {"rates": rates, ACCURACY: scores, "classes": classes})
        world.barrier()
        kept = files.read_json(file, f"delete {shown_path(file)} to have the rates tried again")
        best = int(np.argmax(kept[ACCURACY]))
        return rates[best], kept[ACCURACY][best]

    def _measure(self, run: Run, number: int, rate: float) -> None:
        """Leaves the accuracies of one order, unless they are there."""
        file = run.folder / contents.CONTINUAL / f"order-{number}.json"
        if file.is_file() and "online_so_far" in files.read_json(file, files.MADE_AGAIN):
            return  # what an earlier version left lacks that curve
        sequence = self._sequence(run, "test", number, self.classes)
        seed = int(generator("head", run.config.seed, number).integers(2**62))
        unseen, learned, so_far = online(sequence, self.points, rate, run.config.continual.optimizer, seed)
        files.save_json(
            file,
            {
                "online": unseen,
                "online_learned": learned,
                "online_so_far": so_far,
                "prototypes": prototypes(sequence, self.points),
                "linear_probe": linear_probe(sequence, self.points),
            },
        )

    def _summary(self, run: Run, orders: list[dict[str, Any]], rate: float, validated: float | None) -> dict[str, Any]:
        curves: dict[str, dict[str, Any]] = {}
        for name in orders[0]:
            columns = list(zip(*(order[name] for order in orders), strict=True))
            curves[name] = {
                "mean": [float(np.mean(one)) for one in columns],
                "ci95": [over_seeds(one) for one in columns],
            }
        final, half = curves["online"]["mean"][-1], curves["online"]["ci95"][-1]
        if run.hardware.world.main:
            values = np.array([[order["online"][-1] for order in orders]])
            files.save_arrays(run.folder / contents.SCORES, steps=np.array([0]), values=values)
            picture = class_curve(curves, self.points, self.images["test"].item)
            files.save_bytes(run.folder / contents.CLASS_CURVE, picture)
            run.logger.picture("test/continual", picture)
        for name, curve in curves.items():
            for count, value in zip(self.points, curve["mean"], strict=True):
                run.logger.curve(result.key(result.TEST, f"acc_{name}"), value, count)
        return {
            result.key(result.TEST, ACCURACY): final,
            result.half_of(result.key(result.TEST, ACCURACY)): half,
            result.key(result.TEST, result.EPISODES): len(orders),
            result.key(result.TEST, result.CURVES): {f"acc_{name}": curve for name, curve in curves.items()},
            result.key(result.TEST, result.POINTS): {"at": self.points, "name": "classes so far"},
            result.key(result.CHANCE, ACCURACY): 1 / self.classes,
            result.CONTINUAL: {
                "classes": self.classes,
                "learning_rate": rate,
                "validation_acc": validated,
                "optimizer": run.config.continual.optimizer,
                "picture": contents.CLASS_CURVE,
                **{
                    name: {ACCURACY: curve["mean"][-1], result.half_of(ACCURACY): curve["ci95"][-1]}
                    for name, curve in curves.items()
                },
            },
            "interval": "too few for an interval" if half is None else self._interval(len(orders)),
        }

    def _interval(self, orders: int) -> str:
        """Says over what the interval of the online head is: what differs from order to order."""
        drawn = (
            ["the classes", "their order"]
            if self.classes < len(self.images["test"].names)
            else ["the order of the classes"]
        )
        item = self.images["test"].item
        return (
            f"95%, over {orders} orders ({', '.join([*drawn, f'their {item}s', 'the start of the head'])}), Student's t"
        )

    def protocol(self, run: Run) -> dict[str, Any]:
        config, item = run.config.continual, self.images["test"].item
        return {
            # Whatever the method does with the queries of an episode: each image is answered by its features alone.
            result.TRANSDUCTIVE: False,
            "test": {
                "ways": self.classes,
                "shots": config.images,
                "queries": config.test_images,
                **({"min_items": fewest} if (fewest := run.test_task.min_items) else {}),
            },
            **self.namesakes,
            result.CONTINUAL: f"classes one after the other, each {item} once; tested on all classes so far. An answer of online and of "
            "online_learned is any class of the sequence, also one that has yet to come; of the others it is one of the classes so far. "
            "So online compares with prototypes and linear_probe at the last point alone, online_so_far at each",
        }
