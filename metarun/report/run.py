"""The table at the end of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from metarun.errors import UserError, lacks
from metarun.ops.measures import ACCURACY, ERROR, MEDIAN_ERROR
from metarun.report import continual, target
from metarun.report.collect import MALFORMED, Unreadable, read
from metarun.report.text import count_text, error_form, half, mode_text, more_of_task, task_text
from metarun.runs.contents import RESULT
from metarun.runs.result import (
    AFTER_INNER_STEPS,
    BASELINES,
    CHANCE,
    CONTINUAL,
    DAMAGED,
    EPISODES,
    ITEMS_PER_SECOND,
    MEASURES,
    NOT_TRAINED,
    NOTHING,
    PROTOCOL,
    SCORE,
    SELECTED_BY,
    SELECTED_STEP,
    SETS,
    STAGES,
    TARGET_ACCURACY,
    TASKS_PER_SECOND,
    TEST,
    TEST_ACCURACY,
    TEST_ERROR,
    TRAIN_SECONDS,
    TRAIN_STEPS,
    VALIDATED_ONCE,
    WORST_CLASS,
    half_of,
    key,
    lost_of,
    of_set,
    stored,
)
from metarun.terminal import Terminal
from metarun.text import all_printable, counted, shell_path, shown_path

SHOWN_STEPS = {0, 1, 5, 10}


def show_stored(folder: Path, unchecked: str = "") -> None:
    """Shows the result of a finished run.

    Args:
        folder: The run folder.
        unchecked: Why it is not known whether the data are still those of the run; empty where it is.

    Raises:
        UserError: The result is damaged.
    """
    found = stored(folder)
    try:
        show(folder, found)
    except MALFORMED as error:
        raise UserError(f"{shown_path(folder / RESULT)}: is damaged ({lacks(error)}); {DAMAGED}") from error
    if unchecked:
        print(f"The data were not checked: {unchecked}")
    print("This run had finished before: nothing was computed; resume=false starts over beside it.")


def show(folder: Path, result: dict[str, Any]) -> None:
    """Prints the table of a result and where everything lies."""
    terminal, result = Terminal(), all_printable(result)
    what = subject(folder)
    tested = TEST_ACCURACY in result or TEST_ERROR in result
    if TARGET_ACCURACY in result:
        terminal.show(target.table(result, target_subject(folder)))
        if kept := target.kept(result):
            print(kept)
    if tested:
        if CONTINUAL in result:
            terminal.show(continual.table(result, what))
        else:
            terminal.show(_accuracies(result, what) if TEST_ACCURACY in result else _errors(result, what))
        if told := _own_measures(result):
            print(told)
    if encoder := result[PROTOCOL].get("encoder"):
        print(f"vectors of {encoder['name']}, {pretraining(encoder)}")
    if backbone := result[PROTOCOL].get("backbone"):
        print(f"backbone {backbone['name']}, {pretraining(backbone)}")
    if result.get(TRAIN_STEPS) == 0 and SCORE not in result:
        purpose = "tested: " if tested or TARGET_ACCURACY in result else ""
        trained = [name for name in result.get(STAGES, {}) if result.get(key(name, "steps"))]
        taken = trained and NOT_TRAINED not in result[PROTOCOL].get(SELECTED_BY, NOT_TRAINED)
        print(f"no step of training; {purpose}the weights {f'that {trained[-1]} left' if taken else 'as they were'}")
    elif TRAIN_STEPS in result:
        score = f"validation score {result[SCORE]:.4g}, " if SCORE in result else ""
        used = tested or TARGET_ACCURACY in result
        chosen = "tested: the weights" if used else f"{score}not tested; best.pt is that"
        best = "the last" if VALIDATED_ONCE in result[PROTOCOL].get(SELECTED_BY, "") else "the best on validation"
        why = best if SCORE in result else "as no validation had a finite score"
        rate, what = (ITEMS_PER_SECOND, "items") if ITEMS_PER_SECOND in result else (TASKS_PER_SECOND, "tasks")
        print(
            f"{counted(result[TRAIN_STEPS], 'step')} in {result[TRAIN_SECONDS]:.0f} s, {result[rate]:.3g} "
            f"{what}/s; {chosen} of step {result[SELECTED_STEP]}, {why}"
        )
    print(f"results  {shell_path(folder)}")
    if tested or TARGET_ACCURACY in result or TRAIN_STEPS in result:  # nothing else has a curve
        print(f"curves   tensorboard --logdir {shell_path(folder)}")


def pretraining(encoder: dict[str, Any]) -> str:
    """What an encoder or a backbone saw before, in words, from `protocol.encoder` or `protocol.backbone` of a result."""
    if "fitted_to" in encoder:
        return f"fitted to {encoder['fitted_to']}"
    if encoder["saw"] == NOTHING:
        return "whose weights were drawn and have seen nothing"
    if encoder["saw"] is None:
        return "of whose pretraining nothing is known"
    whether = {
        "yes": "which has classes that are tested on",
        "no": "which has none of the classes that are tested on",
    }.get(encoder["saw_these_classes"], "which may have classes that are tested on")
    return f"pretrained on {encoder['saw']}, {whether}"


def subject(folder: Path) -> str:
    """What a finished run was about, a line `protonet on glyphs`; empty where its folder does not say it."""
    try:
        run = read(folder)
    except Unreadable:
        return ""
    if not {"algo", "data"} <= run.choices.keys():
        return ""
    algo, source = run.choices["algo"], run.choices["data"]
    return f"{algo} on {run.tested_on}, trained on {source}\n" if run.tested_on else f"{algo} on {source}\n"


def target_subject(folder: Path) -> str:
    """What a finished run with a target was about, as `subject`: a line `linear_probe on digits, after baseline on glyphs`."""
    try:
        choices = read(folder).choices
    except Unreadable:
        return ""
    if "target" not in choices:
        return ""
    method, data = choices.get("algo"), choices.get("data")
    source = f"{method} on {data}" if method and data else ""
    if "transfer" not in choices:  # learned from the source and the target at once
        return f"{source}, tested on {choices['target']}\n" if source else ""
    return f"{choices.get('approach', choices['transfer'])} on {choices['target']}{source and f', after {source}'}\n"


def _own_measures(result: dict[str, Any]) -> str:
    """What the method or the data measured beside accuracy or error, in a line; empty where they measure nothing more."""
    known = {key(TEST, name) for name in (*MEASURES, WORST_CLASS)}
    sets = tuple(f"{of_set(TEST, name)}/" for name in result[PROTOCOL].get(SETS, ()))  # whose numbers have a table
    names = [
        name
        for name in result
        if name.startswith(f"{TEST}/") and half_of(name) in result and name not in known and not name.startswith(sets)
    ]

    def words(name: str) -> str:
        lost = f" ({counted(result[lost_of(name)], 'task')} of no number left out)" if lost_of(name) in result else ""
        number = result[name]
        if number is None or math.isnan(number):
            return f"no number{lost}"
        return f"{number:.4f} {half(result[half_of(name)], '.4f')}{lost}"

    return ", ".join(f"{name.removeprefix(f'{TEST}/')} {words(name)}" for name in names)


def _table(result: dict[str, Any], title: str, columns: tuple[str, ...]) -> Table:
    protocol = result[PROTOCOL]
    table = Table(
        "", title=f"{title}; norm {protocol['norm']}, {mode_text(protocol)}", title_justify="left", min_width=60
    )
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _accuracies(result: dict[str, Any], what: str) -> Table:
    if sets := result[PROTOCOL].get(SETS):
        return _by_set(result, what, sets)
    title = f"{what}{task_text(result[PROTOCOL]['test'])}"
    table = _table(result, title, ("accuracy", "95% interval", "episodes"))
    for prefix, name in {TEST: TEST, **BASELINES, CHANCE: CHANCE}.items():
        accuracy = key(prefix, ACCURACY)
        if accuracy in result:
            interval = half(result[half_of(accuracy)], ".2%") if half_of(accuracy) in result else ""
            table.add_row(name, f"{result[accuracy]:.2%}", interval, str(result.get(key(prefix, EPISODES), "")))
    return table


def _by_set(result: dict[str, Any], what: str, sets: dict[str, Any]) -> Table:
    """A row for each data set that was tested on, and one for their mean; fits 80 columns."""
    prefixes = [prefix for prefix in BASELINES if key(prefix, ACCURACY) in result]
    columns = ("tasks", "accuracy", "95% interval", *(["before"] if prefixes else []), "chance")
    tasks = {name: told["task"] for name, told in sets.items()}
    asked = {name: (count_text(task["queries"]), more_of_task(task)) for name, task in tasks.items()}
    alike = len({*asked.values()}) == 1  # a set may have its own
    in_all = ", {} queries a class{}".format(*next(iter(asked.values()))) if alike else ""
    table = _table(result, f"{what}{counted(len(sets), 'data set')}{in_all}", columns)

    def row(title: str, tasks: str, name: str) -> None:
        def number(kind: str, measure: str = ACCURACY) -> str:
            value = result.get(key(of_set(kind, name), measure))
            return "" if value is None else f"{value:.2%}"

        interval = half(result[half_of(key(of_set(TEST, name), ACCURACY))], ".2%")
        table.add_row(title, tasks, number(TEST), interval, *map(number, prefixes[:1]), number(CHANCE))

    for name, told in sets.items():
        own = "" if alike else ", {} queries{}".format(*asked[name])
        row(name, f"{count_text(told['task']['ways'])}-way {count_text(told['task']['shots'])}-shot{own}", name)
    table.add_section()
    row("mean", "", "")
    told = (f"{name}: {', '.join(filter(None, (of.get('classes'), of.get('images'))))}" for name, of in sets.items())
    episodes = result[key(of_set(TEST, next(iter(sets))), EPISODES)]
    table.caption = "\n".join([*told, f"{episodes} episodes each" + ("; before: without training" if prefixes else "")])
    table.caption_justify = "left"
    return table


def _errors(result: dict[str, Any], what: str) -> Table:
    title = f"{what}mean squared error from {count_text(result[PROTOCOL]['test']['shots'])} points"
    table = _table(result, title, ("mean", "95% interval", "median", "diverged", "episodes"))  # fits 80 columns
    last = result[PROTOCOL]["test_inner_steps"]
    for prefix, name in {TEST: TEST, **BASELINES}.items():
        steps = result.get(key(prefix, AFTER_INNER_STEPS), {})
        for step, numbers in steps.items():
            if int(step) in SHOWN_STEPS or int(step) == last:
                mean, width, median = (numbers[each] for each in (ERROR, half_of(ERROR), MEDIAN_ERROR))
                table.add_row(
                    f"{name}, {counted(int(step), 'step')}",
                    f"{mean:{error_form(mean)}}",
                    half(width, error_form(width or 0.0)),
                    f"{median:{error_form(median)}}",
                    str(numbers["diverged"]),
                    str(result[key(prefix, EPISODES)]),
                )
    return table
