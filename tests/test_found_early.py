"""What can be known to be wrong is said before anything is computed or written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import compose
from omegaconf import OmegaConf
from shell import SINUSOID, make_images, metarun

from metarun.config.types import FilePath
from metarun.engine.distributed import World
from metarun.errors import UserError
from metarun.runs.building import check_there
from metarun.runs.continuation import refuse_unread
from metarun.stages import TargetTest, Train, Transfer

REFUSED = {
    "interval alone": (["train.optimizer.lr=interval(1e-4,1e-1)"], "add -m hydra/sweeper=optuna"),
    "range alone": (["task.shots=range(1,5)"], "add -m"),
    "interval in a grid": (["-m", "train.optimizer.lr=interval(1e-4,1e-1)"], "add hydra/sweeper=optuna"),
    "launcher alone": (["hydra/launcher=slurm"], "add -m"),
    "launcher's setting alone": (["hydra.launcher.at_once=2"], "add -m"),
    "sweeper alone": (["hydra/sweeper=optuna"], "add -m"),
    "typo in a search": (["-m", "hydra/sweeper=optuna", "train.optimizer.lrr=interval(1e-4,1e-1)"], "did you mean train.optimizer.lr?"),
    "value in a search": (["-m", "hydra/sweeper=optuna", "test.episodes=0", "seed=1", "algo=maml,fomaml"], "test.episodes"),
    "empty interval": (["-m", "hydra/sweeper=optuna", "train.optimizer.lr=interval(1e-1,1e-4)"], "train.optimizer.lr"),
    "endless interval": (["-m", "hydra/sweeper=optuna", "train.optimizer.lr=interval(0,inf)"], "must be finite"),
    "no number in an interval": (["-m", "hydra/sweeper=optuna", "train.optimizer.lr=interval(nan,1)"], "must be finite"),
    "logarithm of 0": (["-m", "hydra/sweeper=optuna", "train.optimizer.lr=tag(log,interval(0.0,1.0))"], "train.optimizer.lr"),
    "empty range": (["-m", "hydra/sweeper=optuna", "train.log_every=range(5,5)"], "train.log_every"),
    "negative rate": (["train.optimizer.lr=-1"], "Invalid learning rate"),
    "a rate that is no number": (["train.optimizer.lr=nan"], "train.optimizer"),
    "negative inner rate": (["algo.inner_lr=-1"], "algo.inner_lr=-1: must be at least 0"),
    "a norm of one value in training": (["backbone.norm=batch", "train.task.shots=1"], "norm=batch: 1 row of one value per channel has no"),
    "a norm of one value in a test": (["backbone.norm=support", "test.task.shots=1"], "norm=support: 1 row of one value per channel"),
    "one task for ATS": (["wrapper=ats", "train.tasks_per_step=1"], "train.tasks_per_step=1"),
    "a transfer without a target": (["transfer=linear_probe"], "transfer: this recipe learns no target"),
    "a target of another kind": (["recipe=transfer", "target=digits"], "items are images 1x28x28, but those of data are vectors"),
    "a network larger than any memory": (["backbone=mlp", "backbone.hidden=[89577303995975]"], "backbone: there is not enough memory"),
    "no CUDA": (["hardware=cuda"], "no CUDA device"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_and_nothing_is_left(words: list[str], expected: str, tmp_path: Path) -> None:
    done = metarun(
        *(word for word in SINUSOID if word.split("=")[0] not in [one.split("=")[0] for one in words]),
        *words,
        f"outputs={tmp_path}/out",
    )
    assert done.status == 2, done.err
    assert expected in done.said[-1]
    assert len(done.said) == 1
    assert not list(tmp_path.iterdir())


def test_a_norm_of_one_image_a_step_is_found_before_anything_is_written(tmp_path: Path) -> None:
    data = [
        "data=folder",
        f"data.root={make_images(tmp_path / 'images')}",
        "data.image_size=8",
        "task.ways=2",
        "task.queries=2",
    ]
    words = ["recipe=train", "algo=baseline", "backbone=mlp", "backbone.norm=running", "train.steps=2"]
    done = metarun(*data, *words, "train.tasks_per_step=1", f"outputs={tmp_path}/out")
    assert (done.status, (tmp_path / "out").exists()) == (2, False)
    assert "backbone.norm=running: 1 row of one value per channel has no statistics" in done.said[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["transfer.optimizer.lr=-1"],
        ["transfer=lora", "transfer.optimizer.lr=-0.5"],
        ["transfer.optimizer.weight_decay=-1"],
    ],
)
def test_an_optimiser_of_the_target_is_tried_before_the_source_is_trained(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    images = make_images(tmp_path / "images")
    backbone = (
        ["backbone=vit", "backbone.width=8", "backbone.heads=2", "backbone.depth=1", "backbone.patch_size=4"]
        if "lora" in words[0]
        else []
    )
    done = metarun("recipe=transfer", "algo=baseline", "data=folder", f"data.root={images}", "data.image_size=16", "target=folder",
                   f"target.data.root={images}", "train.validate_on=images", "transfer=all", *backbone, *words, "train.steps=2",
                   f"outputs={tmp_path}/out")  # fmt: skip
    assert done.status == 2, done.err
    assert "transfer.optimizer: Invalid" in done.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_image_is_not_augmented(tmp_path: Path) -> None:
    done = metarun("data=sinusoid", "backbone=mlp", "algo=maml", "augment=standard", f"outputs={tmp_path}/out")
    assert done.status == 2, done.err
    assert done.said == ["metarun: augment: changes images, but the items are vectors; leave augment out"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "missing"), [
    (["backbone=pretrained", "backbone.name=timm:resnet18"], "timm"),
    (["augment=standard"], "kornia"),
    (["hardware=cuda"], "CUDA"),
    (["backbone.from=nowhere"], "backbone.from=nowhere: there is no such run folder or file"),
    (["encoder=run", "encoder.from=nowhere"], "encoder.from=nowhere: there is no such run folder or file"),
    (["test.data=[folder]", "test.data.folder.root=nowhere"], "test.data.folder.root: there is no file or folder nowhere"),
    (["recipe=transfer", "algo=baseline", "target=folder", "target.data.root=nowhere"], "target.data.root: there is no file or folder"),
    (["hardware.processes=1000"], "hardware.processes=1000: processes share the tasks of a step, and train.tasks_per_step="),
])  # fmt: skip
def test_what_is_not_there_is_told_before_a_table_is_built(
    words: list[str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    for module in ("timm", "kornia", "kornia.augmentation"):
        monkeypatch.setitem(sys.modules, module, None)
    done = metarun("data=glyphs", *words, f"outputs={tmp_path}/out")
    assert done.status == 2, done.err
    assert missing in done.err
    assert len(done.said) == 1
    assert not list(tmp_path.iterdir())


class Downloading:
    """A data set of a user's own, which makes the folder that it is given."""

    def __init__(self, *, root: FilePath) -> None: ...


def test_a_folder_that_a_class_of_the_users_makes_need_not_be_there(tmp_path: Path) -> None:
    root = str(tmp_path / "nowhere")
    check_there("data", OmegaConf.create({"_target_": f"{__name__}.Downloading", "root": root}))
    with pytest.raises(UserError, match="there is no file or folder"):
        check_there("data", OmegaConf.create({"_target_": "metarun.data.folder.Folder", "root": root}))


@pytest.mark.parametrize("word", ["train.max_seconds=0", "encoder=tfidf"])
def test_a_training_that_may_have_no_step_is_not_refused_for_its_shares(word: str) -> None:
    words = ["train.tasks_per_step=1", "train.steps=5"]
    two = World(0, 2, 0, 2)
    Train().check(compose(*words, word), two)
    with pytest.raises(UserError, match="share the tasks of a step"):
        Train().check(compose(*words), two)


@pytest.mark.parametrize("word", ["target.train_images=20", "target.test_images=50"])
def test_sizes_of_subsets_are_refused_where_none_is_drawn(word: str) -> None:
    with pytest.raises(UserError, match="no use for it"):
        refuse_unread([word], [Train(), TargetTest()], True)
    refuse_unread([word], [Train(), Transfer()], True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 21474836480 bytes."
        ),
        MemoryError("Unable to allocate 20.0 GiB for an array with shape (2684354560,) and data type float64"),
    ],
    ids=["GPU", "torch", "numpy"],
)
def test_a_run_that_needs_more_memory_than_there_is_says_what_takes_less(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("metarun.stages.train.fit", no_room)
    done = metarun(*SINUSOID, f"outputs={tmp_path}/out")
    assert done.status == 2, done.err
    assert done.said[0].startswith("metarun: there is not enough memory (an array of 20.0 GiB)")
    assert "hardware.task_chunk=1" in done.said[0]
    assert len(done.said) == 1
