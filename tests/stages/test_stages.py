"""Recipes as lists of stages: their order, a stage of one's own, what each stage sees, and what is recorded of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import compose
from omegaconf import OmegaConf
from PIL import Image
from shell import ROOT, done, make_images, metarun, one_line, result

from metarun import files
from metarun.backbones.mlp import MLP
from metarun.core import Spec
from metarun.data.image_batches import Labelled
from metarun.data.image_source import ImageSource
from metarun.data.source import NoData
from metarun.engine import checkpoint
from metarun.engine.distributed import World
from metarun.errors import UserError
from metarun.report.collect import read
from metarun.runs import building, contents
from metarun.runs.run import Run
from metarun.stages import Continual, Load, MetaTest, Predict, Stage, TargetTest, Train, Transfer, train
from metarun.stages.base import check_order
from metarun.stages.compatibility import check_training
from metarun.stages.load import without_weights
from metarun.target.base import Bare

TRAIN, META_TEST = "{_target_: metarun.stages.Train}", "{_target_: metarun.stages.MetaTest}"
SMALL = ["data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2", "train.steps=4",
         "train.tasks_per_step=4", "train.validate_every=2", "train.validate_episodes=4", "test.episodes=6",
         "test.baseline_episodes=4"]  # fmt: skip
PRETRAIN = ["pretrain.train.steps=3", "pretrain.train.tasks_per_step=8", "pretrain.train.validate_every=2",
            "pretrain.train.validate_episodes=4"]  # fmt: skip
ON_TARGET = [
    "target=folder",
    "target.data.image_size=16",
    "target.repeats=2",
    "target.train_images=6",
    "target.test_images=6",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source"), per_class=12)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("target"), np.random.default_rng(0)
    for number in range(3):
        folder = root / f"kind{number}"
        folder.mkdir()
        for image in range(20):
            pixels = (draw.integers(0, 60, (12, 12, 3)) + 70 * number).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


def refused(*words: str, saying: str, outputs: Path) -> str:
    """The one line of a command that must not leave anything behind."""
    outcome = metarun(*words, f"outputs={outputs}")
    assert outcome.status == 2, outcome.err
    assert len(outcome.said) == 1, outcome.err
    assert re.search(saying, outcome.said[0]), outcome.said
    assert not outputs.exists()
    return outcome.said[0]


def only_run(outputs: Path) -> Path:
    (found,) = {path.parent for path in outputs.rglob("result.json")}
    return found


# The list of stages


@pytest.mark.parametrize(
    ("stages", "saying"),
    [
        ("[]", r"^metarun: recipe.stages: is empty"),
        (f"[{META_TEST},{TRAIN}]", r"MetaTest uses a learner, but no stage before .* must stand after train"),
        (f"[{META_TEST}]", r"MetaTest uses a learner.* add metarun.stages.Train before it"),
        ("[metarun.stages.train]", r"metarun.stages.train cannot be imported .*did you mean metarun.stages.Train"),
        ("[metarun.stages.train,metarun.stages.meta_test]", r"did you mean metarun.stages.Train"),
        ("[metarun.finetune]", r"metarun.finetune cannot be imported .*there are metarun.stages.Continual"),
        ("[metarun.algos.maml.MAML]", r"metarun.algos.maml.MAML is no stage"),
        ("[{name: x}]", r"recipe.stages\[0\]: has no _target_"),
        ("[{_target_: metarun.stages.Train, nam: x}]", r"nam: Train has no such setting; did you mean recipe\.stages\[0\]\.name"),
        ("[{_target_: metarun.stages.Train, start_from: pretrain}]", r"train.start_from=pretrain: no stage before it"),
        (f"[{TRAIN},{TRAIN}]", r"two stages have the name train"),
        ("[{_target_: metarun.stages.Train, algo: pretrain.algo}]", r"pretrain.algo: must be given"),
        ("[{_target_: metarun.stages.Train, train: pretrain.trian}]", r"train=pretrain.trian: is no part of .*pretrain.train\\?"),
        ("[metarun.stages.Transfer]", r"its stage Transfer needs a target"),
        ("[metarun.stages.Load,metarun.stages.MetaTest]", r"add checkpoint="),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_is_refused_in_one_line(stages: str, saying: str, images: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={images}", f"recipe.stages={stages}"]
    refused(*words, saying=saying, outputs=tmp_path / "outputs")


@pytest.mark.parametrize(
    ("order", "saying"),
    [
        ([Train(), MetaTest(), Train(name="second", start_from="train")], "MetaTest stands before second, whose learner"),
        ([Train(), Transfer(), Train(name="second")], "Transfer stands before second, whose learner"),
        ([Train(), MetaTest(), Continual()], r"MetaTest and Continual would write the same numbers of result.json, test/\*;"),
        ([Train(), Transfer(), TargetTest()], r"Transfer and TargetTest would write the same .*, target/\*;"),
        ([Load(), MetaTest(), Predict()], "Predict uses what checkpoint= learned, and Load a learner of this run;"),
    ],
)  # fmt: skip
def test_no_stage_takes_the_place_of_what_another_works_on_or_has_found(order: list[Stage], saying: str) -> None:
    with pytest.raises(UserError, match=f"^recipe.stages: {saying}"):
        check_order(order)


@pytest.mark.parametrize("word", ["train.noise.labels=0.3", "train.noise.labels=0.8"])  # the latter is the default
def test_noise_of_no_task_is_told(word: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    told = metarun(*SMALL, f"data.root={images}", "algo=protonet", word, f"outputs={tmp_path / 'out'}")
    assert told.status == 0, told.err
    said = f"{word}: no training task has wrong labels, for train.noise.tasks is 0"
    assert (said in told.err) == (word == "train.noise.labels=0.3")


def test_a_target_of_other_classes_is_not_tested_without_its_labels() -> None:
    algorithm = SimpleNamespace(has_classes=True, spec=SimpleNamespace(outputs=3), uses_target="images")
    run: Any = SimpleNamespace(target=SimpleNamespace(names=["a", "b"]), algorithm=algorithm)
    with pytest.raises(
        UserError, match=r"^target: has 2 classes, but the source 3; .*; use recipe=transfer, which trains on them$"
    ):
        TargetTest().prepare(run)


def test_orders_in_which_all_that_is_done_is_used_are_allowed() -> None:
    check_order([Train(name="first"), Train(start_from="first"), Transfer(), MetaTest()])
    check_order([Load(), MetaTest()])
    check_order([Predict()])


def test_a_meta_test_and_a_target_leave_scores_of_their_own(images: Path, target: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={images}", *ON_TARGET, f"target.data.root={target}", "transfer=nearest_centroid"]
    done(*words, f"recipe.stages=[{TRAIN},metarun.stages.Transfer,{META_TEST}]", f"outputs={tmp_path}")
    folder = only_run(tmp_path)
    found = result(folder)
    for name, key in (("", "test/acc"), ("target", "target/acc")):
        with np.load(folder / contents.scores_file(name)) as stored:
            assert stored["values"][-1].mean() == pytest.approx(found[key])
    scores = read(folder).scores()
    assert scores is not None
    assert scores.mean() == pytest.approx(found["target/acc"])


def test_a_meta_test_within_a_stage_that_does_not_say_so_is_refused(tmp_path: Path) -> None:
    run = Run(compose(), [], World(), tmp_path, NoData(), None)
    with pytest.raises(
        UserError, match=r"^recipe.stages: MetaTest is carried out within a stage that .* meta_tests = True"
    ):
        MetaTest().prepare(run)


def test_a_method_on_batches_that_tells_no_classes_apart_is_not_validated_on_images() -> None:
    class Contrasting(Bare):
        trains_on = "batches"

    method = Contrasting(MLP(input_shape=(2,)), Spec((2,), "classification", 2))
    settings = compose("train.validate_on=images").train
    with pytest.raises(UserError, match=r"^train.validate_on=images: Contrasting does not define classify and has no"):
        check_training(method, settings, World(), "train", None)


def test_what_a_method_cannot_train_on_is_refused_in_one_line(images: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={images}", "algo=rfs", "algo.distill=true"]
    refused(*words, saying=r"^metarun: algo.distill=true: needs a teacher", outputs=tmp_path / "outputs")
    for pretrain in ("baseline_plus_plus", "protonet"):
        words = [*SMALL, *PRETRAIN, f"data.root={images}", "recipe=distill", f"algo@pretrain={pretrain}"]
        refused(
            *words, saying=r"^metarun: algo.distill=true: the teacher must be a linear", outputs=tmp_path / "outputs"
        )


def test_a_stage_that_is_there_and_cannot_be_imported_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> type:
        raise ImportError(f"{name} needs something")

    monkeypatch.setattr(building, "get_class", broken)
    stage = "metarun.stages.MetaTest"
    config = OmegaConf.create({"recipe": {"stages": [stage]}})
    with pytest.raises(UserError, match=rf"^recipe.stages: {stage} cannot be imported \({stage} needs something\)$"):
        building.build_stages(config)


def test_transfer_before_training_and_training_without_a_source_are_refused(
    images: Path, target: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"data.root={images}", *ON_TARGET, f"target.data.root={target}", "transfer=nearest_centroid"]
    first = f"recipe.stages=[metarun.stages.Transfer,{TRAIN}]"
    refused(*words, first, saying=r"Transfer stands before train", outputs=tmp_path / "outputs")
    sourceless = [f"recipe.stages=[{TRAIN},metarun.stages.Transfer]", "recipe.source=false"]
    refused(*words, *sourceless, saying=r"recipe.source=false: its stage train trains", outputs=tmp_path / "outputs")


def test_stages_by_class_alone_are_the_same_run(images: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={images}"]
    done(*words, f"outputs={tmp_path / 'recipe'}")
    listed = "recipe.stages=[metarun.stages.Train,metarun.stages.MetaTest]"
    done(*words, listed, f"outputs={tmp_path / 'listed'}")
    recipe, by_class = (result(only_run(tmp_path / name)) for name in ("recipe", "listed"))
    for key in ("test/acc", "val/score", "untrained/acc", "protocol"):
        assert recipe[key] == by_class[key]


def test_a_stage_around_a_training_tells_all_that_the_training_tells(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "around_training", raising=False)
    (tmp_path / "around_training.py").write_text(
        "from metarun.runs.run import Run\nfrom metarun.stages import Stage, Train\n\n\nclass Around(Stage):\n"
        '    """Around."""\n\n    gives_weights = True\n\n    def __init__(self) -> None:\n        self.training = Train()\n\n'
        + "".join(
            f"    def {name}(self, run: Run):\n        return self.training.{name}(run)\n\n"
            for name in ("prepare", "execute", "protocol")
        )
    )
    told = []
    for stage in ("metarun.stages.Train", "around_training.Around"):
        words = [*SMALL, f"data.root={images}", "algo=baseline", "train.validate_on=images", f"recipe.stages=[{stage}]"]
        done(*words, f"outputs={tmp_path / stage}")
        told.append(result(only_run(tmp_path / stage))["protocol"])
    assert told[0] == told[1]
    assert "labelled_images" in told[0]


@pytest.mark.parametrize(
    ("stage", "saying"),
    [
        ("algo: pretrain.algo", "pretrain.algo: must be given"),
        ("train: pretrain.trian", "train=pretrain.trian: is no part of the config"),
        ("train: pretrain.train", "pretrain.train.optimizer: has no _target_"),
    ],
)
def test_what_a_stage_trains_by_is_looked_for_before_the_data(stage: str, saying: str) -> None:
    config = compose("algo=protonet", f"recipe.stages=[{{_target_: metarun.stages.Train, {stage}}}]")
    (built,) = building.build_stages(config)
    with pytest.raises(UserError, match=re.escape(saying)):
        built.check(config, World())


def test_the_example_of_the_readme(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder, by its recipe and by its class."""
    text = (ROOT / "metarun" / "stages" / "README.md").read_text()
    (module,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "calibration", raising=False)
    (tmp_path / "calibration.py").write_text(module)
    (tmp_path / "my_conf" / "recipe").mkdir(parents=True)
    (tmp_path / "my_conf" / "recipe" / "calibrate.yaml").write_text(recipe)
    words = [*SMALL, f"data.root={images}"]
    done("--config-dir", "my_conf", "recipe=calibrate", *words, "outputs=by_recipe")
    done(
        *words,
        "recipe.stages=[metarun.stages.Train,{_target_: calibration.Calibration, episodes: 50}]",
        "outputs=by_class",
    )
    one, other = (result(only_run(Path(name))) for name in ("by_recipe", "by_class"))
    assert one["calibration/overconfidence"] == other["calibration/overconfidence"]
    assert one["test/acc"] == other["test/acc"]
    assert one["protocol"]["test"] == {"ways": 3, "shots": 1, "queries": 2}
    wrong = metarun(
        "--config-dir",
        "my_conf",
        "recipe=calibrate",
        *words,
        "recipe.stages=[{_target_: calibration.Calibration, episods: 5}]",
    )
    assert "did you mean recipe.stages[0].episodes" in wrong.said[0]


def test_weights_that_are_kept_apart_are_found_wherever_all_was_moved(
    images: Path, target: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    words = ["recipe=transfer", *SMALL, *ON_TARGET, f"data.root={images}", f"target.data.root={target}"]
    done(*words, "transfer=nearest_centroid", f"outputs={outputs}")
    run = only_run(outputs)
    (stage,) = (outputs / "stages").iterdir()
    assert checkpoint.weights_file("checkpoint", str(run)) == checkpoint.chosen(stage)
    elsewhere = outputs.rename(tmp_path / "elsewhere")
    now = elsewhere / run.relative_to(outputs)
    assert checkpoint.weights_file("checkpoint", str(now)).parent == elsewhere / "stages" / stage.name
    shutil.rmtree(elsewhere / "stages")
    with pytest.raises(UserError, match=rf"^checkpoint={now}: its weights are those of {stage}, where none are"):
        checkpoint.weights_file("checkpoint", str(now))


# What the protocol says of a training


def test_each_training_says_what_it_was_and_one_without_steps_nothing(images: Path, tmp_path: Path) -> None:
    noise = ["train.noise.tasks=0.5", "pretrain.train.max_seconds=60", "train.max_seconds=60"]
    done(
        "recipe=pretrain_meta", "algo=protonet", *SMALL, *PRETRAIN, *noise, f"data.root={images}", f"outputs={tmp_path}"
    )
    told = result(only_run(tmp_path))["protocol"]
    assert told["train"] == {"ways": 3, "shots": 1, "queries": 2}
    assert told["pretrain/train"]["images_per_step"] == 8
    assert told["train_noise"]["tasks"] == 0.5
    assert "pretrain/train_noise" not in told
    assert told["budget"].startswith("train.max_seconds: the clock ends the training")
    assert told["pretrain/budget"].startswith("pretrain.train.max_seconds: the clock ends the training")
    done("algo=protonet", *SMALL, *noise[::2], f"data.root={images}", f"outputs={tmp_path / 'none'}", "train.steps=0")
    told = result(only_run(tmp_path / "none"))["protocol"]
    assert told["seen"] == {"train": "none: nothing was trained"}
    assert not {"train", "train_noise", "budget"} & told.keys()


# What a digest is made of


def digests(run: Run) -> dict[str, str]:
    """By the name of a training stage the digest of all that its weights depend on."""
    return {str(stage): files.digest(stage.depends_on(run)) for stage in run.stages if stage.gives_weights}


def prepared(*words: str, before: Run | None = None) -> Run:
    """A run that nobody carries out; `before` is one of the same data."""
    return building.prepare(compose(*words), Path("nowhere"), World(), before)


DEPENDS = {
    "pretrain train": [
        "seed=1", "backbone.channels=5", "hardware.autocast=bfloat16", "augment=standard",
        "pretrain.train.steps=2", "pretrain.train.optimizer.lr=0.3", "pretrain.train.validate_episodes=5",
        "pretrain.algo.cosine=true", "test.task.queries=3",
        "data.normalize=false", "data.rotations=true", "data.image_size=20", "data.split_seed=1",
    ],
    "train": [
        "algo.inner_lr=0.3", "wrapper=metamix", "train.steps=5", "train.optimizer.lr=0.3", "train.task.shots=2",
        "train.noise.tasks=0.5", "train.validate_every=1", "train.clip_norm=9",
    ],
    "": [
        "outputs=elsewhere", "resume=false", "name=own", "runs=[1]", "hardware.device=cpu", "hardware.channels_last=true",
        "hardware.processes=1", "hardware.threads=2", "hardware.vectorize=false", "hardware.record=false",
        "hardware.task_chunk=2", "train.save_every=1", "pretrain.train.save_seconds=9", "test.episodes=7",
    ],
}  # fmt: skip


def test_weights_depend_on_what_moves_a_number_and_on_nothing_else(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest without one of these would take the weights of one run for those of another in silence."""
    shutil.copytree(images, tmp_path / "copy")
    words = ["recipe=pretrain_meta", "algo=maml", *SMALL, *PRETRAIN, f"data.root={images}"]
    run = prepared(*words)
    plain = digests(run)
    for stages, changes in {**DEPENDS, "": [*DEPENDS[""], f"data.root={tmp_path / 'copy'}"]}.items():
        for change in changes:
            found = digests(prepared(*words, change, before=None if change.startswith("data.") else run))
            assert " ".join(name for name in plain if found[name] != plain[name]) == stages, change
    with monkeypatch.context() as earlier:
        earlier.setattr(train, "RULES", 1)
        assert set(digests(run).values()).isdisjoint(plain.values())
    run.config.hardware.tf32 = True  # which a CPU refuses
    assert set(digests(run).values()).isdisjoint(plain.values())


def test_weights_depend_on_the_classes_that_they_may_see_and_on_the_target_that_they_are_trained_on(
    images: Path, target: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(target, tmp_path / "target"))
    (target / "kind3").mkdir()
    for number in range(4):
        Image.new("L", (12, 12), 60 * number).save(target / "kind3" / f"{number}.png")
    words = [*SMALL, f"data.root={images}", *ON_TARGET, f"target.data.root={target}", "transfer=nearest_centroid"]

    def found(*more: str) -> dict[str, str]:
        return digests(prepared("recipe=transfer", *words, *more))

    closed = f"recipe.stages=[{TRAIN},metarun.stages.Transfer,{META_TEST}]"
    assert found() == found("target.data.normalize=false") != found(closed)
    adapted = ["algo=coral", "backbone.norm=group"]
    assert found(*adapted) != found(*adapted, "target.data.normalize=false")
    # It leaves a class out, of the same images.
    assert found(*adapted, "target.min_images=3") != found(*adapted, "target.min_images=5")


def test_a_search_watches_the_training_whose_score_it_goes_by(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def watch(step: int, score: float) -> bool:
        asked.append(step)
        return False

    monkeypatch.setattr("metarun.runs.carry_out.watcher", lambda folder: watch)
    done("recipe=pretrain_meta", "algo=maml", *SMALL, *PRETRAIN, f"data.root={images}", f"outputs={tmp_path}")
    assert asked == [2, 4]  # and none of the pretraining, at 2 and 3


def test_pretraining_is_done_once_whether_a_wrapper_follows_or_not(images: Path, tmp_path: Path) -> None:
    words = ["recipe=pretrain_meta", "algo=maml", *SMALL, *PRETRAIN, f"data.root={images}", f"outputs={tmp_path}"]
    done(*words)
    done(*words, "wrapper=metamix")
    assert len(list((tmp_path / "stages").iterdir())) == 1
    done(*words, "pretrain.train.steps=2")
    assert len(list((tmp_path / "stages").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["algo=simpleshot", "train.task.labelled_share=0.5"],
         "train.task.labelled_share=0.5: is of training tasks, but SimpleShot trains on batches of all labelled images; .*, "
         "or allow it all labels: train.task.labelled_share=1$"),
        (["algo=simpleshot", "task.labelled_share=0.5", "task.unlabelled=1"], "task.labelled_share=0.5: is of training tasks"),
        (["algo=simpleshot", "train.task.unlabelled=2"], "train.task.unlabelled=2: is of training tasks, but SimpleShot"),
        (["recipe=pretrain_meta", *PRETRAIN, "train.task.labelled_share=0.5"],
         "train.task.labelled_share=0.5: is of training tasks, but Baseline trains on batches"),
        (["recipe=pretrain_meta", *PRETRAIN, "pretrain.train.task.labelled_share=0.5"],
         "pretrain.train.task.labelled_share=0.5: is of training tasks"),
        (["recipe=pretrain_meta", *PRETRAIN, "task.labelled_share=0.5", "train.task.labelled_share=1"], ""),
        (["recipe=pretrain_meta", *PRETRAIN, "train.task.labelled_share=0.5", "pretrain.train.task.labelled_share=1"], ""),
        (["algo=simpleshot", "task.unlabelled=1", "test.task.labelled_share=0.5"], ""),
        (["algo=simpleshot", "task.labelled_share=0.5", "train.steps=0"], ""),
    ],
)  # fmt: skip
def test_batches_of_all_labels_are_no_share_of_them(
    words: list[str], saying: str, images: Path, tmp_path: Path
) -> None:
    line = [*SMALL, *words, f"data.root={images}"]
    if saying:
        refused(*line, saying=saying, outputs=tmp_path / "out")
    else:
        done(*line, f"outputs={tmp_path}")


# Folders


def test_a_recipe_of_ones_own_without_a_source_is_named_by_what_it_uses(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    recipe = {"recipe": {"stages": ["metarun.stages.Transfer"], "source": False}, "backbone": {"norm": "running"}}
    (tmp_path / "mine" / "recipe" / "alone.yaml").write_text("# @package _global_\n" + yaml.safe_dump(recipe))
    words = ["--config-dir", "mine", "recipe=alone", *ON_TARGET, f"target.data.root={target}", "backbone.channels=4",
             "transfer=nearest_centroid"]  # fmt: skip
    done(*words)
    assert only_run(tmp_path / "outputs").parent.name == "folder-nearest_centroid"
    own = [*words[:-1], "transfer=own", "task.ways=3"]
    done(*own, "algo=protonet")
    done(*own, "algo=simpleshot")  # another method, another folder
    assert len(list((tmp_path / "outputs" / "folder-own").iterdir())) == 2


# What is seen


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, set[str]]]:
    """What was asked of a data set's labelled images: the part, the split, and the names of their classes."""
    asked: list[tuple[Any, Any, set[str]]] = []
    honest = ImageSource.labelled

    def noting(self: ImageSource, part: Any, split: Any = None) -> Labelled:
        found = honest(self, part, split)
        asked.append((part, split, set(found.names)))
        return found

    monkeypatch.setattr(ImageSource, "labelled", noting)
    return asked


@pytest.mark.parametrize(
    "words",
    [
        ["algo=baseline", "train.validate_on=images"],
        ["recipe=train", "algo=baseline", "train.validate_on=images"],
        ["recipe=pretrain_meta", "algo=protonet", "pretrain.train.validate_on=images", *PRETRAIN],
        ["recipe=distill", "pretrain.train.validate_on=images", "train.validate_on=images", *PRETRAIN],
        ["algo=baseline", "train.validate_on=images", f"recipe.stages=[{TRAIN},metarun.stages.Transfer,{META_TEST}]"],
    ],
    ids=["meta", "train", "pretrain_meta", "distill", "own"],
)
def test_before_a_meta_test_images_are_of_training_classes_alone(
    words: list[str], images: Path, target: Path, tmp_path: Path, labelled: list[tuple[Any, Any, set[str]]]
) -> None:
    more = [*ON_TARGET, f"target.data.root={target}", "transfer=nearest_centroid"] if "Transfer" in words[-1] else []
    done(*words, *SMALL, *more, f"data.root={images}", f"outputs={tmp_path}", "train.steps=2")
    source = [each for each in labelled if not any(name.startswith("kind") for name in each[2])]
    assert source
    assert {split for _, split, _ in source} == {"train"}
    assert ("val", "train") in {(part, split) for part, split, _ in source}
    found = result(only_run(tmp_path))
    assert "classes" in next(iter(found["protocol"]["seen"].values()))
    assert "all classes" not in str(found["protocol"]["seen"])


def test_a_transfer_alone_sees_all_classes_and_says_so(images: Path, target: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={images}", *ON_TARGET, f"target.data.root={target}", "transfer=nearest_centroid"]
    done("recipe=transfer", *words, "train.validate_on=images", f"outputs={tmp_path}")
    seen = result(only_run(tmp_path))["protocol"]["seen"]["train"]
    assert seen == "the training images of all classes; for validation held-out images of the same classes"
    (stage,) = (tmp_path / "stages").iterdir()
    (classes,) = torch.load(stage / "best.pt", weights_only=True)["seen"].values()
    assert list(classes) == list(range(12))
    assert json.loads((stage / "content.json").read_text())["classes"] == "all"


def test_weights_that_have_seen_the_test_classes_are_not_meta_tested(
    images: Path, target: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"data.root={images}", *ON_TARGET, f"target.data.root={target}", "transfer=nearest_centroid"]
    done("recipe=transfer", *words, "train.validate_on=images", f"outputs={tmp_path / 'open'}")
    origin = only_run(tmp_path / "open")
    again = [*SMALL, f"data.root={images}", "backbone.norm=running", f"backbone.from={origin}"]
    refused(
        *again, saying=r"backbone.from=.* was trained on images of 4 of the 4 classes", outputs=tmp_path / "outputs"
    )
    encoded = [
        "algo=protonet",
        "task.ways=2",
        "task.queries=1",
        f"data.root={images}",
        "data=folder",
        "data.image_size=16",
    ]
    outcome = metarun(*encoded, "encoder=run", f"encoder.from={origin}", f"outputs={tmp_path / 'outputs'}")
    assert outcome.status == 2
    assert re.search(r"encoder.from=.* was trained on images of 4 of the 4 classes", outcome.said[-1])
    assert not (tmp_path / "outputs").exists()
    other = make_images(tmp_path / "other", classes=3)
    for number, path in enumerate(sorted(other.glob("*/*"))):
        path.rename(path.with_name(f"other{number}"))
    done(*again[:-1], f"data.root={other}", again[-1], f"outputs={tmp_path / 'other_data'}")
    # What a later stage of weights was trained on does not make what came before unseen.
    best = torch.load(only_run(tmp_path / "other_data") / "best.pt", weights_only=True)
    assert len(best["seen"]) == 2


ONE_BY_ONE = ["continual.images=3", "continual.test_images=3", "continual.orders=2"]


@pytest.mark.parametrize(
    "words",
    [["algo=baseline"], ["algo=protonet"], ["recipe=continual", "algo=oml", "train.task.ways=2", *ONE_BY_ONE]],
    ids=["batches", "episodes", "sequences"],
)
def test_two_classes_are_tested_on_images_that_were_trained_on_and_the_run_says_so(
    words: list[str], target: Path, images: Path, tmp_path: Path
) -> None:
    for kind in ("kind0", "kind1"):
        shutil.copytree(target / kind, tmp_path / "two" / kind)
    small = [*SMALL, "task.ways=2", "train.steps=1", "backbone.norm=group", f"data.root={tmp_path / 'two'}"]
    same = "too few classes to divide; training and tests have the same ones, and the same images"
    outcome = done(*small, *words, f"outputs={tmp_path / 'run'}")
    assert outcome.err.count("too few classes") == outcome.err.count(same) == 1
    run = only_run(tmp_path / "run")
    assert result(run)["protocol"]["trained_on_tests"] == same
    assert result(run)["protocol"]["split"] == "all 2 classes in every split, too few to divide"
    if words == ["algo=baseline"]:  # a test of its weights says it too
        assert same in done("recipe=test", "test.episodes=5", f"checkpoint={run}", f"outputs={tmp_path / 'again'}").err
        assert result(only_run(tmp_path / "again"))["protocol"]["trained_on_tests"] == same
    if words == ["algo=protonet"]:  # unless it is on other images
        new = ["data=folder", f"data.root={images}", "data.image_size=16"]
        assert same not in done("recipe=test", *new, f"checkpoint={run}", f"outputs={tmp_path / 'other'}").err
        assert "trained_on_tests" not in result(only_run(tmp_path / "other"))["protocol"]


def test_an_adapted_run_is_not_meta_tested_by_its_checkpoint(target: Path, tmp_path: Path) -> None:
    command = ["recipe=domain_adaptation", "algo=baseline", "data=folder", f"data.root={target}", "data.image_size=16",
               "backbone.channels=4", "train.steps=2", "train.tasks_per_step=8", "target=folder", "target.data.image_size=16",
               f"target.data.root={target}", f"outputs={tmp_path / 'adapted'}"]  # fmt: skip
    done(*command)
    folder = only_run(tmp_path / "adapted")
    refused("recipe=test", f"checkpoint={folder}", "task.ways=1", saying=r"^metarun: checkpoint=.*was trained on images of 1 of the 1",
            outputs=tmp_path / "outputs")  # fmt: skip
    old = tmp_path / "old"
    shutil.copytree(folder, old)  # as an older version wrote it
    best = torch.load(old / "best.pt", weights_only=True)
    del best["seen"]
    torch.save(best, old / "best.pt")
    refused(
        "recipe=test",
        f"checkpoint={old}",
        "task.ways=1",
        saying=r"was trained on images of",
        outputs=tmp_path / "outputs",
    )


# What did not happen is not recorded


def test_target_only_records_no_source_and_no_method(target: Path, tmp_path: Path) -> None:
    words = [
        "recipe=target_only",
        *ON_TARGET,
        f"target.data.root={target}",
        "backbone.channels=4",
        "transfer=nearest_centroid",
    ]
    done(*words, f"outputs={tmp_path}")
    folder = only_run(tmp_path)
    found, config = result(folder), yaml.safe_load((folder / "config.yaml").read_text())
    assert not {"algo", "data", "train", "pretrain", "test", "task", "wrapper"} & config.keys()
    assert not {"algo", "data", "preset", "optimizer", "schedule"} & found["choices"].keys()
    assert not {"train", "test", "split", "test_inner_steps"} & found["protocol"].keys()
    assert "data" not in found
    assert found["target/data"]["fingerprint"]
    assert "finished before" in done(*words, f"outputs={tmp_path}").out
    report = done("recipe=report", f"runs={tmp_path}", f"outputs={tmp_path}")
    assert "folder as the target, 6 training images" in report.out
    with_own = done("recipe=target_only", *words[1:-1], "transfer=own", "task.ways=3", f"outputs={tmp_path / 'own'}")
    assert with_own.status == 0
    assert result(only_run(tmp_path / "own"))["choices"]["algo"] == "protonet"


def test_the_target_alone_has_no_use_for_a_method_and_a_source(target: Path, tmp_path: Path) -> None:
    words = ["recipe=target_only", *ON_TARGET, f"target.data.root={target}", "backbone.channels=4", "transfer=all",
             "transfer.steps=3"]  # fmt: skip
    refused = metarun(*words, "algo=mtl", "data=digits", f"outputs={tmp_path / 'refused'}")
    one_line(refused, "algo=mtl, data=digits: this recipe has no use for them; it uses the target alone")
    assert not (tmp_path / "refused").exists()
    # With others, that have one.
    done(*words, "approach=scratch", "algo=mtl", "data=digits", f"outputs={tmp_path / 'compared'}")
    done(*words, f"outputs={tmp_path / 'alone'}")
    one, other = (result(only_run(tmp_path / name)) for name in ("compared", "alone"))
    assert (one["target/acc"], one["parameters"]) == (other["target/acc"], other["parameters"])


@pytest.mark.parametrize(("every", "chosen"), [(4, False), (2, True)])
def test_one_validation_is_no_choice(every: int, chosen: bool, images: Path, tmp_path: Path) -> None:
    words = ["algo=protonet", *SMALL, f"data.root={images}", "train.steps=4", f"train.validate_every={every}"]
    shown = done(*words, f"outputs={tmp_path}")
    found = result(only_run(tmp_path))
    assert ("best on validation" in shown.out) == chosen
    assert ("no selection" in found["protocol"]["selected_by"]) != chosen
    assert 0 <= found["val/score"] <= 1


@pytest.mark.parametrize(
    ("recipe", "algo", "taken"), [("pretrain_meta", "meta_baseline", True), ("distill", "rfs", False)]
)
def test_without_a_step_the_weights_are_those_of_the_stage_before(
    recipe: str, algo: str, taken: bool, images: Path, tmp_path: Path
) -> None:
    """But for a student, which the stage before only teaches."""
    words = [f"recipe={recipe}", f"algo={algo}", *SMALL, f"data.root={images}", "train.steps=0", "pretrain.train.steps=2",
             "pretrain.train.validate_every=1", "pretrain.train.tasks_per_step=8"]  # fmt: skip
    shown = done(*words, f"outputs={tmp_path}")
    (path,) = tmp_path.glob("*/*/result.json")
    selected = result(path.parent)["protocol"]["selected_by"]
    assert selected == ("pretrain: best validation score" if taken else "no selection: nothing was trained")
    assert f"tested: the weights {'that pretrain left' if taken else 'as they were'}" in shown.out


def test_no_step_is_no_choice(images: Path, tmp_path: Path) -> None:
    words = ["algo=simpleshot", *SMALL, f"data.root={images}", "train.steps=0"]
    shown = done(*words, f"outputs={tmp_path / 'tested'}")
    folder = only_run(tmp_path / "tested")
    found = result(folder)
    assert found["protocol"]["selected_by"] == "no selection: nothing was trained"
    assert "val/score" not in found
    assert not (folder / "metrics.jsonl").exists()  # nothing was validated
    assert "best" not in shown.out
    assert found["protocol"]["seen"] == {"train": "none: nothing was trained"}
    assert not (folder / "best.pt").exists()
    assert "untrained/acc" not in found  # it would be the same test again
    again = done("recipe=test", f"checkpoint={folder}", f"outputs={tmp_path / 'again'}")
    assert again.status == 0
    assert result(only_run(tmp_path / "again"))["test/acc"] == found["test/acc"]
    # Without a test the validation is what the run is for: a search chooses by it.
    done(*words, "recipe=train", f"outputs={tmp_path / 'validated'}")
    assert 0 <= result(only_run(tmp_path / "validated"))["val/score"] <= 1
    words[-1] = "train.max_seconds=0"
    done(*words, f"outputs={tmp_path / 'seconds'}")
    told = result(only_run(tmp_path / "seconds"))
    assert told["protocol"]["selected_by"] == found["protocol"]["selected_by"]
    assert (told["test/acc"], "val/score" in told, "untrained/acc" in told) == (found["test/acc"], False, False)


def test_what_was_pretrained_is_tested_though_no_step_follows(images: Path, tmp_path: Path) -> None:
    words = [
        *SMALL,
        f"data.root={images}",
        "recipe=pretrain_meta",
        "algo=mamlplusplus",
        "algo.inner_steps=2",
        "train.steps=0",
    ]
    words += ["pretrain.train.steps=4", "pretrain.train.tasks_per_step=8", "pretrain.train.optimizer.lr=0.1"]
    done(*words, f"outputs={tmp_path}", "name=made")
    (folder,) = (path.parent for path in tmp_path.glob("made/*/result.json"))
    assert "untrained/acc" in result(folder)  # what was pretrained has moved it
    assert checkpoint.weights_file("checkpoint", str(folder)) == folder / "last.pt"
    done("recipe=test", f"checkpoint={folder}", f"outputs={tmp_path}", "name=again")
    (again,) = (path.parent for path in tmp_path.glob("again/*/result.json"))
    assert result(again)["test/acc"] == result(folder)["test/acc"]


def test_weights_from_elsewhere_are_not_called_untrained(images: Path, tmp_path: Path) -> None:
    words = ["algo=protonet", *SMALL, f"data.root={images}"]
    done(*words, f"outputs={tmp_path / 'first'}")
    first = only_run(tmp_path / "first")
    shown = done(*words, f"backbone.from={first}", f"outputs={tmp_path / 'second'}")
    found = result(only_run(tmp_path / "second"))
    assert "untrained/acc" in result(first)
    assert "untrained/acc" not in found
    assert 0 <= found["before_training/acc"] <= 1
    assert "before meta-training" in shown.out
    assert "untrained" not in shown.out


def test_weights_by_name_are_read_where_an_older_result_does_not_say_what_images_they_expect() -> None:
    """They decide on it, and `images_of` says it in the blueprints of this version."""
    settings = {"_target_": "metarun.backbones.pretrained.Pretrained", "name": "timm:test_resnet", "from": None}
    own = {"weights": "r160_in1k", "checksum": None, "image_size": None, "images_of": None}

    def loaded(known: dict[str, Any], **changes: Any) -> dict[str, Any]:
        blueprint = {**settings, "weights": None, **known}
        stored = {"learner": {"blueprint": {"backbone": blueprint}}}
        found = OmegaConf.to_container(without_weights(OmegaConf.create({**settings, **own, **changes}), stored))
        assert isinstance(found, dict)
        return {name: found[name] for name in ("weights", "image_size", "images_of")}

    told = {"image_size": 160, "images_of": "r160_in1k"}
    assert loaded(told) == {"weights": None, **told}
    assert loaded({"image_size": 160}) == {"weights": "r160_in1k", "image_size": None, "images_of": None}
    assert loaded({}) == {"weights": "r160_in1k", "image_size": None, "images_of": None}
    assert loaded({}, **told) == {"weights": None, **told}
    assert loaded({"image_size": 160}, weights="pretrained") == {"weights": None, "image_size": 160, "images_of": None}
