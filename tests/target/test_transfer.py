"""From a source to a target: the recipes from the shell, kept stages, kills, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from shell import done, events, make_images, metarun, one_line, result, run_folder, start

from metarun.engine import train
from metarun.report.collect import collect
from metarun.report.summary import summarise
from metarun.report.tables import section_table
from metarun.runs.provenance import git_commit

SMALL = [
    "data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2", "train.steps=4",
    "train.tasks_per_step=4", "train.validate_every=2", "train.validate_episodes=4", "target=folder",
    "target.data.image_size=12", "target.repeats=3", "target.train_images=[4,9]", "target.test_images=6",
]  # fmt: skip
QUICK = ["transfer.steps=3"]
MEASURED = (
    "seconds",
    "train/seconds",
    "train/items_per_second",
    "train/tasks_per_second",
    "target/seconds",
    "peak_memory",
    "git_commit",
    "stages",
    "command",
    "overrides",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of colour pictures, brighter from class to class."""
    root, draw = tmp_path_factory.mktemp("target"), np.random.default_rng(0)
    for number in range(3):
        folder = root / f"kind{number}"
        folder.mkdir()
        for image in range(30):
            pixels = (draw.integers(0, 60, (12, 12, 3)) + 70 * number).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


def words(recipe: str, images: Path, target: Path, outputs: Path) -> list[str]:
    given = [f"recipe={recipe}", *SMALL, f"data.root={images}", f"target.data.root={target}", f"outputs={outputs}"]
    if recipe == "target_only":  # which refuses words for a source
        return [word for word in given if not word.startswith(("data", "task.", "train."))]
    return given


def numbers(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in result(folder).items() if name not in MEASURED and not name.endswith("/seconds")
            and not name.endswith("s_per_second")}  # fmt: skip


def runs(outputs: Path) -> Path:
    """The only run folder that is not a stage's."""
    (found,) = {path.parent for path in outputs.rglob("result.json")}
    return found


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("transfer", QUICK),
        ("transfer", ["algo=simpleshot", "transfer=linear_probe", "transfer.steps=5"]),
        ("transfer", ["transfer=logistic_regression"]),
        ("meta_transfer", ["algo=maml", "train.task.ways=3", *QUICK]),
        ("meta_transfer", ["algo=protonet", "train.task.ways=3", "transfer=own"]),
        ("transfer", ["augment=standard", "augment.crop=2", *QUICK]),
        ("target_only", [*QUICK, "target.data.image_size=16"]),
        ("target_only", ["transfer=nearest_centroid", "target.data.image_size=16"]),
    ],
)
def test_a_target_is_measured(recipe: str, more: list[str], images: Path, target: Path, tmp_path: Path) -> None:
    outcome = done(*words(recipe, images, target, tmp_path), *more)
    folder = runs(tmp_path)
    scores = np.load(folder / "test_scores.npz")["values"]
    found = result(folder)
    assert [point["train_images"] for point in found["target/curve"]] == [4, 9]
    assert found["target/acc"] == found["target/curve"][-1]["acc"]
    assert 0 <= found["target/acc"] <= 1
    assert found["target/repeats"] == 3
    assert scores.shape == (2, 3)
    assert scores.mean(1) == pytest.approx([point["acc"] for point in found["target/curve"]])
    assert np.sum(found["target/confusion"]) == 3 * 6
    assert "auroc" not in found["target/curve"][0]  # of three classes there is none
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [event.step for event in events(folder).Scalars("target/acc_of_train_images")] == [4, 9]
    assert "target/learning_curve" in events(folder).Tags()["images"]
    assert "9 images, 6 to test" in outcome.out
    stages = list((tmp_path / "stages").glob("*/best.pt"))
    assert len(stages) == (recipe != "target_only")
    shown = done(*words(recipe, images, target, tmp_path), *more)
    assert "nothing was computed" in shown.out


def test_another_way_with_the_target_takes_the_stage_that_is_there(
    images: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    honest = train.gradient_step

    def counted(algorithm: Any, batch: Any, step: int, *more: Any) -> Any:
        steps.append(step)
        return honest(algorithm, batch, step, *more)

    monkeypatch.setattr(train, "gradient_step", counted)
    command = words("pretrain_meta_transfer", images, target, tmp_path)
    more = ["algo=protonet", "pretrain.train.steps=3", "pretrain.train.tasks_per_step=8", "train.task.ways=3"]
    done(*command, *more, "transfer=nearest_centroid")
    assert steps == [0, 1, 2, 0, 1, 2, 3]
    done(*command, *more, "transfer=all", "transfer.steps=3")
    done(*command, *more, "transfer=all", "transfer.steps=2", "target.repeats=2")
    assert steps == [0, 1, 2, 0, 1, 2, 3]
    done(*command, *more, "transfer=all", "transfer.steps=2", "train.steps=2")  # the first stage is the same yet
    assert steps == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    done(*command, *more, "transfer=all", "transfer.steps=2", "pretrain.train.steps=2")  # both are others
    assert steps == [0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
    assert len(list((tmp_path / "stages").iterdir())) == 5
    report = done("recipe=report", f"runs={tmp_path}", f"outputs={tmp_path}")
    assert "folder as the target, 9 training images, 6 test images" in report.out
    for text in ("± over repeats", "minus the best, over repeats"):
        assert text in " ".join(report.out.split())
    assert "episodes" not in report.out


def test_killed_in_any_stage_it_ends_with_the_same_numbers(images: Path, target: Path, tmp_path: Path) -> None:
    more = ["algo=protonet", "transfer=all", "transfer.steps=30", "train.task.ways=3", "train.steps=40", "target.repeats=4",
            "pretrain.train.steps=40", "pretrain.train.tasks_per_step=8", "train.save_every=4", "pretrain.train.save_every=4"]  # fmt: skip
    done(*words("pretrain_meta_transfer", images, target, tmp_path / "whole"), *more)
    whole = runs(tmp_path / "whole")
    outputs = tmp_path / "killed"
    command = [*words("pretrain_meta_transfer", images, target, outputs), *more]

    def kill_when(pattern: str) -> None:
        process = start(*command)
        while not list(outputs.glob(pattern)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        process.stderr.close()

    for pattern in (
        "stages/pretrain-*/last.pt",
        "stages/train-*/last.pt",
        "*/*/target/4-1.json",
        "*/*/target/9-2.json",
    ):
        kill_when(pattern)
    assert not list(outputs.glob("*/*/result.json"))
    outcome = done(*command)
    assert "stage train: trained before" in outcome.err
    assert numbers(runs(outputs)) == numbers(whole)
    for name in ("pretrain", "train"):
        one, other = (next(root.glob(f"stages/{name}-*/stage.json")) for root in (tmp_path / "whole", outputs))
        assert json.loads(one.read_text())["val/score"] == json.loads(other.read_text())["val/score"]


def test_predictions_of_a_repeat_that_are_damaged_are_named_and_made_again(
    images: Path, target: Path, tmp_path: Path
) -> None:
    command = [
        *words("target_only", images, target, tmp_path),
        "transfer=nearest_centroid",
        "target.data.image_size=16",
    ]
    done(*command)
    folder = runs(tmp_path)
    whole = numbers(folder)
    (folder / "result.json").unlink()
    spoiled = folder / "predictions" / "9-1.npz"
    spoiled.write_bytes(bytes(300))
    one_line(metarun(*command), "9-1.npz: is damaged (", "; delete it to have it made again")
    spoiled.unlink()
    done(*command)
    assert numbers(folder) == whole


def test_a_classifier_that_was_lost_is_kept_again(images: Path, target: Path, tmp_path: Path) -> None:
    command = [
        *words("target_only", images, target, tmp_path),
        "transfer=nearest_centroid",
        "target.data.image_size=16",
    ]
    done(*command)
    folder = runs(tmp_path)
    whole = result(folder)["target/classifier"]
    (folder / "result.json").unlink()
    (folder / "classifier.pt").unlink()
    done(*command)
    assert (folder / "classifier.pt").is_file()
    assert result(folder)["target/classifier"] == whole


def test_two_processes_share_the_training_and_the_repeats(images: Path, target: Path, tmp_path: Path) -> None:
    more = ["algo=protonet", "transfer=nearest_centroid", "train.task.ways=3", "backbone.norm=group"]
    one, two = (words("meta_transfer", images, target, tmp_path / name) for name in ("one", "two"))
    done(*one, *more)
    process = start(*two, *more, "hardware.processes=2")
    _, said = process.communicate()
    assert process.returncode == 0, said
    alone, shared = (result(runs(tmp_path / name)) for name in ("one", "two"))
    assert shared["hardware"]["processes"] == 2
    for name in ("target/acc", "target/confusion", "target/curve"):
        assert shared[name] == alone[name]  # a class mean apart by float order takes no image to another class
    assert {path.name for path in (runs(tmp_path / "two") / "target").iterdir()} == {
        f"{size}-{repeat}.json" for size in (4, 9) for repeat in range(3)
    }


def test_pretraining_is_where_meta_training_begins(images: Path, tmp_path: Path) -> None:
    command = ["recipe=pretrain_meta", *SMALL[:9], f"data.root={images}", f"outputs={tmp_path}", "algo=protonet",
               "train.task.ways=3", "pretrain.train.steps=4", "pretrain.train.tasks_per_step=8", "test.episodes=4",
               "test.baseline_episodes=0", "train.steps=0"]  # fmt: skip
    done(*command)
    folder = runs(tmp_path)
    import torch

    (stage,) = (tmp_path / "stages").iterdir()
    pretrained = torch.load(stage / "best.pt", weights_only=True)["model"]
    begun = torch.load(folder / "last.pt", weights_only=True)["model"]
    shared = [name for name in begun if name.startswith("backbone.")]
    assert shared
    assert all(torch.equal(begun[name], pretrained[name]) for name in shared)
    assert result(folder)["pretrain/steps"] == 4


@pytest.mark.parametrize("words", [["recipe=pretrain_meta"], ["recipe=pretrain_meta", "algo=mtl", "algo.inner_steps=3"],
                                   ["recipe=distill", "train.tasks_per_step=8"]], ids=" ".join)  # fmt: skip
def test_what_begins_from_a_pretrained_stage(words: list[str], images: Path, tmp_path: Path) -> None:
    done(*words, *SMALL[:5], "train.steps=2", "train.validate_episodes=2", f"data.root={images}", f"outputs={tmp_path}",
         "train.task.ways=3", "train.task.queries=2", "pretrain.train.steps=3", "pretrain.train.tasks_per_step=8",
         "test.episodes=4", "test.baseline_episodes=2")  # fmt: skip
    found = result(runs(tmp_path))
    assert (found["pretrain/steps"], found["train/steps"]) == (3, 2)
    assert 0 <= found["test/acc"] <= 1
    assert found["stages"]["pretrain"]["reused"] is False


def test_a_stage_tells_the_commit_that_it_was_made_at(images: Path, target: Path, tmp_path: Path) -> None:
    """The run that takes a stage over says where the stage comes from, and not what is checked out by then."""
    command = [*words("transfer", images, target, tmp_path), *QUICK]
    done(*command)
    first = result(runs(tmp_path))["stages"]["train"]
    assert first["git_commit"] == git_commit()
    (stage,) = (tmp_path / "stages").glob("*/stage.json")
    stored = json.loads(stage.read_text())
    assert stored["git_commit"] == git_commit()
    stage.write_text(json.dumps(stored | {"git_commit": "f" * 40}))
    done(*command, "name=again")
    again = result(next((tmp_path / "again").iterdir()))
    assert again["stages"]["train"] == {**first, "reused": True, "git_commit": "f" * 40}
    assert again["git_commit"] == git_commit()
    assert "train/git_commit" not in again


@pytest.mark.parametrize("algo", ["baseline", "dann", "multitask"])
def test_adaptation(algo: str, target: Path, tmp_path: Path) -> None:
    """The target is its own source, with other subsets; its labels are seen by the one that says so alone."""
    command = ["recipe=domain_adaptation", f"algo={algo}", "data=folder", f"data.root={target}", "data.image_size=16", *SMALL[2:3],
               "train.steps=80", "train.tasks_per_step=24", "train.validate_every=20", "target=folder", f"outputs={tmp_path}",
               f"target.data.root={target}", "target.data.image_size=16"]  # fmt: skip
    done(*command)
    found = result(runs(tmp_path))
    assert found["target/acc"] > 0.45  # a third by chance
    assert found["target/test_images"] == 9
    whose = "target, whose labels it trains on" if algo == "multitask" else "source"
    assert found["protocol"]["selected_by"] == f"best validation score on held-out images of the {whose}"
    assert "target/interval" in found
    labels = {"dann": "without", "multitask": "with"}.get(algo)
    target_seen = f" and the target's training images {labels} their labels" if labels else ""
    held = "the target" if algo == "multitask" else "the same classes"
    expected = f"the training images of all classes{target_seen}; for validation held-out images of {held}"
    assert found["protocol"]["seen"] == {"train": expected}


def test_predictions_that_are_no_numbers_are_wrong_and_told(target: Path, tmp_path: Path) -> None:
    """Weights that diverged would have each image taken for the first class, a third of them rightly."""
    outcome = metarun("recipe=domain_adaptation", "algo=baseline", "data=folder", f"data.root={target}", "data.image_size=16",
                      *SMALL[2:3], "train.steps=1", "train.tasks_per_step=8", "train.optimizer.lr=1e38", "target=folder",
                      f"target.data.root={target}", "target.data.image_size=16", f"outputs={tmp_path}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    found = result(runs(tmp_path))
    assert (found["target/acc"], found["val/score"], found["target/undefined"]) == (0, 0, 9)
    assert "target: the predictions of 9 of 9 test images are no numbers, which count as wrong" in outcome.err
    rows = (runs(tmp_path) / "predictions.csv").read_text().splitlines()[1:]
    assert {tuple(row.split(",")[4:6]) for row in rows} == {("", "0")}


@pytest.mark.parametrize(
    ("recipe", "key", "target"),
    [
        ("transfer", "algo", ["target=folder"]),
        ("pretrain_meta_transfer", "pretrain.algo", ["target=folder"]),
        ("transfer", "algo", ["target=digits"]),
    ],
)
def test_a_method_on_the_targets_labels_is_refused_before_labelled_subsets(
    recipe: str, key: str, target: list[str], images: Path, tmp_path: Path
) -> None:
    group = "algo" if key == "algo" else "algo@pretrain"
    root = [f"target.data.root={images}"] if target == ["target=folder"] else []
    outcome = metarun(f"recipe={recipe}", f"{group}=multitask", *target, *root, "data=digits", "transfer=linear_probe",
                      "task.ways=2", "task.queries=2", f"outputs={tmp_path / 'out'}")  # fmt: skip
    assert outcome.status == 2
    assert outcome.said[-1].startswith(f"metarun: {key}: MultiTask trains on the labels of all of the target's")
    assert "use recipe=domain_adaptation" in outcome.said[-1]
    assert not (tmp_path / "out").exists()


def test_a_training_on_labelled_images_counts_images_and_no_tasks(images: Path, target: Path, tmp_path: Path) -> None:
    ran = done(
        *words("transfer", images, target, tmp_path), "algo=baseline", "transfer=nearest_centroid", "train.log_every=2"
    )
    found = result(runs(tmp_path))
    assert found["train/items_per_second"] == pytest.approx(4 * 4 / found["train/seconds"])
    assert "train/tasks_per_second" not in found
    assert re.search(r"^4 steps in \d+ s, [\d.e+]+ items/s; ", ran.out, re.M)
    assert "tasks/s" not in ran.out + ran.err


def test_a_meta_test_and_a_target_each_say_how_queries_were_predicted(
    images: Path, target: Path, tmp_path: Path
) -> None:
    both = "recipe.stages=[metarun.stages.Train,metarun.stages.MetaTest,metarun.stages.Transfer]"
    ran = done(*words("transfer", images, target, tmp_path), both, "algo=tim", "backbone.norm=none", "train.steps=0",
               "test.episodes=4", "test.baseline_episodes=0", "transfer=nearest_centroid")  # fmt: skip
    found = result(runs(tmp_path))["protocol"]
    assert (found["transductive"], found["assumes_balanced_queries"]) == (True, True)
    assert found["target"] == {"transductive": False}
    shown = " ".join(ran.out.split())
    assert "norm none, transductive, supposes balanced queries" in shown
    assert "norm none, inductive;" in shown
    (section,) = summarise(collect([tmp_path], tmp_path / "none"))  # of a run of both a report shows the target
    assert "transductive" not in section_table(section).headings


def test_a_training_on_the_targets_images_says_that_it_saw_test_images_unlabelled(
    images: Path, target: Path, tmp_path: Path
) -> None:
    done = metarun(*words("transfer", images, target, tmp_path), "algo=dann", "transfer=nearest_centroid")
    assert done.status == 0, done.err
    told = result(runs(tmp_path))["protocol"]
    assert told["test_images_seen_unlabelled"] == 72  # one draw of 80%, of all images
    assert told["transductive"] is True
    assert "without their labels" in told["seen"]["train"]
    assert "the training sees 72 of its images without their labels" in done.err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["recipe=transfer", "train.validate_on=images", "transfer=nearest_centroid"], "48 of its test images"),
        (
            ["recipe=transfer", "train.validate_on=episodes", "transfer=nearest_centroid"],
            "24 of its test images",
        ),
        (["recipe=domain_adaptation", "train.validate_on=images"], None),
        (
            [
                "recipe=transfer",
                "train.validate_on=images",
                "transfer=tradaboost",
                "train.steps=0",
                "transfer.rounds=2",
            ],
            "48 of its test images",
        ),
    ],
)
def test_source_and_target_of_the_same_images_are_told(
    words: list[str], seen: str | None, images: Path, tmp_path: Path
) -> None:
    """Their training and their test images are divided by one draw where the target is not divided anew."""
    done = metarun("algo=baseline", "data=folder", f"data.root={images}", "data.image_size=16", "target=folder",
                   f"target.data.root={images}", "target.data.image_size=16", "backbone.channels=4", "train.steps=1",
                   "train.tasks_per_step=4", "target.repeats=1", "task.ways=2", "task.queries=2", f"outputs={tmp_path}",
                   *words)  # fmt: skip
    assert done.status == 0, done.err
    found = result(run_folder(tmp_path))
    assert ("the training on the source's images sees" in done.err) == bool(seen)
    of_transfer = "the training images of all classes of the source with their labels"
    told = of_transfer if "transfer=tradaboost" in words else None
    assert found["protocol"]["seen"].get("transfer") == told
    assert found["protocol"].get("test_images_trained_on") == (seen and int(seen.split()[0]))
    assert "interval" not in found  # of episodes, of which there were none


def test_images_of_classes_that_source_and_target_share_are_counted(target: Path, tmp_path: Path) -> None:
    """The target has two of the source's three classes, one of them under another name."""
    shutil.copytree(target / "kind0", tmp_path / "part" / "kind0")
    shutil.copytree(target / "kind2", tmp_path / "part" / "other")
    found = metarun("recipe=transfer", "data=folder", f"data.root={target}", "data.image_size=8", "target=folder",
                    f"target.data.root={tmp_path / 'part'}", "target.data.image_size=8", "target.repeats=1", "train.steps=1",
                    "train.tasks_per_step=4", "train.validate_on=images", "backbone=mlp", "backbone.hidden=[4]",
                    "transfer=nearest_centroid", f"outputs={tmp_path / 'out'}")  # fmt: skip
    assert found.status == 0, found.err
    told = result(run_folder(tmp_path / "out"))["protocol"]
    assert told["test_images_trained_on"] == 2 * 24  # 80% of each


def test_weights_that_saw_the_targets_classes_are_told_of(images: Path, target: Path, tmp_path: Path) -> None:
    """Whether the backbone brings them or an earlier stage loads them; and not where they saw others."""
    small = ["data=folder", "data.image_size=8", "target=folder", "target.data.image_size=8", "target.repeats=1", "train.steps=1",
             "train.tasks_per_step=4", "train.validate_on=images", "backbone=mlp", "backbone.hidden=[4]", "backbone.norm=none",
             "transfer=nearest_centroid"]  # fmt: skip
    of_target = ["recipe=transfer", *small, f"data.root={target}"]
    done(*of_target, f"target.data.root={images}", f"outputs={tmp_path / 'first'}")
    first = run_folder(tmp_path / "first")
    brings = f"backbone.from={first}"
    alone = ["recipe=target_only", *small[2:5], *small[8:], brings]
    loads = ["recipe.stages=[metarun.stages.Load,metarun.stages.Transfer]", f"checkpoint={first}"]
    trains_nothing = [word for word in of_target if not word.startswith("train.")]
    commands = {
        "backbone": [*alone, f"target.data.root={target}"],
        "transfer": ["recipe=transfer", *small, f"data.root={images}", f"target.data.root={target}", brings],
        "loaded": [*trains_nothing, *loads, f"target.data.root={target}"],
        "others": [*alone, f"target.data.root={images}"],
    }
    for name, command in commands.items():
        outcome = done(*command, f"outputs={tmp_path / name}")
        told = result(run_folder(tmp_path / name))["protocol"]
        assert told.get("target_classes_trained_on") == (None if name == "others" else 3)
        assert ("images of 3 of its 3 classes" in outcome.err) == (name != "others")
        key, of_data = ("train", "") if name == "loaded" else ("backbone.from", "of data=folder: ")
        assert told["seen"][key].startswith(f"{of_data}the training images of all classes")


def test_a_list_of_sizes_needs_no_brackets() -> None:
    for words, expected in {"5,10,20": [5, 10, 20], "[5,10]": [5, 10], "5": 5, "null": None}.items():
        done = metarun(
            "target=digits", "recipe=transfer", f"target.train_images={words}", "--cfg", "job", "-p", "target"
        )
        assert yaml.safe_load(done.out)["train_images"] == expected


def test_what_cannot_be_is_one_line(images: Path, target: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    (alone / "only").mkdir(parents=True)
    Image.new("L", (12, 12)).save(alone / "only" / "0.png")
    few = tmp_path / "few"
    for name, count in {"many": 20, "two": 2, "some": 9}.items():
        (few / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (12, 12), number).save(few / name / f"{number}.png")
    bad = tmp_path / "bad"
    shutil.copytree(few, bad)
    (bad / "two" / "data.root.png").write_text("none")
    command = words("transfer", images, target, tmp_path / "out")

    def without(start: str) -> list[str]:
        return [word for word in command if not word.startswith(start)]

    cases = [
        ([*without("target"), *QUICK], "recipe: its stage Transfer needs a target"),
        ([*without("recipe")], "target: this recipe has no use for one"),
        ([*command, "target.train_images=2"], "target.train_images=2: is below the 3 classes"),
        ([*command, "target.train_images=500"], r"target.train_images=500: there are only \d+ images"),
        ([*command, "target.train_images=[4,4]"], r"target.train_images=\[4, 4\]: must be a number of images, or a list of different"),
        ([*command, "target.train_images=[4,0]"], r"target.train_images=\[4, 0\]: each must be at least 1"),
        ([*command, "target.train_images=[4,null]"], r"target.train_images=\[4, null\]: must be of type int or list of int or null"),
        ([*command, "target.train_images='4'"], r"target.train_images=4: must be a number of images"),
        ([*command, "target.test_images=999"], "target.test_images=999: there are only"),
        ([*without("target.data.root"), f"target.data.root={few}"], "target: class two has no (val|test) images"),
        ([*without("target.data.root"), f"target.data.root={bad}"],
         r"metarun: target\.data\.root: \S+data\.root\.png is not a whole image .* out with target\.data\.skip_bad=true$"),
        ([*without("target.data.root"), f"target.data.root={tmp_path}/nowhere"], r"metarun: target\.data\.root: there is no file or"),
        ([*command, "target.data.train_classes=[x]"], r"metarun: target\.data\.train_classes"),
        ([*command, "target.data.value_range=[2,1]"], r"metarun: target\.data\.value_range=\[2, ?1\]: is not auto"),
        ([*without("target.data.root"), f"target.data.root={alone}"], "target|data.root"),
        ([*command, "transfer.from_layer=9"], "transfer.from_layer=9: must be from 0"),
        ([*command, "transfer.setps=9"], "transfer.setps: there is no such key; did you mean transfer.steps"),
        ([*command, "train.validate_on=images", "algo=protonet"], "train.validate_on=images: ProtoNet trains on episodes"),
        ([*command, "backbone.from=/nowhere"], "backbone.from=/nowhere: there is no such run folder"),
        (["recipe=meta_transfer", "algo=maml", "transfer=own", *command[1:], "train.task.ways=4", "test.task.ways=4"],
         "transfer=own: MAML's head has 4 outputs, and the target 3 classes"),
        ([*command, "wrapper=metamix"],
         "wrapper: is of training tasks, but Baseline trains on batches of images; leave it out, or take a method that"),
        ([*command, "train.noise.tasks=0.5"], "train.noise.tasks: is of training tasks, but Baseline trains on batches"),
        ([*command, "hardware.processes=2"], "hardware.processes=2: Baseline normalises by the statistics of its whole batch"),
        ([*command, "target.repeats=0"], "target.repeats=0: must be at least 1"),
        ([*command, "augment=standard", "test.views=3"], "metarun: test.views: this recipe has no meta-test; use recipe=meta, or"),
        ([*words("target_only", images, target, tmp_path / "out"), "target.data.image_size=16", "transfer=linear_probe",
          "augment=standard"], "metarun: augment: changes training images, but LinearProbe"),
        ([*command, "test.unknown_ways=2"], "metarun: test.unknown_ways: this recipe has no meta-test; use recipe=meta, or"),
    ]  # fmt: skip
    for line, said in cases:
        outcome = metarun(*line)
        assert outcome.status == 2, (line, outcome.err)
        assert len(outcome.said) == 1, outcome.said
        assert re.search(said, outcome.said[0]), outcome.said
        assert not (tmp_path / "out").exists()
