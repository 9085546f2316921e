"""The search: what is drawn, pruning, going on after a kill, selection on validation, one test at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from shell import SINUSOID, done, lines, metarun, one_line, result, start
from sqlalchemy.exc import IntegrityError
from test_sweeps import kill_group, runs

from metarun.errors import UserError
from metarun.runs import trial
from metarun.sweeps import study
from metarun.sweeps.jobs import Job, Outcome
from metarun.sweeps.launcher import Launcher
from metarun.sweeps.plan import Ended

SPACE = ["train.optimizer.lr=tag(log,interval(1e-4,1e-2))", "algo.inner_steps=1,2"]
WORDS = ["-m", "hydra/sweeper=optuna", *SINUSOID, *SPACE]


def space(word: str) -> optuna.distributions.BaseDistribution:
    return study.distribution(OverridesParser.create().parse_override(word))


def test_distributions() -> None:
    d = optuna.distributions
    assert space("a=interval(0.5,2)") == d.FloatDistribution(0.5, 2.0)
    assert space("a=tag(log,interval(1e-4,1e-1))") == d.FloatDistribution(1e-4, 1e-1, log=True)
    assert space("a=int(interval(1,8))") == d.IntDistribution(1, 8)
    assert space("a=range(1,8,2)") == d.IntDistribution(1, 7, step=2)
    assert space("a=range(0.5,2.0,0.5)") == d.CategoricalDistribution(["0.5", "1.0", "1.5"])
    assert space("a=x,y") == d.CategoricalDistribution(["x", "y"])
    assert space("a=choice(1,x)") == d.CategoricalDistribution(["1", "x"])
    assert space("a=tag(log,int(interval(1,8)))") == d.IntDistribution(1, 8, log=True)
    with pytest.raises(UserError, match="seed: is not searched"):
        space("seed=0,1")
    with pytest.raises(
        UserError, match=r"^a: cannot be searched in tag\(lg,interval\(1,8\)\) \(lg is no tag of a search; tag\(log"
    ):
        space("a=tag(lg,interval(1,8))")
    for word in ("a=tag(log,range(1,9))", "a=tag(log,choice(1,8))"):
        with pytest.raises(UserError, match=r"tag\(log,...\) is for an interval"):
            space(word)


def trials(outputs: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{outputs / 'sinusoid-maml' / 'search.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_best_on_validation_is_tested_once_and_no_other(tmp_path: Path) -> None:
    words = [*WORDS, "hydra.sweeper.trials=5", "hydra.sweeper.prune=false", f"outputs={tmp_path}"]
    done = metarun(*words)
    assert done.status == 0, done.err
    found = trials(tmp_path)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 5
    best = max(found, key=lambda trial: trial.value)
    made = runs(tmp_path)
    (tested,) = [folder for folder in made.values() if "test/mse" in result(folder)]
    assert tested.name.startswith("checkpoint-")
    scores = {result(folder)["val/score"]: folder for folder in made.values() if folder != tested}
    assert max(scores) == best.value
    assert f"best on validation: trial {best.number}, " in done.err
    assert f"checkpoint={scores[best.value]}" in result(tested)["overrides"]
    before = {folder: (folder / "result.json").read_bytes() for folder in made.values()}
    again = metarun(*words)
    assert again.status == 0, again.err
    assert {folder: (folder / "result.json").read_bytes() for folder in runs(tmp_path).values()} == before
    assert len(trials(tmp_path)) == 5
    more = metarun(*[word.replace("trials=5", "trials=6") for word in words])
    assert more.status == 0
    assert len(trials(tmp_path)) == 6


def test_bad_trials_are_pruned(tmp_path: Path) -> None:
    """Trials with a rate that learns nothing, after four that learn, are ended at a validation and cost no more steps."""
    steps = [
        word.replace("train.steps=6", "train.steps=40") for word in WORDS if not word.startswith("train.optimizer")
    ]
    fixed = [*steps, "train.validate_every=10", "hydra.sweeper.sampler=random", f"outputs={tmp_path}"]
    done = metarun(*fixed, "train.optimizer.lr=0.01,0.0", "hydra.sweeper.trials=14")
    assert done.status == 0, done.err
    found = trials(tmp_path)
    pruned = [trial for trial in found if trial.state.name == "PRUNED"]
    assert pruned
    assert {trial.params["train.optimizer.lr"] for trial in pruned} == {"0.0"}
    assert "pruned at step 10" in done.err
    reached: dict[str, int] = {}  # a trial that is drawn again goes on with the run of the first
    for one in pruned:
        folder = one.user_attrs[study.FOLDER]
        reached[folder] = max(reached.get(folder, 0), one.last_step)
    assert {folder: lines(tmp_path / "sinusoid-maml" / folder)[-1]["step"] for folder in reached} == reached
    assert min(reached.values()) < 40
    assert not list(tmp_path.glob("*/.jobs/*.trial"))


def test_killed_search_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    words = [*(word.replace("train.steps=6", "train.steps=150") for word in WORDS), "hydra.sweeper.trials=4"]
    whole = metarun(*words, f"outputs={tmp_path / 'whole'}")
    assert whole.status == 0, whole.err
    process = start(*words, f"outputs={tmp_path / 'killed'}")
    deadline = time.monotonic() + 300
    while not runs(tmp_path / "killed"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    kill_group(process)
    again = metarun(*words, f"outputs={tmp_path / 'killed'}")
    assert again.status == 0, again.err
    one, two = trials(tmp_path / "whole"), trials(tmp_path / "killed")
    assert [trial.params for trial in one] == [trial.params for trial in two]
    assert [trial.state for trial in one] == [trial.state for trial in two]
    assert [trial.value for trial in one] == [trial.value for trial in two]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["hydra.sweeper.sampler=tpee", *SPACE],
            "hydra.sweeper.sampler=tpee: is not one of tpe, random; did you mean tpe?",
        ),
        (["hydra.sweeper.trials=0", *SPACE], "hydra.sweeper.trials=0: must be at least 1"),
        (["seed=0,1"], "seed: is not searched, every trial has the same; sweep it over the best settings afterwards"),
        (
            ["algo.inner_steps=interval(1,5)"],
            "algo.inner_steps: takes whole numbers; search it in int(interval(1,5)) or range(1,6)",
        ),
        ([], "hydra/sweeper=optuna: nothing to search; give a key several values or an interval(a,b)"),
    ],
)
def test_mistakes(words: list[str], expected: str, tmp_path: Path) -> None:
    done = metarun("-m", "hydra/sweeper=optuna", *SINUSOID, *words, f"outputs={tmp_path / 'none'}")
    assert done.status == 2
    assert done.said == [f"metarun: {expected}"]
    assert not list(tmp_path.glob("none/*/*/*"))


def test_what_is_drawn_twice_at_once_is_one_run(tmp_path: Path) -> None:
    words = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.trials=6",
        "hydra.sweeper.at_once=3",
        "hydra.sweeper.sampler=random",
    ]
    done = metarun(
        "-m", *words, *SINUSOID, "train.optimizer.lr=0.1,0.01", "train.validate_every=3", f"outputs={tmp_path}"
    )
    assert done.status == 0, done.err
    found = trials(tmp_path)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 6
    values = {trial.params["train.optimizer.lr"]: trial.value for trial in found}
    assert len(values) == 2
    assert all(trial.value == values[trial.params["train.optimizer.lr"]] for trial in found)


def test_searches_of_two_folders_that_share_a_storage_are_two(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    for name in ("a", "b"):
        words = ["hydra/sweeper=optuna", "hydra.sweeper.trials=1", f"hydra.sweeper.storage={storage}"]
        done = metarun("-m", *words, *SINUSOID, *SPACE, f"outputs={tmp_path / name}")
        assert done.status == 0, done.err
    names = optuna.get_all_study_names(storage)
    assert len(names) == 2
    assert all(len(optuna.load_study(study_name=name, storage=storage).trials) == 1 for name in names)


@pytest.mark.parametrize(
    ("storage", "told"),
    [
        ("foo", "hydra.sweeper.storage=foo: is no URL; a file is written sqlite:///foo"),
        ("/nope/x.db", "hydra.sweeper.storage=/nope/x.db: is no URL; a file is written sqlite:////nope/x.db"),
        ("sqlite:////nope/x.db", "hydra.sweeper.storage=sqlite:////nope/x.db: cannot be opened ("),
        ("nothing://localhost/x", "hydra.sweeper.storage=nothing://localhost/x: cannot be opened ("),
    ],
)
def test_a_storage_that_cannot_be_opened_is_told_and_leaves_nothing(storage: str, told: str, tmp_path: Path) -> None:
    refused = metarun(*WORDS, f"hydra.sweeper.storage={storage}", f"outputs={tmp_path / 'none'}")
    one_line(refused, told)
    assert "deleted" not in refused.err
    assert not (tmp_path / "none").exists()


def test_the_address_of_a_storage_is_taken_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(url: str) -> None:
        raise UserError(url)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("metarun.sweeps.search.check_storage", given)
    for typed in ("sqlite:///~/jösé #1,a=b.db", "postgresql://me:secret@host/trials?sslmode=require"):
        refused = metarun(*WORDS, f"hydra.sweeper.storage={typed}", f"outputs={tmp_path / 'o'}")
        one_line(refused, typed.replace("~", str(tmp_path)))


def test_what_is_no_address_is_told_with_one_that_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, written in {
        "~/s.db": f"sqlite:///{tmp_path}/home/s.db",
        "/o?2/s.db": "'sqlite:///file:/o%3F2/s.db?uri=true'",
    }.items():
        refused = metarun(*WORDS, f"hydra.sweeper.storage={name}", f"outputs={tmp_path / 'none'}")
        one_line(refused, f"hydra.sweeper.storage={name}: is no URL; a file is written {written}")
        listed = metarun(*WORDS, "--dry-run", f"hydra.sweeper.storage={name}", f"outputs={tmp_path / 'none'}")
        assert (listed.status, listed.err) == (2, refused.err)


@pytest.mark.parametrize("spoil", ["zeros", "cut"])
def test_a_damaged_database_of_trials_is_one_line(spoil: str, tmp_path: Path) -> None:
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.trials=1", *SINUSOID, *SPACE, f"outputs={tmp_path}"]
    assert metarun(*words).status == 0
    (path,) = tmp_path.glob("*/search.db")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)) if spoil == "zeros" else content[: len(content) // 2])
    done = metarun(*words)
    assert done.status == 2
    assert len(done.said) == 1
    assert "search.db" in done.said[0]
    assert "cannot be read (" in done.said[0]
    assert "can be deleted" in done.said[0]
    path.unlink()
    assert metarun(*words).status == 0


def test_a_search_without_a_success_says_so_every_time(tmp_path: Path) -> None:
    words = [
        *SINUSOID,
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.trials=1",
        "train.optimizer.lr=1e30,1e31",
        f"outputs={tmp_path}",
    ]
    first, second = metarun(*words), metarun(*words)
    assert first.status == second.status == 1
    assert "1 of 1 job failed, listed above; a trial that failed counts as done" in first.err
    assert second.said[-1].startswith("metarun: search: none of its 1 trials has succeeded; ")


def test_what_failed_by_its_own_error_is_not_run_again(tmp_path: Path) -> None:
    words = ["hydra/sweeper=optuna", "hydra.sweeper.trials=3", f"outputs={tmp_path}"]
    done = metarun("-m", *words, *SINUSOID, "train.optimizer.lr=1e30", "algo.inner_steps=range(1,2)")
    assert [trial.state.name for trial in trials(tmp_path)] == ["FAIL"] * 3
    said = [line for line in done.said if line.endswith("has failed before, and is not run again")]
    assert [line.partition(": ")[0].rpartition(" ")[2] for line in said] == ["1", "2"]
    assert "1 of 1 job failed" in done.err


def test_only_an_own_error_marks_what_was_drawn(tmp_path: Path) -> None:
    made = study.Study(trial.database(tmp_path / "search.db"), ["a"], {"lr": space("lr=1,2")}, "random", 0)
    ((number, words),) = made.next(1).items()
    made.tell(number, None, pruned=False)
    assert not made.fails(words)
    ((number, words),) = made.next(1).items()
    made.tell(number, None, pruned=False, own_error=True)
    assert made.fails(words)


def test_the_folder_of_a_trial_lies_in_that_of_its_sweep(tmp_path: Path) -> None:
    """Others may have written the storage, and the trial's run would be made wherever it says."""
    made = study.Study(tmp_path / "search.db", ["a"], {"lr": space("lr=1,2")}, "random", 0)
    (number,) = made.next(1)
    for name in ("../../elsewhere", str(tmp_path / "elsewhere"), "..", "."):
        made.begin(number, name)
        assert made.folder(number) is None
    made.begin(number, "lr-1__2")
    assert made.folder(number) == "lr-1__2"


def test_a_trial_without_a_finite_validation_score_has_failed(tmp_path: Path) -> None:
    """Scores of regression are below 0, so that a missing one taken for 0 would be the best."""
    steps = [word.replace("train.steps=6", "train.steps=2") for word in SINUSOID]
    fixed = [*steps, "train.optimizer.lr=1e-9", "train.validate_episodes=8", f"outputs={tmp_path}"]
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.trials=3", "hydra.sweeper.sampler=random"]
    searched = metarun(*words, "hydra/launcher=basic", *fixed, "algo.inner_lr=0.001,1000")
    found = {trial.params["algo.inner_lr"]: trial.state.name for trial in trials(tmp_path)}
    assert found == {"1000": "FAIL", "0.001": "COMPLETE"}
    assert searched.status == 1
    assert "no finite validation score" in searched.err
    assert ", algo.inner_lr=0.001; testing it" in searched.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["recipe=target_only", "target=digits", "transfer.optimizer.lr=0.1,0.001"],
            "metarun: hydra/sweeper=optuna: a search chooses by the validation score, and no stage of this recipe validates; "
            "without hydra/sweeper=optuna the same words are a grid",
        ),
        (
            ["recipe=transfer", "target=digits", "transfer.optimizer.lr=0.1,0.001"],
            "metarun: transfer.optimizer.lr: is not searched, no validation score depends on it; "
            "sweep it over the best settings afterwards",
        ),
        (
            ["data=sinusoid", "algo=maml", "backbone=mlp", "train.steps=1", "test.episodes=10,20"],
            "metarun: test.episodes: is not searched, no validation score depends on it; sweep it over the best settings afterwards",
        ),
    ],
)
def test_what_no_validation_score_depends_on_is_not_searched(words: list[str], said: str, tmp_path: Path) -> None:
    done = metarun("-m", "hydra/sweeper=optuna", *words, f"outputs={tmp_path / 'none'}")
    assert done.status == 2
    assert done.said == [said]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["name=a,b"], "name"),
        (["outputs=a,b"], "outputs"),
        (["train.log_every=1,2", "algo=maml", "algo.inner_lr=0.1,0.2"], "train.log_every"),
        (["recipe=transfer", "target=digits", "target.train_images=20,50"], "target.train_images"),
        (["recipe=transfer", "target=digits", "transfer=all,l2_sp"], "transfer"),
        (["recipe=transfer", "target=digits,mnist"], "target"),
        (["recipe=transfer", "target=digits", "algo=baseline,baseline_plus_plus"], ""),
        (["recipe=domain_adaptation", "data=mnist", "target=digits", "target.min_images=1,2"], ""),
        (["test.task.shots=1,5"], ""),
        (["backbone=conv4,mlp", "task.shots=1,1"], ""),
        (["data=glyphs,[glyphs,omniglot]"], ""),
    ],
    ids=str,
)
def test_a_search_is_over_what_a_validation_score_can_depend_on(
    words: list[str], refused: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = metarun("-m", "hydra/sweeper=optuna", "--dry-run", *words)
    if refused:
        one_line(given, f"{refused}: is not searched, no validation score depends on it")
    else:
        assert given.status == 0, given.err


@pytest.mark.parametrize(
    ("words", "searched"),
    [
        ([*SINUSOID, "+train.optimizer.eps=tag(log,interval(1e-9,1e-7))"], "+train.optimizer.eps"),
        (
            ["recipe=pretrain_meta", "optimizer=adam,sgd", "optimizer@pretrain.train.optimizer=adam,sgd"],
            "optimizer, optimizer@pretrain.train.optimizer",
        ),
    ],
    ids=str,
)
def test_a_key_is_searched_as_it_was_typed(words: list[str], searched: str, tmp_path: Path) -> None:
    """With the `+` that adds it, and at the place of a choice that has several."""
    given = done("-m", "hydra/sweeper=optuna", *words, f"outputs={tmp_path}", "--dry-run")
    assert given.out.startswith(f"search   20 trials of {searched}\n")


def test_choices_of_a_group_are_searched_by_a_pattern(tmp_path: Path) -> None:
    searched = done("-m", "hydra/sweeper=optuna", *SINUSOID, "optimizer=glob(a*)", f"outputs={tmp_path}", "--dry-run")
    assert "trials of optimizer" in searched.out


def test_an_interval_is_tried_at_a_point_between_its_ends() -> None:
    """Whose ends may be whole numbers, as a setting needs them, where what is drawn is none."""
    low, high, inside = study.corners({"a": space("a=interval(1,5)")})
    assert (low, high) == (["a=1"], ["a=5"])
    assert "." in inside[0]


class Later(Launcher):
    """Does not wait: the test runs what was submitted."""

    submitted: ClassVar[list[Job]] = []

    def __init__(self, *, at_once: int | None = None) -> None:
        pass

    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        self.submitted.extend(jobs)
        yield from ()


class Busy(Later):
    """Whose jobs find their folder locked."""

    def launch(self, jobs: Sequence[Job], config: DictConfig) -> Iterator[Ended]:
        for job in jobs:
            self.submitted.append(job)
            yield job, Outcome(2, "another process is running this"), 0.0


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    jobs: list[Job] = []
    monkeypatch.setattr(Later, "submitted", jobs)
    return jobs


def test_a_search_comes_to_its_end_by_a_launcher_that_does_not_wait(tmp_path: Path, submitted: list[Job]) -> None:
    """With `resume=false` too, under which the words of a trial lead to another folder each time."""
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.trials=1", "hydra.launcher._target_=test_search.Later"]
    words = [*search, *SINUSOID, "train.optimizer.lr=0.01,0.02", "resume=false", f"outputs={tmp_path}"]
    for _ in ("the trial", "its test"):
        done(*words)
        (job,) = submitted
        done(*job.arguments)
        submitted.clear()
    done(*words)
    assert not submitted
    (trained,) = (folder for folder in runs(tmp_path).values() if "val/score" in result(folder))
    (tested,) = (folder for folder in runs(tmp_path).values() if folder != trained)
    assert f"checkpoint={trained}" in result(tested)["overrides"]
    grid = ["recipe=test", f"checkpoint={trained}", "name=tests", f"outputs={tmp_path}", "test.episodes=8", "seed=0,1"]
    done("-m", "hydra.launcher._target_=test_search.Later", *grid)
    done(*submitted[0].arguments)
    assert "2 jobs: 1 finished before, 1 to run" in done("-m", *grid, "--dry-run").out


def test_a_trial_is_given_the_words_that_its_recipe_has_a_use_for(tmp_path: Path, submitted: list[Job]) -> None:
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.trials=4", "hydra.sweeper.at_once=4"]
    later = "hydra.launcher._target_=test_search.Later"
    words = ["recipe=train,continual", "continual.orders=2"]
    done(*search, later, *SINUSOID, *words, f"outputs={tmp_path}")
    given = {
        word: "continual.orders=2" in job.overrides
        for job in submitted
        for word in job.overrides
        if word.startswith("recipe=")
    }
    assert given == {"recipe=train": False, "recipe=continual": True}


def test_the_best_trial_of_a_recipe_that_tests_has_no_second_test(tmp_path: Path) -> None:
    words = ["hydra/sweeper=optuna", "hydra.sweeper.trials=1", *SINUSOID, "recipe=meta", "train.optimizer.lr=0.1,0.01"]
    searched = done("-m", *words, f"outputs={tmp_path}")
    (made,) = runs(tmp_path).values()
    assert "test/mse" in result(made)
    assert "; its own run has the test" in searched.err


def test_what_was_no_fault_of_a_trial_is_run_again(tmp_path: Path, submitted: list[Job]) -> None:
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.trials=2", "hydra.launcher._target_=test_search.Busy"]
    searched = metarun(*search, *SINUSOID, "algo.inner_steps=range(1,2)", f"outputs={tmp_path}")
    assert searched.status == 1
    assert len(submitted) == 2
    assert "has failed before" not in searched.err


def test_two_searches_may_make_the_tables_of_a_storage_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, failed = optuna.create_study, list[Exception]()

    def late(**options: Any) -> optuna.Study:
        if not failed:
            failed.append(IntegrityError("INSERT INTO alembic_version", None, Exception("UNIQUE constraint failed")))
            raise failed[0]
        return make(**options)

    monkeypatch.setattr(optuna, "create_study", late)
    made = study.Study(tmp_path / "search.db", ["a"], {"lr": space("lr=1,2")}, "random", 0)
    assert failed
    assert made.ended == 0


def marked(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """A folder that a killed search has marked as its first trial, and the search's database."""
    folder = tmp_path / "sweep" / "run"
    folder.mkdir(parents=True)
    database = folder.parent / "search.db"
    study = optuna.create_study(storage=trial.database(database), study_name="words", direction="maximize")
    study.ask()
    trial.mark(folder, database, "words", 0, prune=True)
    path = trial.beside(folder, "trial")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder, database


def test_a_mark_is_found_again_with_its_search_where_both_were_moved(tmp_path: Path) -> None:
    folder, _ = marked(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = tmp_path / "after" / folder.relative_to(tmp_path / "before")
    watch = trial.watcher(moved)
    assert watch is not None
    assert watch(1, 0.5) is False
    (seen,) = optuna.load_study(storage=trial.database(moved.parent / "search.db"), study_name="words").trials
    assert seen.intermediate_values == {1: 0.5}


@pytest.mark.parametrize("changes", [{"study": "other"}, {"trial": 77}, {}])
def test_a_mark_whose_search_is_gone_marks_no_trial(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, database = marked(tmp_path, **changes)
    if not changes:
        database.unlink()
    assert trial.watcher(folder) is None
    assert database.exists() == bool(changes)


def test_a_mark_of_a_trial_that_has_ended_marks_none(tmp_path: Path) -> None:
    folder, database = marked(tmp_path)
    optuna.load_study(storage=trial.database(database), study_name="words").tell(0, 1.0)
    assert trial.watcher(folder) is None


def test_a_mark_of_an_earlier_version_has_an_address(tmp_path: Path) -> None:
    folder, database = marked(tmp_path)
    note = {"storage": trial.database(database), "study": "words", "trial": 0, "prune": False}
    trial.beside(folder, "trial").write_text(json.dumps(note))
    assert trial.watcher(folder) is not None


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"a": 1}, r"run\.trial: is damaged \(it says no storage\); delete it"),
        ({"storage": "foo://x", "study": "words", "trial": 0}, r"trials in foo://x cannot be read \("),
        ({"database": "../search.db", "study": "words", "trial": "0"}, r"run\.trial: is damaged \(it says no trial\)"),
        ({"database": "../search.db", "study": "words", "trial": 0}, r"search\.db.* cannot be read \(.*can be deleted"),
    ],
)
def test_a_mark_or_a_database_that_is_damaged_is_one_line(note: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, database = marked(tmp_path)
    database.write_bytes(bytes(8192))
    trial.beside(folder, "trial").write_text(json.dumps(note))
    with pytest.raises(UserError, match=said):
        trial.watcher(folder)


def test_the_largest_seed_draws(tmp_path: Path) -> None:
    drawn_from = {"train.steps": space("train.steps=int(interval(1,9))")}
    found = study.Study(tmp_path / "search.db", ["a"], drawn_from, "random", seed=2**63 - 1)
    assert len(found.next(2)) == 2
