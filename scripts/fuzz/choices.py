"""Choices of all groups together, as nobody has tried them before, and what may follow a run: each is made, or refused in a line."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from metarun.runs import contents

from .commands import Finding, Findings, check, shown
from .scenes import BRIEF, images, kinds, texts

CONF = Path(__file__).parents[2] / "conf"
RUN = "run folder: "  # what is said when a run begins
# What is found only while it is computed: which rows go through a network together is the method's affair.
LATE = ("finite", "have no statistics")
LIMIT = 30.0  # seconds of the processor

# Data that every machine has, with what fits small tasks; the files are those of the scenes.
IMAGES: Mapping[str, Sequence[str]] = {
    "glyphs": ["data.image_size=16"],
    "digits": ["task.ways=2"],
    "[glyphs,digits]": ["task.ways=2"],
    "folder": ["data.root={here}/images", "data.image_size=16", "task.ways=3"],
}
VECTORS: Mapping[str, Sequence[str]] = {
    "sinusoid": [],
    "mixed": [],
    "linear": [],
    "text": ["data.root={here}/a.csv", "encoder=tfidf", "encoder.analyzer=char_wb", "task.ways=2"],
}
TARGETS: Mapping[str, Sequence[str]] = {
    "digits": [],
    "folder": ["target.data.root={here}/kinds", "target.data.image_size=16"],
}
OF_TEXT: Mapping[str, Sequence[str]] = {"text": ["target.data.root={here}/a.csv"]}
# What a recipe needs beside a method and data; most of the refusals would be of these.
NEEDS: Mapping[str, Sequence[str]] = {
    "pretrain_meta": ["pretrain.train.steps=2"],
    "pretrain_meta_transfer": ["pretrain.train.steps=2"],
    "distill": ["algo=rfs"],
    "domain_adaptation": ["algo=coral"],
    "continual": [
        "continual.classes=3",
        "continual.orders=2",
        "continual.rates=[0.01]",
        "continual.images=3",
        "continual.test_images=2",
    ],
}
# How words begin that a target alone has no use for.
OF_SOURCES = ("algo=", "data", "train.", "task.", "test.", "wrapper=", "unsupervised=", "optimizer=", "schedule=")
RECIPES = ("meta", "meta_transfer", "transfer", "target_only", "train", "pretrain_meta", "pretrain_meta_transfer", "domain_adaptation",
           "distill", "continual")  # fmt: skip
BACKBONES: Mapping[str, Sequence[str]] = {
    "mlp": [],
    "conv4": ["backbone.channels=8"],
    "identity": [],
    "pixels": [],
    "vit": [],
    "resnet12": ["backbone.widths=[8,8,8,8]"],
}
NORMS = ("running", "batch", "support", "group", "none")
SHAPES = ("task.shots=[1,3]", "task.ways=[2,3]", "task.queries=[1,3]", "task.balanced=false", "task.unlabelled=2",
          "task.distractors=1", "task.protocol=meta_dataset", "test.unknown_ways=1", "test.task.shots=2", "train.task.ways=2",
          "train.task.queries=1")  # fmt: skip
HARDWARE = (
    "hardware=amp",
    "hardware.record=true",
    "hardware.record=false",
    "hardware.processes=2",
    "hardware.channels_last=false",
)
TRAINING = ("optimizer=sgd", "optimizer=adamw", "schedule=cosine", "schedule=step", "schedule=linear", "train.noise.labels=0.3",
            "train.validate_on=images", "augment=standard", "train.max_seconds=1", "train.steps=0",
            "train.tasks_per_step=1")  # fmt: skip


def options(group: str) -> list[str]:
    """The choices of a group, those of its folders too."""
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))


def drawn(draw: random.Random) -> list[str]:
    """A command: a method, a recipe and data, and perhaps more of each kind; `{here}` is the folder of the files."""

    def perhaps(chance: float, among: Sequence[str]) -> list[str]:
        return [draw.choice(among)] if draw.random() < chance else []

    def with_own(prefix: str, own: Mapping[str, Sequence[str]]) -> list[str]:
        name = draw.choice(sorted(own))
        return [f"{prefix}={name}", *own[name]]

    recipe = draw.choice((*RECIPES, "meta", "meta", "meta", "transfer"))
    vectors = draw.random() < 0.2
    words = [
        f"recipe={recipe}",
        f"algo={draw.choice(options('algo'))}",
        *with_own("data", VECTORS if vectors else IMAGES),
    ]
    if vectors:
        words += ["backbone=mlp"]
    if draw.random() < 0.5:
        words += with_own("backbone", BACKBONES)
    words += NEEDS.get(recipe, ())
    words += [f"backbone.norm={norm}" for norm in perhaps(0.3, NORMS)]
    words += [f"wrapper={name}" for name in perhaps(0.2, options("wrapper"))]
    words += [f"unsupervised={name}" for name in perhaps(0.1, options("unsupervised"))]
    words += perhaps(0.35, SHAPES) + perhaps(0.3, HARDWARE) + perhaps(0.35, TRAINING)
    if any(part in recipe for part in ("transfer", "target", "adaptation")) and draw.random() < 0.95:
        words += with_own("target", OF_TEXT if "data=text" in words and draw.random() < 0.9 else TARGETS)
        words += ["target.train_images=[12]", "target.repeats=2"]
    if "transfer" in recipe or "target" in recipe:
        for name in perhaps(0.8, options("transfer")):
            steps = "steps:" in (CONF / "transfer" / f"{name}.yaml").read_text(encoding="utf-8")
            words += [f"transfer={name}", *(["transfer.steps=2"] if steps else [])]
    words = [*BRIEF, "task.shots=1", "task.queries=2", *words]
    if recipe == "target_only" and draw.random() < 0.95:  # else it is refused
        read = ("algo=", "task.") if "transfer=own" in words else ()
        words = [word for word in words if not word.startswith(OF_SOURCES) or word.startswith(read)]
    return words


FOLLOWING: Sequence[Callable[[str], list[str]]] = (
    lambda run: ["recipe=test", f"checkpoint={run}", "test.episodes=3"],
    lambda run: ["recipe=test", f"checkpoint={run}", "test.episodes=3", "test.task.shots=2"],
    lambda run: ["recipe=test_continual", f"checkpoint={run}", "continual.orders=2", "continual.classes=2"],
    lambda run: ["recipe=predict", f"checkpoint={run}", "images={here}/kinds"],
    lambda run: ["recipe=predict", f"checkpoint={run}", "support={here}/kinds", "images={here}/kinds"],
    lambda run: ["recipe=predict", f"checkpoint={run}", "support={here}/support.csv", "items={here}/new.txt"],
    lambda run: ["recipe=export", f"checkpoint={run}", "format=torch"],
    lambda run: ["recipe=export", f"checkpoint={run}", "format=onnx", "support={here}/kinds"],
    lambda run: ["recipe=report", f"runs={Path(run).parent}"],
    lambda run: ["encoder=run", f"encoder.from={run}", "data=folder", "data.root={here}/images", "data.image_size=16", "algo=simpleshot",
                 "task.ways=3", "task.queries=2", "train.steps=0", *BRIEF],
)  # fmt: skip


def begun_in_vain(words: Sequence[str], outputs: Path) -> int:
    """Checks a command, and that what can be known before anything is computed is; returns its exit status.

    Raises:
        Finding: It is refused after it has begun, does not end, or does what no command may.
    """
    status, err = check(words, outputs, LIMIT)
    if status >= 128:
        raise Finding(f"it does not end\n{err[-800:]}")
    if status == 2 and RUN in err and not any(word in err for word in LATE):
        raise Finding(f"it is refused after it has begun\n{err[-800:]}")
    return status


def fuzz_choices(seconds: float, seed: int) -> tuple[int, int]:
    """Tries combinations of choices for some seconds, each with one or two commands on what it leaves, and prints each finding.

    Args:
        seconds: How long.
        seed: What is drawn depends on it alone.

    Returns:
        How many commands were tried, and how many findings there are.
    """
    draw, found, made = random.Random(seed), Findings("combinations"), 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        here, outputs = Path(folder), Path(folder, "outputs")
        for maker in (images, kinds, texts):
            maker(here)

        def attempt(words: Sequence[str], outputs: Path, before: Sequence[str] = ()) -> bool:
            typed = [word.replace("{here}", folder) for word in words]
            after = f", after {shown(before)}" if before else ""
            with found.trial(shown([*typed, f"outputs={outputs}"]) + after):
                return begun_in_vain(typed, outputs) == 0
            return False

        began = time.monotonic()
        while time.monotonic() - began < seconds:
            shutil.rmtree(outputs, ignore_errors=True)
            words = drawn(draw)
            if attempt(words, outputs / "first"):
                made += 1
                (run, *_) = sorted(path.parent for path in outputs.rglob(contents.RESULT))
                for following in draw.sample(FOLLOWING, 2):
                    attempt(following(str(run)), outputs / "second", words)
                    shutil.rmtree(outputs / "second", ignore_errors=True)
    print(f"{made} of the combinations were made", flush=True)
    return found.counts()
