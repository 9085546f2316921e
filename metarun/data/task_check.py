"""Whether a split of a table can serve tasks of a shape, and what leads on where it cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from metarun.core import TaskShape, count_text, least
from metarun.data.imbalanced import most_queries
from metarun.data.source import PURPOSE, Split
from metarun.data.varied import fewest_items, shortage
from metarun.errors import UserError
from metarun.text import counted, printable

if TYPE_CHECKING:
    from metarun.data.table_source import TableSource


def refuse_one_way(split: Split, task: TaskShape) -> None:
    """Checks that tasks of classes have more than one class.

    Raises:
        UserError: They have one.
    """
    if least(task.ways) == 1:
        raise UserError(
            f"{key_of_tasks(split)}.ways={count_text(task.ways)}: a task of one class has one answer, which is always right; take at "
            "least 2"
        )


def key_of_tasks(split: Split) -> str:
    """Names the part of the config that says how the tasks of a split are."""
    return "train.task" if split == "train" else "test.task"


@dataclass(frozen=True)
class TaskCheck:
    """Checks that a split has enough classes for its tasks, and items in each.

    Args:
        source: The classes, and how they are divided.
        split: Whose tasks are checked.
        task: Their shape.
    """

    source: TableSource
    split: Split
    task: TaskShape

    def check(self) -> None:
        """Checks all of it.

        Raises:
            UserError: Something is short; the message says how many classes fell where, and what to set.
        """
        if self.task.query_dirichlet is not None and not self.task.plain:
            raise UserError(
                f"{self.key}.query_dirichlet={self.task.query_dirichlet:g}: divides the queries of tasks of one shape, without unlabelled "
                "items"
            )
        refuse_one_way(self.split, self.task)
        self.check_classes()
        self.check_items()

    @property
    def key(self) -> str:
        """The part of the config that says how these tasks are."""
        return key_of_tasks(self.split)

    @property
    def sizes(self) -> np.ndarray:
        """The items of each class that the tasks are drawn from."""
        return self.source.table.sizes[self.source.classes_of(self.split, self.task)]

    def check_classes(self) -> None:
        """Checks the number of the classes.

        Raises:
            UserError: The tasks need more.
        """
        source, split, task, turns = self.source, self.split, self.task, self.source.turns
        ways, needed = task.needed_ways, task.needed_ways + task.distractors
        counts = {one: len(source.classes_of(one, task)) * turns for one in source.splits}
        here = counts[split]
        if here < needed <= len(source.splits[split]) * turns:  # without `min_items` there are enough
            own = np.repeat(source.table.sizes[source.splits[split]], turns)
            enough = int(np.sort(own)[-needed])
            on = f"take {self.key}.min_items={enough}" if enough >= fewest_items(task) else self._leads_on()
            raise UserError(
                f"task.min_items={task.min_items}: leaves {here} of the {counted(len(own), 'class', 'classes')} for "
                f"{PURPOSE[split]}, and a task needs {needed}; {on}"
            )
        above = f"task: ways = {ways} is above the {counted(here, 'class', 'classes')} of the {split} split"
        if here < ways and source.undivided:
            raise UserError(
                f"{above}; every split has the same ones, so that no test is of new classes. {self._as_target(here)}"
            )
        if here < ways:
            total = len(np.unique(np.concatenate([source.classes_of(one, task) for one in source.splits]))) * turns
            told = ", ".join(f"{count} for {PURPOSE[one]}" for one, count in counts.items())
            fits = min(counts.values()) - task.distractors
            fitting = f"[{least(task.ways)},{fits}]" if least(task.ways) < min(ways, fits) else fits
            where = f" ({self.key}.ways, where that is given)"  # which one is not known here
            take = f"take task.ways={fitting}{where}, more classes" if fits > 1 else "take more classes"
            raise UserError(
                f"{above}: of {total} classes {told}, since tests are of classes that are new; {take}, or another "
                f"division (data.ratios, where the data set has it). {self._as_target(total)}"
            )
        if here < needed:
            raise UserError(
                f"{self.key}.distractors={task.distractors}: with {ways} ways they are above the {here} classes of the "
                f"{split} split; take at most {here - ways}"
            )

    def check_items(self) -> None:
        """Checks the number of the items of each class.

        Raises:
            UserError: A class has too few.
        """
        task, split, sizes = self.task, self.split, self.sizes
        names = [self.source.table.names[number] for number in self.source.classes_of(split, task)]
        if found := shortage(task, sizes, self.source.called):
            place, short, _ = found
            raise UserError(
                f"task: {short} of the smallest class of the {split} split, {printable(names[place])}; {self._leads_on()}"
                f"{self._few_elsewhere()}"
            )
        if task.query_dirichlet is not None and (most := most_queries(task, sizes)) <= least(task.queries):
            out = self._leaving_out(int(sizes.min()) + 1)
            larger = f", or leave small classes out: {out}" if out else ""
            raise UserError(
                f"{self.key}.query_dirichlet={task.query_dirichlet:g}: leaves no shares to draw: the smallest class of the {split} split, "
                f"{printable(names[sizes.argmin()])}, has {counted(most, self.source.called)} beside its shots, so that all classes get "
                f"queries = {task.queries}; lower {self.key}.queries or {self.key}.shots{larger}"
            )

    def _few_elsewhere(self) -> str:
        """That other splits have too few classes for such tasks, of which no numbers of items help, for the end of a message."""
        source, task = self.source, self.task
        needed = task.needed_ways + task.distractors
        counts = {one: len(source.classes_of(one, task)) * source.turns for one in source.splits if one != self.split}
        few = [f"{count} for {PURPOSE[one]}" for one, count in counts.items() if count < needed]
        if self.split != "train" or not few or source.undivided:  # training tasks come first, and may be other ones
            return ""
        return (
            f". Tasks of {count_text(task.ways)} ways have too few classes as well, {' and '.join(few)}. "
            f"{self._as_target(len(self.source.table.names))}"
        )

    def _leads_on(self) -> str:
        """What to do where classes of a split are too small for tasks: only what this split can then serve."""
        split, task, key, sizes = self.split, self.task, self.key, self.sizes
        given = {"shots": least(task.shots) - 1, "queries": least(task.queries) - 1, "unlabelled": task.unlabelled}
        lower = [f"{key}.{name}" for name, count in given.items() if count > 0]
        # Ranges let a small class serve with what it has.
        drawn = [
            f"{key}.{name}=[1,{count}]"
            for name, count in (("shots", task.shots), ("queries", task.queries))
            if isinstance(count, int) and count > 1
        ]
        lowered = [f"lower {' or '.join(lower)}"] if lower else []
        lowered += [f"let each task draw what its classes have: {' '.join(drawn)}"] if drawn else []
        out = self._leaving_out(fewest_items(task))
        left_out = [f"leave small classes out: {out}"] if out else []
        smallest = replace(task, shots=1, queries=min(least(task.queries), 1), unlabelled=0, protocol="uniform")
        if self._can_serve(split, task.min_items) and sizes.min() >= fewest_items(smallest):
            found = [*lowered, *left_out]
        else:  # for some class that is to serve no task is small enough
            out = self._leaving_out(fewest_items(smallest))
            found = left_out or [f"{lowered[-1]}, and leave small classes out: {out}" for _ in lowered[:1] if out]
        if task.labelled_share < 1 and shortage(replace(task, labelled_share=1.0), sizes) is None:
            found.append(f"raise {key}.labelled_share")
        return (
            ", or ".join(found)
            or self._fewer_ways()
            or (
                f"too few classes of this split have enough for any such task. {self._as_target(len(self.source.table.names))}"
            )
        )

    def _fewer_ways(self) -> str:
        """The ways that the classes which are large enough can serve; empty where these are fewer than 2, or as many as are asked for."""
        task, items = self.task, max(self.task.min_items, fewest_items(self.task))
        large = int((self.source.table.sizes[self.source.splits[self.split]] >= items).sum()) * self.source.turns
        fits, fewest = large - task.distractors, least(task.ways) if isinstance(task.ways, tuple) else 2
        if not fewest <= fits < task.needed_ways:
            return ""
        out = f" and {self.key}.min_items={items}" if items > task.min_items else ""
        ways = f"[{fewest},{fits}]" if isinstance(task.ways, tuple) and fewest < fits else fits
        return f"take {self.key}.ways={ways}{out}"

    def _leaving_out(self, items: int) -> str:
        """The setting that leaves classes of fewer items out; empty where too few would be left.

        Of all tasks, where they allow it and none leaves more out already; else of this split's.
        """
        if self.task.min_items <= items and all(self._can_serve(one, items) for one in self.source.splits):
            return f"task.min_items={items}"
        same = [one for one in self.source.splits if key_of_tasks(one) == self.key]
        return f"{self.key}.min_items={items}" if all(self._can_serve(one, items) for one in same) else ""

    def _can_serve(self, split: Split, items: int) -> bool:
        """Whether a split has as many classes of at least so many items as a task needs."""
        left = (self.source.table.sizes[self.source.splits[split]] >= items).sum() * self.source.turns
        return bool(left >= self.task.needed_ways + self.task.distractors)

    def _as_target(self, classes: int) -> str:
        """How classes are told apart without a meta-test."""
        if classes < 2:
            return "One class leaves nothing to tell apart: the data must say of each image which of several it is of"
        return f"To tell these {classes} classes themselves apart: recipe=target_only {self.source.as_target}"
