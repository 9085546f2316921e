"""`metarun --help` and `metarun help`: what a key, a group or a choice means, from what checks the config."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence

from metarun.config.ranges import shown
from metarun.config.reference import Choice, Entry, Reference, section
from metarun.config.shorthand import PAPER
from metarun.config.signature import ABSENT
from metarun.errors import UserError, nearest
from metarun.renamed import renamed_choice, renamed_key
from metarun.text import listed, text_width

NARROW = 60  # columns below which a meaning stands under its name
WITHIN = "\N{NO-BREAK SPACE}"  # a space inside a word of an example, at which no line may end

FRONT = """\
metarun: meta-learning experiments from the shell.

  metarun                        protonet on the built-in glyphs, in minutes
  metarun algo=maml data=omniglot   meta-train, choose on validation, test
  metarun algo=maml data=sinusoid backbone=mlp             regression
  metarun data=folder data.root=DIR    your own images, one folder a class
  metarun data=text data.root=FILE encoder=minilm    your own texts
  metarun recipe=transfer data=caltech101 target=pneumoniamnist
                                 pretrain on a source, then learn a target
  metarun recipe=test checkpoint=outputs/RUN   only test a finished run
  metarun -m algo=maml,protonet seed=0,1,2     a sweep
  metarun runs [runs=DIR]        the runs so far: results, when, how far
  metarun algo=maml debug=fast   a whole command in seconds, as a trial

group=choice takes a file of conf/, a.b=value sets a key.
  metarun help [GROUP | GROUP=CHOICE | KEY]    what it means, and its range
  metarun --cfg job      the whole config, with what the overrides make of it
  metarun --hydra-help   Hydra's own options
  metarun -sc install=bash (or zsh, fish)      shell completion
METARUN_DATA, METARUN_CACHE    where data sets and their caches lie
METARUN_TRACEBACK=1            the traceback of an error
"""


def front_page(reference: Reference) -> str:
    """The text of `metarun --help`: what is typed most, then the choices of every group. No config is composed for it."""
    listed: dict[str, list[str]] = {}
    for group, choices in reference.groups.items():
        for name in choices:
            inside, _, choice = f"{group}/{name}".rpartition("/")
            listed.setdefault(inside, []).append(choice)
    lines = [line for group, names in sorted(listed.items()) for line in _listing(group, sorted(names))]
    notes = "A choice may lie in a folder of its group: algo=learn2learn/maml."
    return "\n".join([FRONT, "Groups (group=choice)", "", *lines, "", notes])


def _listing(group: str, names: Sequence[str]) -> list[str]:
    return textwrap.wrap(
        f"{group}: {', '.join(names)}",
        text_width(),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def answer(words: Sequence[str], reference: Reference) -> str:
    """The text of `metarun help words...`.

    Args:
        words: Keys, groups and choices (`GROUP=CHOICE`); none asks for the overview.
        reference: What there is to know of the groups, choices and keys.

    Raises:
        UserError: A word is no key, group or choice; it names the nearest.
    """
    found = [_about(word, reference) for word in words] if words else [overview(reference)]
    return "\n\n".join(map("\n".join, found)).replace(WITHIN, " ")


def overview(reference: Reference) -> Iterator[str]:
    """What can be asked for: the groups, and the keys of the schema."""
    yield "metarun help GROUP           what a group chooses, and its choices"
    yield "metarun help GROUP=CHOICE    what a choice is, and its settings"
    yield "metarun help KEY             what a key means: type, range, default, example"
    yield ""
    yield "Groups (GROUP=CHOICE on the command line)"
    yield ""
    for group in reference.groups:
        yield from _item(group, reference.meaning(group))
    yield ""
    yield "Keys (KEY=VALUE on the command line)"
    yield ""
    for key, entry in reference.keys.items():
        if not key.startswith("pretrain.train.") and key not in reference.groups:
            yield from _item(key, entry.meaning)
    yield ""
    yield from _wrapped("The settings of a method, data set or backbone are the keys below its group, such as "
                        "algo.inner_lr: metarun help algo=maml. pretrain.train has the keys of train.")  # fmt: skip


def _about(word: str, reference: Reference) -> list[str]:
    """What one word means."""
    word = word.strip()
    group, equals, name = word.partition("=")
    if equals:
        if group not in reference.groups:
            if group in reference.keys or reference.explained(group):
                return _about(group, reference)  # key=value asks for the key
            old = renamed_choice(group, name)
            raise UserError(old or f"help {word}: there is no group {group}{nearest(group, reference.groups)}")
        choices = reference.groups[group]
        if name and (in_folder := [choice for choice in choices.values() if choice.name.startswith(f"{name}/")]):
            return list(_folder(group, name, in_folder))
        if name not in choices:
            old = renamed_choice(group, name)
            raise UserError(old or f"help {word}: there is no such choice{nearest(name, choices) or _list(choices)}")
        return list(_choice(choices[name]))
    lines: list[str] = []
    if word in reference.groups:
        lines = list(_group(word, reference))
    if section(word):
        inside = [entry for key, entry in reference.keys.items() if key.startswith(f"{word}.")]
        lines += [""] if lines else [word, *_wrapped(section(word)), ""]
        for entry in inside:
            lines += _short(entry)
    if not lines and word in reference.keys:
        lines = list(_entry(reference.keys[word], reference.group_of(word)))
        if presets := [
            f"{shown(choice.sets[word])} in {name}"
            for name, choice in reference.groups["preset"].items()
            if word in choice.sets
        ]:
            lines += _item("With a preset", f"{', '.join(presets)}; metarun --cfg job shows what a run has")
        for choice, entry in reference.explained(word):
            lines += _item(f"{choice.group}={choice.name}", entry.default_text)
    if not lines and (found := reference.explained(word)):
        lines = list(_settings(word, found))
    if not lines and (below := sorted(key for key in reference.words if key.startswith(f"{word}.") and "=" not in key)):
        lines = [word, ""]  # a node inside of a choice's
        for key in below:
            lines += [line for _, entry in reference.explained(key)[:1] for line in _short(entry)]
    if not lines:
        chosen = [f"{group}={word}" for group, choices in reference.groups.items() if word in choices]
        near = f"; did you mean {' or '.join(chosen[:3])}?" if chosen else nearest(word, reference.words)
        hint = renamed_key(word) or f"there is no such key or group{near}"
        raise UserError(f"help {hint}" if hint.startswith(word) else f"help {word}: {hint}")
    return lines


def _group(group: str, reference: Reference) -> Iterator[str]:
    yield group
    yield from _wrapped(reference.meaning(group))
    yield ""
    for name, choice in reference.groups[group].items():
        yield from _item(f"{group}={name}", choice.meaning)
    yield ""
    yield from _wrapped(f"metarun help {group}={next(iter(reference.groups[group]))} says more of one.")


def _folder(group: str, name: str, inside: Sequence[Choice]) -> Iterator[str]:
    """The choices in a folder of a group."""
    yield f"{group}={name}"
    yield from _wrapped(
        "Takes the one of these that is for the method and the data, where there is one."
        if (group, name) == ("preset", PAPER)
        else "A folder of choices, each of which is chosen by its whole name."
    )
    yield ""
    for choice in inside:
        yield from _item(f"{group}={choice.name}", choice.meaning)


def _choice(choice: Choice) -> Iterator[str]:
    yield f"{choice.group}={choice.name}"
    if choice.meaning:
        yield from _wrapped(f"{choice.meaning}.")
    if choice.notes:
        yield from _wrapped(choice.notes)
    for _, _, signature in choice.nodes[:1]:
        if signature and signature.summary:
            yield ""
            yield from _wrapped(signature.summary)
    entries = list(choice.entries())
    if entries:
        yield ""
        for entry in entries:
            yield from _short(entry)
    if choice.sets:
        yield ""
        # A sweep's values are one word, which may be longer than a line.
        pairs = [f"{key}={re.sub(',(?=[^ ])', ', ', shown(value))}" for key, value in choice.sets.items()]
        yield from _wrapped(f"It sets {', '.join(pairs)}.")
    if choice.brings:
        yield ""
        yield from _wrapped("It brings " + ", ".join(choice.brings) + ".")
    yield ""
    yield from _wrapped(f"Example: {choice.command}")


def _settings(key: str, found: Sequence[tuple[Choice, Entry]]) -> Iterator[str]:
    """A key that several choices know, once for each meaning."""
    yield key
    by_meaning: dict[tuple[str, str, str], list[tuple[Choice, Entry]]] = {}
    for choice, entry in found:
        by_meaning.setdefault((entry.meaning, entry.type, entry.range), []).append((choice, entry))
    for (meaning, _, _), same in by_meaning.items():
        yield ""
        yield from _wrapped(meaning)
        by_value: dict[str, list[str]] = {}
        for choice, entry in same:
            by_value.setdefault(entry.about, []).append(choice.name)
        for about, names in by_value.items():
            yield from _wrapped(f"{same[0][0].group}={', '.join(names)}: {about}", "    ")
    choice, entry = found[0]
    yield ""
    yield from _wrapped(f"Example: {_command(choice, entry)}")


def _command(choice: Choice, entry: Entry) -> str:
    """A command that has the key: with its choice, or the choice's own command where that has keys which must be given."""
    word, chosen = _given(entry), f"{choice.group}={choice.name}"
    if entry.key.startswith("pretrain."):
        return f"metarun {entry.beside}{word}"
    required = [one.key for one in choice.entries() if one.default is ABSENT]
    if entry.key.startswith("target.data."):
        others = [f"target.{key}=/path/to/it " for key in required if f"target.{key}" != entry.key]
        return f"metarun recipe=transfer target={choice.name} {''.join(others)}{word}"
    if required and chosen in choice.command.split():
        return choice.command if entry.key in required else f"{choice.command} {word}"
    sweeps = "-m " if choice.group.startswith("hydra/") else ""
    return f"metarun {sweeps}{chosen} {word}"


def _given(entry: Entry) -> str:
    """The key with its example, as one word of the shell."""
    return f"{entry.key}={shlex.quote(entry.example)}".replace(" ", WITHIN)


def _entry(entry: Entry, home: tuple[str, str] | None) -> Iterator[str]:
    yield entry.key
    yield from _wrapped(entry.meaning)
    if home:  # a node that names a class
        yield from _wrapped(f"It has the settings of one of the choices of {home[0]}: metarun help {home[0]}.")
        return
    yield from _item("Type", entry.type)
    if entry.range:
        yield from _item("Range", entry.range)
    if entry.unit:
        yield from _item("Unit", entry.unit)
    yield from _item("Default", entry.default_text)
    yield from _item("Example", f"metarun {entry.beside}{_given(entry)}")


def _short(entry: Entry) -> Iterator[str]:
    yield f"  {entry.key}"
    yield from _wrapped(entry.meaning, "      ")
    yield from _wrapped(entry.about, "      ")


def _item(name: str, text: str) -> Iterator[str]:
    """A name and what it means; the text stands in a column of its own, below a long name, or below any where columns are few."""
    width = text_width()
    if width < NARROW:
        yield f"  {name}"
        yield from _wrapped(text, "      ")
        return
    column = 26
    lines = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False) or [""]
    if len(name) > column - 4:
        yield f"  {name}"
    else:
        yield f"  {name:{column - 2}}{lines.pop(0)}".rstrip()
    yield from (f"{'':{column}}{line}" for line in lines)


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        text_width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list(names: Sequence[str] | dict[str, Choice]) -> str:
    return f"; there are {listed(names)}"
