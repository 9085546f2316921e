"""Small things that a user may have in a folder, and the commands that he types there; for `scripts/fuzz` and `scripts/fuzz/faults.py`.

Each scene takes a second or less on one core. `{here}` in a word is the folder that its inputs lie in, `{made}` that of the run
which the first commands left.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metarun import optional

BRIEF = ["train.steps=2", "train.validate_every=1", "train.validate_episodes=2", "test.episodes=4", "test.baseline_episodes=0",
         "hardware=cpu", "hardware.threads=1"]  # fmt: skip
TASK = ["task.ways=3", "task.shots=1", "task.queries=2", *BRIEF]
IMAGES = ["data=folder", "data.root={here}/images", "data.image_size=16", "backbone.channels=4"]
TARGET = [
    "target=folder",
    "target.data.root={here}/kinds",
    "target.data.image_size=16",
    "target.repeats=2",
    "target.train_images=6",
]
WORDS = ("apple", "brick", "cloud", "dream", "eagle", "flame", "grass", "house", "ivory", "jewel")


@dataclass(frozen=True)
class Scene:
    """What a user has, and what he types.

    Attributes:
        inputs: Makes the files in a folder.
        commands: The commands that use them.
        first: Commands that are carried out before, for what they leave in `{here}/runs`.
    """

    inputs: Callable[[Path], None]
    commands: Sequence[Sequence[str]]
    first: Sequence[Sequence[str]] = ()

    def typed(self, words: Sequence[str], here: Path) -> list[str]:
        """The words of a command, for inputs in a folder."""
        made = sorted(path.parent for path in here.glob("runs/made/*/config.yaml"))
        return [word.replace("{here}", str(here)).replace("{made}", str(made[0] if made else "")) for word in words]


def images(here: Path) -> None:
    """Folders `train`, `val` and `test` in `images`, each of four classes of six small pictures of a colour."""
    draw = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(4):
            colour = draw.integers(0, 256, 3)
            for image in range(6):
                _picture(here / "images" / split / f"{split}{number}" / f"{image}.png", colour, draw)


def kinds(here: Path) -> None:
    """Three classes of ten pictures in `kinds`, brighter from class to class."""
    draw = np.random.default_rng(1)
    for number, name in enumerate(("ash", "birch", "cedar")):
        for image in range(10):
            _picture(here / "kinds" / name / f"{image}.png", np.full(3, 40 + 80 * number), draw)


def labels(here: Path) -> None:
    """Pictures that are numbered through in `images`, and their classes in `images/train.csv`."""
    draw, rows = np.random.default_rng(2), [("file", "label")]
    for number in range(48):
        _picture(here / "images" / "train" / f"{number}.png", draw.integers(0, 256, 3), draw)
        rows.append((f"{number}.png", f"kind {number % 12}"))
    _table(here / "images" / "train.csv", rows)


def texts(here: Path) -> None:
    """Labelled texts in `a.csv`, examples of other classes in `support.csv`, and texts without labels in `new.txt`."""
    _table(
        here / "a.csv", [("text", "label"), *((f"the {word} of number {n}", word) for word in WORDS for n in range(6))]
    )
    _table(
        here / "support.csv",
        [("text", "label"), *((f"a {word} {n}", word) for word in ("river", "stone") for n in (1, 2))],
    )
    (here / "new.txt").write_text("a river\n\nsome stone\nthe stone, again\n", encoding="utf-8")


def ratings(here: Path) -> None:
    """The three files of MovieLens, of forty users."""
    draw, films = np.random.default_rng(3), 50
    genres, taste = draw.integers(0, 2, (films, 19)), draw.normal(0, 1, (40, 19))
    users = [f"{user + 1}|{20 + user}|{'MF'[user % 2]}|writer|{10000 + user}" for user in range(40)]
    told = [
        f"{film + 1}|Film {film}|01-Jan-{1980 + film % 20}||x|" + "|".join(map(str, genres[film]))
        for film in range(films)
    ]
    rated = [
        f"{user + 1}\t{film + 1}\t{int(np.clip(round(3 + taste[user] @ genres[film] / 3), 1, 5))}\t88125{film:04}"
        for user in range(40)
        for film in draw.permutation(films)[:30]
    ]
    for name, lines in (("u.user", users), ("u.item", told), ("u.data", rated)):
        (here / "ratings").mkdir(exist_ok=True)
        (here / "ratings" / name).write_text("\n".join(lines) + "\n", encoding="latin-1")


def weights(here: Path) -> None:
    """Images, and the weights of a small network of timm in `w.pth` and `w.safetensors`."""
    images(here)
    torch.manual_seed(0)
    optional.torchvision()  # which timm imports, and which may be of another build of torch
    state = importlib.import_module("timm").create_model("test_resnet").state_dict()
    torch.save(state, here / "w.pth")
    importlib.import_module("safetensors.torch").save_file(state, here / "w.safetensors")


def own(here: Path) -> None:
    """A folder of configs of one's own: a method, a recipe, an experiment, a file of what is searched."""
    texts = {
        "algo/mine.yaml": "# @package _global_\n# Mine; metarun algo=mine\nalgo:\n  _target_: metarun.algos.protonet.ProtoNet\n",
        "recipe/mine.yaml": "# Mine; metarun recipe=mine\nstages:\n  - {_target_: metarun.stages.Train}\n",
        "experiment/mine.yaml": "# @package _global_\n# Mine; metarun experiment=mine\nseed: 1\ntask:\n  shots: 2\n",
        "data/mine.yaml": "# Mine; metarun data=mine\n_target_: metarun.data.regression.Sinusoid\n",
        "hydra/sweeper/mine.yaml": "# Mine\n_target_: hydra_plugins.metarun.Grid\nparams:\n  seed: 0,1\n",
    }
    for name, text in texts.items():
        (here / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "conf" / name).write_text(text, encoding="utf-8")


def both(*makers: Callable[[Path], None]) -> Callable[[Path], None]:
    """Makes the inputs of several."""

    def make(here: Path) -> None:
        for maker in makers:
            maker(here)

    return make


def _picture(path: Path, colour: np.ndarray, draw: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = colour + draw.integers(-40, 40, (16, 16, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def _table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


_EPISODIC = [*IMAGES, "algo=protonet", *TASK]
_SOURCE = "outputs={here}/runs"
_TEXT = ["data=text", "data.root={here}/a.csv", "encoder=tfidf", "encoder.analyzer=char_wb", "algo=simpleshot", *TASK, "train.steps=0",
         "task.ways=2"]  # fmt: skip
_SINUSOID = ["algo=maml", "data=sinusoid", "backbone=mlp", "train.steps=6", "train.save_every=2", "test.episodes=8",
             "test.baseline_episodes=2", "hardware=cpu", "hardware.threads=1"]  # fmt: skip

SCENES = {
    "regression": Scene(lambda here: None, [_SINUSOID]),
    "runs": Scene(lambda here: None, [[*_SINUSOID, f"seed={seed}", f"name=run{seed}", _SOURCE] for seed in (0, 1)]
                  + [["recipe=report", "runs={here}/runs"], ["recipe=runs", "runs={here}/runs"]],
                  first=[[*_SINUSOID, f"seed={seed}", f"name=run{seed}", _SOURCE] for seed in (0, 1)]),
    "episodes": Scene(images, [_EPISODIC, ["recipe=inspect", *IMAGES], [*_EPISODIC, "task.ways=[2,3]", "task.shots=[1,3]"]]),
    "labels": Scene(labels, [["data=folder", "data.root={here}/images", "data.labels=train.csv", "data.image_size=16",
                              "backbone.channels=4", *TASK, "task.ways=2"]]),
    "sets": Scene(both(images, kinds), [["data=[left:folder,right:folder]", "data.sets.left.root={here}/images",
                                         "data.sets.right.root={here}/images", "data.image_size=16", "backbone.channels=4", *TASK,
                                         "test.data=[kinds:folder]", "test.data.kinds.root={here}/kinds"]]),
    "text": Scene(texts, [_TEXT, ["recipe=predict", "checkpoint={made}", "support={here}/support.csv", "items={here}/new.txt"],
                          ["recipe=inspect", "data=text", "data.root={here}/a.csv"]],
                  first=[[*_TEXT, "name=made", _SOURCE]]),
    "ratings": Scene(ratings, [["data=movielens", "data.root={here}/ratings", "algo=maml", "backbone=mlp", "data.cold=both", *BRIEF,
                                "task.shots=[1,3]", "task.queries=1"]]),
    "continual": Scene(images, [["recipe=continual", *IMAGES[:3], "algo=protonet", "backbone=pixels", *BRIEF, "train.steps=0",
                                 "test.episodes=2", "continual.orders=2", "continual.classes=3", "continual.points=2",
                                 "continual.rates=[0.003,0.001]", "continual.images=3", "continual.test_images=2", "task.ways=2",
                                 "task.queries=2"]]),
    "transfer": Scene(both(images, kinds), [["recipe=transfer", *IMAGES, *TARGET, "algo=baseline", "transfer=linear_probe",
                                             "transfer.steps=3", *BRIEF, "train.tasks_per_step=4", "train.validate_on=images"]]),
    "few labels": Scene(kinds, [["recipe=target_only", *TARGET, "backbone.channels=4", "transfer=all", "transfer.steps=2",
                                 "hardware=cpu", "hardware.threads=1"],
                                ["recipe=predict", "checkpoint={made}", "images={here}/kinds"],
                                ["recipe=export", "checkpoint={made}", "format=torch"]],
                        first=[["recipe=target_only", *TARGET, "backbone.channels=4", "transfer=nearest_centroid", "hardware=cpu",
                                "hardware.threads=1", "name=made", _SOURCE]]),
    "finished": Scene(both(images, kinds), [["recipe=predict", "checkpoint={made}", "support={here}/kinds", "images={here}/kinds"],
                                            ["recipe=test", "checkpoint={made}", "test.episodes=6"],
                                            ["recipe=export", "checkpoint={made}", "support={here}/kinds", "format=torch"],
                                            ["recipe=report", "runs={here}/runs"],
                                            ["recipe=runs", "runs={here}/runs"],
                                            ["encoder=run", "encoder.from={made}", *IMAGES[:3], "algo=simpleshot", *TASK]],
                      first=[[*_EPISODIC, "name=made", _SOURCE]]),
    "weights": Scene(weights, [["encoder=pretrained", "encoder.name=timm:test_resnet", "encoder.weights={here}/w.pth",
                                "encoder.image_size=32", *IMAGES[:3], "algo=simpleshot", *TASK, "train.steps=0"],
                               ["backbone=pretrained", "backbone.name=timm:test_resnet", "backbone.weights={here}/w.safetensors",
                                "backbone.image_size=32", *IMAGES[:2], "algo=protonet", *TASK, "train.steps=0"]]),
    "own": Scene(both(images, own), [["--config-dir", "{here}/conf", *IMAGES, *TASK, "algo=mine"],
                                     ["--config-dir", "{here}/conf", *IMAGES, *TASK, "recipe=mine"],
                                     ["--config-dir", "{here}/conf", *IMAGES, *TASK, "experiment=mine"],
                                     ["--config-dir", "{here}/conf", *_SINUSOID, "data=mine", "task.ways=1"],
                                     ["-m", "--config-dir", "{here}/conf", *_SINUSOID, "hydra/sweeper=mine", "--dry-run"],
                                     ["help", "--config-dir", "{here}/conf", "algo"]]),
}  # fmt: skip
