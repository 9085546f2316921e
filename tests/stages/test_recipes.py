"""Only testing a finished run, and a user's own method."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from helpers import compose
from shell import SINUSOID, make_images, metarun, result, run_folder

from metarun.engine.distributed import World
from metarun.errors import UserError
from metarun.runs.continuation import refuse_untrained, with_checkpoint
from metarun.stages import Load, MetaTest

SMALL = ["data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2", "train.steps=4",
         "train.tasks_per_step=2", "train.validate_every=2", "train.validate_episodes=4", "test.episodes=6",
         "test.baseline_episodes=4"]  # fmt: skip


class Made(NamedTuple):
    """Images, and a finished run of each of two methods on them."""

    images: Path
    protonet: Path
    maml: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    images = make_images(root / "images")
    for algo in ("protonet", "maml"):
        done = metarun(*SMALL, f"data.root={images}", f"algo={algo}", f"outputs={root / algo}")
        assert done.status == 0, done.err
    return Made(images, run_folder(root / "protonet"), run_folder(root / "maml"))


def numbers(folder: Path) -> dict[str, object]:
    """The numbers that testing makes."""
    return {
        name: value for name, value in result(folder).items() if name.split("/")[0] in ("test", "untrained", "chance")
    }


@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_testing_again_gives_the_same_numbers(algo: str, made: Made, tmp_path: Path) -> None:
    run: Path = getattr(made, algo)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = metarun("recipe=test", f"checkpoint={run}", f"outputs={tmp_path}")
    assert done.status == 0, done.err
    folder = run_folder(tmp_path)
    assert folder.parent.name == f"folder-{algo}"
    assert numbers(folder) == numbers(run)
    found, protocol = result(folder), result(folder)["protocol"]
    assert protocol == {**result(run)["protocol"], "selected_by": "the checkpoint that was given"}
    assert "train/steps" not in found
    assert found["checkpoint/step"] == result(run)["train/selected_step"]
    assert found["data"] == result(run)["data"]
    assert not list(folder.glob("*.pt"))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    again = metarun("recipe=test", f"checkpoint={run}", f"outputs={tmp_path}")
    assert "finished before" in again.out


def test_a_run_leaves_what_a_comparison_needs(made: Made) -> None:
    for run, steps in ((made.protonet, 1), (made.maml, 2)):  # after 0 and 1 inner steps
        found, scores = result(run), np.load(run / "test_scores.npz")
        assert scores["values"].shape == (steps, found["test/episodes"])
        assert len(scores["steps"]) == steps
        assert scores["values"][-1].mean() == pytest.approx(found["test/acc"], abs=1e-12)
        assert found["choices"]["algo"] == run.parent.name.partition("-")[2]
        assert found["choices"]["data"] == "folder"
        assert found["peak_memory"]["host"] > 50e6  # an interpreter with torch


@pytest.mark.parametrize("old", ["around", "finetune"])
def test_a_run_of_before_keys_were_renamed(old: str, made: Made, tmp_path: Path) -> None:
    """It is tested while what was renamed is off, and refused in a line where it is set."""
    new = {"around": "wrapper", "finetune": "transfer"}[old]
    run = tmp_path / "run"
    shutil.copytree(made.protonet, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[old] = config.pop(new)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    done = metarun("recipe=test", f"checkpoint={run}", f"outputs={tmp_path / 'off'}")
    assert done.status == 0, done.err
    config[old] = {"_target_": "somewhere.Old"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    done = metarun("recipe=test", f"checkpoint={run}", f"outputs={tmp_path / 'set'}")
    assert done.status == 2
    assert done.said == [
        f"metarun: {run / 'config.yaml'}: is of an older version of metarun: its key {old} is called {new} now"
    ]
    assert not (tmp_path / "set").exists()


def test_testing_weights_by_file(made: Made, tmp_path: Path) -> None:
    """`last.pt` is another checkpoint than `best.pt`, in a folder of its own."""
    for name in ("best.pt", "last.pt"):
        assert metarun("recipe=test", f"checkpoint={made.maml / name}", f"outputs={tmp_path / name}").status == 0
    assert numbers(run_folder(tmp_path / "best.pt")) == numbers(made.maml)


def test_testing_with_other_tasks(made: Made, tmp_path: Path) -> None:
    """`task` is that of the test here: what was trained stays a fact of the checkpoint."""
    words = ["task.ways=4", "task.shots=3", "test.task.queries=1", "test.episodes=5", "seed=1"]
    done = metarun("recipe=test", f"checkpoint={made.protonet}", *words, f"outputs={tmp_path}")
    assert done.status == 0, done.err
    found = result(run_folder(tmp_path))
    assert found["protocol"]["test"] == {"ways": 4, "shots": 3, "queries": 1}
    assert found["protocol"]["train"] == {"ways": 3, "shots": 1, "queries": 2}
    assert (found["test/episodes"], found["chance/acc"]) == (5, 0.25)
    other = metarun("recipe=test", f"checkpoint={made.maml}", "task.shots=2", f"outputs={tmp_path / 'maml'}")
    assert other.status == 0, other.err


def test_testing_on_other_data(made: Made, tmp_path: Path) -> None:
    """Folders of their own, and numbers of their own."""
    make_images(tmp_path / "images", classes=5, per_class=4)
    words = ["recipe=test", f"checkpoint={made.protonet}", f"outputs={tmp_path / 'outputs'}"]
    assert metarun(*words, "data=folder", f"data.root={made.images}", "data.image_size=16").status == 0
    done = metarun(*words, "data=folder", f"data.root={tmp_path / 'images'}", "data.image_size=16")
    assert done.status == 0, done.err
    folders = sorted((tmp_path / "outputs").glob("*/*"))
    assert {result(folder)["data"]["images"]["test"] for folder in folders} == {20, 24}
    assert len(folders) == 2


def test_the_method_before_training_is_of_the_seed_of_the_training(tmp_path: Path) -> None:
    """Whatever the seed of the test is, by which its episodes are drawn."""

    def tested(steps: int) -> dict[str, Any]:
        words = [*SINUSOID[:3], f"train.steps={steps}", "test.episodes=8", "test.baseline_episodes=8"]
        assert metarun(*words, f"outputs={tmp_path / f'of {steps}'}").status == 0
        again = [
            f"checkpoint={run_folder(tmp_path / f'of {steps}')}",
            "seed=3",
            f"outputs={tmp_path / f'test of {steps}'}",
        ]
        assert metarun("recipe=test", *again).status == 0
        return result(run_folder(tmp_path / f"test of {steps}"))

    trained, untrained = tested(2), tested(0)
    assert trained["untrained/mse"] == untrained["test/mse"] != trained["test/mse"]
    assert "untrained/mse" not in untrained


def test_testing_with_other_settings_of_the_method(made: Made, tmp_path: Path) -> None:
    words = ["recipe=test", f"checkpoint={made.maml}", "algo.test_inner_steps=3"]
    done = metarun(*words, "algo=maml", f"outputs={tmp_path}")
    assert done.status == 0, done.err
    found = result(run_folder(tmp_path))
    assert found["protocol"]["test_inner_steps"] == 3
    assert found["test/after_inner_steps"]["1"]["acc"] == result(made.maml)["test/acc"]
    done = metarun(*words, f"outputs={tmp_path}")
    assert done.status == 2
    assert done.said[0].startswith("metarun: algo.test_inner_steps: there is no such key; ")
    assert "name the method too" in done.said[0]


def test_stored_result_of_other_weights_is_not_shown(made: Made, tmp_path: Path) -> None:
    """The run may have gone on since."""
    copy = tmp_path / "run"
    shutil.copytree(made.protonet, copy)
    words = ["recipe=test", f"checkpoint={copy}", f"outputs={tmp_path / 'outputs'}"]
    assert metarun(*words).status == 0
    assert "finished before" in metarun(*words).out
    best = torch.load(copy / "best.pt", weights_only=True)
    torch.save({**best, "step": 17}, copy / "best.pt")
    done = metarun(*words)
    assert done.status == 2
    assert done.said[0].endswith("has now; test these beside it with resume=false")
    assert metarun(*words, "resume=false").status == 0
    assert sorted(result(folder)["checkpoint/step"] for folder in tmp_path.glob("outputs/*/*"))[-1] == 17


def test_processes_that_read_other_weights_are_noticed() -> None:
    """Each reads the file by itself, which a training that goes on replaces."""

    class First(World):
        def broadcast(self, value: Any) -> Any:
            return "0" * 64

    stage = Load()
    stage.digest, stage.step = "1" * 64, 4
    run: Any = SimpleNamespace(world=First(1, 2, 1, 2), config=SimpleNamespace(checkpoint="run"), result={})
    with pytest.raises(UserError, match=r"^checkpoint=run: its weights were replaced while they were read"):
        stage.execute(run)


def test_checkpoint_is_for_testing(made: Made, tmp_path: Path) -> None:
    done = metarun(f"checkpoint={made.protonet}", f"outputs={tmp_path / 'outputs'}")
    assert (done.status, done.said) == (
        2,
        [f"metarun: checkpoint={made.protonet}: is for testing a finished run; add recipe=test"],
    )
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("algo", "words", "expected"),
    [
        ("maml", ["task.ways=2"], ["test.task.ways=2: MAML's head has the 3 outputs", "test.task.ways=3"]),
        ("protonet", ["task.ways=5"], ["ways = 5 is above the 4 classes of the test split: of 12 classes"]),
        ("protonet", ["algo=maml"], ["algo=: a checkpoint brings its own"]),
        ("protonet", ["experiment=omniglot_maml"], ["experiment=: a checkpoint brings its own"]),
        ("protonet", ["debug=fast"], ["debug=: a checkpoint brings its own", "test.episodes="]),
        ("protonet", ["data.split=lake"], ["data.split: there is no such key; ", "name the data too (data=omniglot, say)"]),
        ("protonet", ["approach=maml"], [": a checkpoint brings its own; override single keys instead"]),
        ("protonet", ["+anything=1"], ["anything: there is no such key"]),
        ("protonet", ["backbone.channels=5"], ["of another architecture", "(4, 3, 3, 3) in the file and (5, 3, 3, 3) in this"]),
        ("protonet", ["backbone=mlp"], ["of another architecture", "backbone.layers.0.weight is absent in the file"]),
        ("protonet", ["data=sinusoid"], ["backbone: conv4 needs images"]),
        ("protonet", ["data=glyphs", "data.image_size=x"], ["data.image_size=x: must be of type int"]),
        ("protonet", ["seedd=1"], ["seedd: there is no such key; did you mean seed?"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)  # fmt: skip
def test_testing_what_does_not_fit(
    algo: str, words: list[str], expected: list[str], made: Made, tmp_path: Path
) -> None:
    run, outputs = getattr(made, algo), tmp_path / "outputs"
    done = metarun("recipe=test", f"checkpoint={run}", *words, f"outputs={outputs}")
    assert (done.status, done.out, len(done.said)) == (2, "", 1), done
    assert all(text in done.said[0] for text in expected), done.said
    assert not outputs.exists()


class Tunes(MetaTest):
    reads = ("train", "optimizer")


def test_a_stage_that_trains_in_its_own_way_reads_the_keys_of_training() -> None:
    words = ["train.steps=5", "optimizer=sgd", "test.episodes=9"]
    config = compose("checkpoint=x", *words)
    refuse_untrained(config, words, [Load(), Tunes()])
    with pytest.raises(UserError, match=r"^train\.steps=5, optimizer=sgd: this recipe has no use for them; it takes "):
        refuse_untrained(config, words, [Load(), MetaTest()])
    with pytest.raises(UserError, match=r"^pretrain\.train\.steps=5: this recipe has no use for it"):
        refuse_untrained(config, ["pretrain.train.steps=5"], [Load(), Tunes()])


def test_training_from_a_checkpoint_with_another_optimiser(made: Made) -> None:
    words = [f"checkpoint={made.protonet}", "optimizer=sgd", "schedule=cosine", "train.optimizer.lr=0.5"]
    own = with_checkpoint(compose(*words), words)
    assert (own.train.optimizer._target_, own.train.optimizer.lr) == ("torch.optim.SGD", 0.5)
    assert own.train.schedule._target_ == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert own.train.steps == 4
    other = [words[0], "optimizer@pretrain.train.optimizer=sgd"]
    with pytest.raises(UserError, match=r"^optimizer=: a checkpoint brings its own"):
        with_checkpoint(compose(words[0]), other)


def test_testing_what_is_no_run(made: Made, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "best.pt").write_bytes((made.maml / "best.pt").read_bytes())
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.yaml").write_bytes((made.maml / "config.yaml").read_bytes())
    (tmp_path / "cut" / "best.pt").write_bytes((made.maml / "best.pt").read_bytes()[:2000])
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.yaml").write_bytes((made.maml / "config.yaml").read_bytes())
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_bytes((made.maml / "config.yaml").read_bytes())
    (tmp_path / "used" / "result.json").write_text('{"predict/images": 3}', encoding="utf-8")
    for path, expected in {
        tmp_path / "early": "has no best.pt yet",
        tmp_path / "used": "has finished, and holds no weights; give the folder of a run that trained some",
        tmp_path / "nowhere": "there is no such run folder or file",
        tmp_path: "there is no such run folder or file",
        tmp_path / "alone": "no config.yaml lies beside it",
        tmp_path / "cut": "cannot be read, it is truncated or damaged, or no checkpoint of metarun",
        made.maml / "config.yaml": "holds no weights; give the run's folder",
    }.items():
        done = metarun("recipe=test", f"checkpoint={path}", f"outputs={outputs}")
        assert (done.status, len(done.said)) == (2, 1), done
        assert expected in done.said[0]
    assert not outputs.exists()


NEAREST = '''
import torch
from torch import Tensor
from metarun.core import Algorithm, Episodes


class Nearest(Algorithm):
    """Classifies a query as its nearest support image; learns nothing."""

    def __init__(self, backbone, spec, *, power: float = 2.0, shift: int = 0) -> None:
        super().__init__(backbone, spec)
        self.power = power
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def logits(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int) -> Tensor:
        distance = torch.cdist(query_x.flatten(1), support_x.flatten(1), p=self.power)
        return -distance @ torch.nn.functional.one_hot(support_y, ways).float() + self.bias

    def loss(self, episodes: Episodes, step: int):
        logits = self.predict(episodes)
        return self.task_loss(logits, episodes.query_y), self.scores(logits, episodes.query_y)

    def predict(self, episodes: Episodes) -> Tensor:
        return self.over_tasks(lambda *task: self.logits(*task, episodes.ways), *episodes.tensors[:3])
'''


def test_a_users_own_method_in_one_file_and_one_yaml(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the working folder; the images of a class are of its colour, which the nearest image tells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nearest_image", raising=False)
    (tmp_path / "nearest_image.py").write_text(NEAREST)
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    settings = {"algo": {"_target_": "nearest_image.Nearest", "power": 2}, "train": {"steps": 2, "tasks_per_step": 1}}
    (tmp_path / "mine" / "algo" / "nearest.yaml").write_text("# @package _global_\n" + yaml.safe_dump(settings))
    words = ["--config-dir", "mine", *SMALL, f"data.root={made.images}", "algo=nearest"]
    done = metarun(*words)
    assert done.status == 0, done.err
    folder = run_folder(tmp_path / "outputs")
    assert folder.parent.name == "folder-nearest"
    assert result(folder)["test/acc"] > 0.8
    torch.load(folder / "best.pt", weights_only=True)

    wrong = metarun(*words, "+algo.powr=3")
    assert wrong.said == ["metarun: algo.powr: Nearest has no such setting; did you mean algo.power?"]
    wrong = metarun(*words, "algo.power=high")
    assert wrong.said == ["metarun: algo.power=high: must be of type float"]
    wrong = metarun(*words[:-1], "algo=neerest")
    assert wrong.said == ["metarun: algo=neerest: there is no such choice; did you mean nearest?"]
    assert "nearest" in metarun("--config-dir", "mine", "--help").out
    again = metarun("--config-dir", "mine", "recipe=test", f"checkpoint={folder}")
    assert again.status == 0, again.err
