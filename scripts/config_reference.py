"""Writes conf/README.md, the reference of everything that can be configured, from the schema and the YAML files.

Usage: python -m scripts.config_reference
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import metarun.cli  # noqa: F401 - it says where Hydra's plugins lie, whose settings stand on the page too
from metarun.config.folder import CONF
from metarun.config.ranges import shown
from metarun.config.reference import Choice, Entry, Reference, section, sections
from metarun.config.signature import ABSENT

PAGE = CONF / "README.md"

INTRODUCTION = """# Configuration

Everything that a run is made of is a key, and every key can be set on the command line: `metarun train.steps=500`. A
folder here is a group: `metarun algo=maml` takes the file `algo/maml.yaml`, which sets many keys at once. A file holds
what differs from the defaults of the class that it names (`_target_`); `metarun --cfg job` shows the whole config, and
`metarun help KEY`, `metarun help GROUP` and `metarun help GROUP=CHOICE` say at the shell what stands on this page.

What is given later counts: the schema, then the groups in the order of `config.yaml`, then the command line.

## Preset, experiment, approach

Three groups hold files that set keys of all kinds. They differ in what they are for:

- A **preset** is what one method wants on one data set. It applies by itself: `algo=maml data=omniglot` takes
  `preset/maml_omniglot.yaml`, with which it ends in about 15 minutes on two CPU cores. `preset=paper` takes the
  settings of the method's paper instead, which may need a GPU or a day; `~preset` takes none.
- An **approach** is a recipe, a method and a way of transfer under one name, so that one key can be swept over whole
  approaches: `metarun -m approach=scratch,fine_tuning,maml data=caltech101 target=pneumoniamnist`.
- An **experiment** is a whole command that reproduces a row of results, its data, budget and hardware included, and
  perhaps a sweep: `metarun experiment=omniglot_maml`. It comes after all other groups but `debug`, whose `debug=fast`
  cuts the steps, episodes and repeats of any command to a few, as a trial.

The keys that are typed most:

| key | meaning |
| --- | --- |
| `algo` `data` `backbone` `wrapper` `optimizer` `schedule` `hardware` `recipe` `experiment` | groups: a file of `conf/<group>/` |
| `task.ways` `task.shots` `task.queries` | every task; `train.task.*` and `test.task.*` where they differ |
| `train.steps` `train.max_seconds` `train.tasks_per_step` | the budget, and the size of the meta-batch |
| `train.optimizer.lr` `train.validate_every` `train.patience` | meta-training |
| `algo.inner_lr` `algo.inner_steps` | the inner loop of MAML, FOMAML and Reptile |
| `test.episodes` | test episodes; 1,000 by default |
| `seed` `name` `outputs` `resume` | the run and its folder, `outputs/<name>/<overrides>` |

Your own files go into a folder with the same layout: `metarun --config-dir mine experiment=own` takes
`mine/experiment/own.yaml`. A file that sets keys of all kinds begins with `# @package _global_`, that of an optimiser with
`# @package train.optimizer`, and that of a schedule with `# @package train.schedule`. A constructor that hands its `**settings`
on to `super().__init__` has the settings of that class too. A group of your own is chosen with a plus: `+group=choice`.
"""


def page() -> str:
    """The text of conf/README.md."""
    reference = Reference([CONF])
    parts = [
        f"{INTRODUCTION}\n<!-- From here on this page is written by scripts/config_reference.py -->\n",
        "\n".join(_groups(reference)),
        "\n".join(_keys(reference)),
        "\n".join(_settings(reference)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _groups(reference: Reference) -> Iterator[str]:
    yield "## Groups\n"
    yield "| group | what it chooses | choices |"
    yield "|---|---|---|"
    for group, choices in reference.groups.items():
        yield f"| `{group}` | {_cell(reference.meaning(group))} | {', '.join(f'`{name}`' for name in choices)} |"
    yield ""


def _keys(reference: Reference) -> Iterator[str]:
    yield "## Keys\n"
    named = {key for key in sections() if not key.startswith("pretrain.train")}
    places: dict[str, list[Entry]] = {"": []}
    for key, entry in reference.keys.items():
        place = key.rpartition(".")[0]
        if not place.startswith("pretrain.train"):
            places.setdefault(place if place in named else "", []).append(entry)
    for place, entries in places.items():
        if place:
            yield f"### {place}\n"
            yield f"{section(place)}\n"
        yield from _table(entries)
    yield "`pretrain.train` has the keys of `train`.\n"


def _settings(reference: Reference) -> Iterator[str]:
    yield "## Settings of the choices\n"
    yield "The keys that a choice of a group adds, with the values that they have there.\n"
    for group, choices in reference.groups.items():
        tables: dict[tuple[str, ...], list[Choice]] = {}
        for choice in choices.values():
            if rows := tuple(_rows(choice.entries())):
                tables.setdefault(rows, []).append(choice)
        for rows, same in tables.items():
            yield f"### {', '.join(f'{group}={choice.name}' for choice in same)}\n"
            yield f"{'. '.join(choice.meaning for choice in same)}.\n"
            yield from HEADER
            yield from rows
            yield ""


HEADER = ("| key | meaning | type and range | default |", "|---|---|---|---|")


def _table(entries: Iterable[Entry]) -> Iterator[str]:
    yield from HEADER
    yield from _rows(entries)
    yield ""


def _rows(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        kind = ", ".join(filter(None, [entry.type, entry.range, f"in {entry.unit}" if entry.unit else ""]))
        default = "must be given" if entry.default is ABSENT else f"`{shown(entry.default)}`"
        yield f"| `{entry.key}` | {_cell(entry.meaning)} | {_cell(kind)} | {_cell(default)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
