"""Everything that a report leaves in its folder; `index.html` is whole in itself and opens offline."""

from __future__ import annotations

import base64
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import metarun
from metarun import files
from metarun.errors import UserError, lacks
from metarun.ops.measures import ERROR
from metarun.report import figures, rendering, tables
from metarun.report.collect import MALFORMED, Collection, collect
from metarun.report.figures import Drawing
from metarun.report.finished import FinishedRun
from metarun.report.summary import Section, summarise
from metarun.report.text import TOO_FEW
from metarun.runs.contents import PAGE
from metarun.runs.result import COMMAND, GIT_COMMIT, SCORE, TEST_EPISODES, half_of, key
from metarun.templates import template
from metarun.text import counted, printable, shell_path

NAMED = 10  # unfinished runs that the terminal names
PICTURES = 8  # of test tasks


class Composed(NamedTuple):
    """What a report shows, before any of it is written.

    Attributes:
        tables: Those on the terminal, in their order.
        legend: The lines below them.
        contents: The files, by name.
    """

    tables: list[tables.ReportTable]
    legend: list[str]
    contents: dict[str, bytes]


def write(roots: Sequence[Path], to: Path, title: str) -> Path | None:
    """Prints the table and writes all files to the folder `to`; returns the page, or None if no run is finished yet."""
    bad, title = dict[Path, str](), printable(title)
    while True:  # without a run that is left out, another one of its seed may be shown
        collection = collect(roots, besides=to, without=bad)
        try:
            composed = _composed(collection, to, title)
            break
        except MALFORMED:
            found = _malformed(collection, to, title)
            if not found.keys() - bad:
                raise
            bad |= found
    for problem in collection.problems:
        print(f"metarun: {printable(problem)}", file=sys.stderr)
    if composed is None:
        return None
    rendering.show(composed.tables)
    for line in composed.legend:
        print(line)
    for line in _unfinished(collection):
        print(line)
    _put(to, composed.contents)
    print(f"report   {shell_path(to / PAGE)}")
    return to / PAGE


def _composed(collection: Collection, to: Path, title: str) -> Composed | None:
    """The report over some runs; None if there is none. Raises one of `MALFORMED` where a run's values are not what metarun writes."""
    if not collection.groups:
        return None
    sections = summarise(collection)
    shown = [
        table
        for section in sections
        for table in (tables.section_table(section), tables.target_curve(section), tables.target_measures(section))
        if table is not None
    ]
    overview = tables.overview(sections)
    drawings = figures.draw(sections)
    every = [overview, *shown] if overview else shown
    texts = {
        "table.md": _markdown(title, every, collection),
        "table.tex": rendering.latex_file(every),
        "table.csv": rendering.as_csv(sections),
        PAGE: _html(title, every, sections, drawings, collection, to),
    }
    contents = {name: text.encode() for name, text in texts.items()}
    for drawing in drawings:
        contents |= {f"{drawing.name}.png": drawing.png, f"{drawing.name}.svg": drawing.svg}
    return Composed([*shown, overview] if overview else shown, _legend(shown), contents)


def _malformed(collection: Collection, to: Path, title: str) -> dict[Path, str]:
    """The folders of runs of which no report can be made, each by itself, with the reason."""
    found = {}
    for folder in dict.fromkeys(run.folder for run in collection.runs):
        try:
            _composed(collect([folder], besides=to), to, title)
        except MALFORMED as error:
            found[folder] = lacks(error)
    return found


def _put(to: Path, contents: dict[str, bytes]) -> None:
    """Writes the files, each all or nothing, the page last; removes the figures of an earlier report that has more."""
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{to}: the report cannot be written ({error.strerror or error})") from error
    for name, content in sorted(contents.items(), key=lambda item: item[0] == PAGE):
        files.save_bytes(to / name, content)
    for name in figures.NAMES:
        for path in (to / f"{name}.png", to / f"{name}.svg"):
            if path.name not in contents:
                path.unlink(missing_ok=True)


def _unfinished(collection: Collection) -> list[str]:
    """What the terminal says of runs that have no result."""
    names = [f"  {shell_path(folder)}" for folder in collection.unfinished]
    more = [f"  and {len(names) - NAMED} more"] if len(names) > NAMED else []
    heading = f"not finished (at work, stopped, pruned or failed): {len(names)} of {collection.total} runs"
    return [heading, *names[:NAMED], *more] if names else []


def _legend(shown: Sequence[tables.ReportTable]) -> list[str]:
    """What the terminal says of the two intervals and of the tests."""
    headings = {heading for table in shown for heading in table.headings}
    lines = []
    drawn = [over for over in tables.DRAWN if f"± over {over}" in headings]
    if drawn:
        lines.append(
            f"± over seeds: 95%, of the method with this budget; ± over {' or '.join(drawn)}: 95%, of these trained weights only."
        )
    if any(heading.startswith(tables.MINUS) for heading in headings):
        lines.append(
            f"minus the best: paired, on the {' or '.join([*drawn, 'seeds'])} that both have; p: Holm-adjusted."
        )
    return lines


def _markdown(title: str, every: Sequence[tables.ReportTable], collection: Collection) -> str:
    parts = [f"# {rendering.in_markdown(title)}\n", *map(rendering.markdown, every)]
    parts.append(
        "".join(
            f"- *{rendering.in_markdown(term)}*: {rendering.in_markdown(meaning)}\n"
            for term, meaning in tables.explained(every).items()
        )
    )
    if collection.unfinished:
        parts.append(
            f"Not finished ({len(collection.unfinished)}):\n\n"
            + "".join(f"- `{printable(str(path))}`\n" for path in collection.unfinished)
        )
    return "\n".join(parts)


def _html(
    title: str, every: Sequence[tables.ReportTable], sections: Sequence[Section], drawings: Sequence[Drawing],
    collection: Collection, to: Path,
) -> str:  # fmt: skip
    finished, unfinished = len(collection.folders), len(collection.unfinished)
    counts = f"{counted(finished, 'finished run')} in {counted(len(collection.groups), 'group')}"
    counts += f", {unfinished} not finished." if unfinished else "."
    return template(Path(__file__).parent, "page.html").render(
        title=title,
        counts=counts,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=metarun.__version__,
        facts=_facts(collection.folders),
        tables=every,
        files=["table.csv", "table.md", "table.tex"],
        explained=tables.explained(every).items(),
        drawings=drawings,
        pictures=_pictures(sections),
        runs=[
            _run(run, row.label, section, to) for section in sections for row in section.rows for run in row.group.runs
        ],
        unfinished=collection.unfinished,
        problems=collection.problems,
        **_commands(collection.folders),
    )


def _pictures(sections: Sequence[Section]) -> list[dict[str, str]]:
    """The first test task of the best groups, with what their runs of the first seed predicted of it."""
    found: list[dict[str, str]] = []
    for section in sections:
        for row in section.rows:
            if len(found) < PICTURES and (png := row.group.runs[0].task_picture()):
                address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
                found.append({"address": address, "caption": f"{section.title}: {row.label}"})
    return found


def _commands(runs: Sequence[FinishedRun]) -> dict[str, list[Any]]:
    """The commands that need nothing else as `commands`, and as `further` those that need other runs, each with what these are."""
    needed = [(run.result[COMMAND], run.needs) for run in sorted(runs, key=lambda run: bool(run.digest))]
    return {
        "commands": [command for command, needs in needed if not needs],
        "further": [(command, needs) for command, needs in needed if needs],
    }


def _facts(runs: Sequence[FinishedRun]) -> list[str]:
    """Which code, versions and hardware made the runs, and how many runs each where they differ."""
    told = {
        "commit": [str(run.result.get(GIT_COMMIT))[:12] for run in runs if run.result.get(GIT_COMMIT)],
        "torch": [run.result["versions"]["torch"] for run in runs if "torch" in run.result.get("versions", {})],
        "Python": [run.result["versions"]["python"] for run in runs if "python" in run.result.get("versions", {})],
        "device": [_device(run.result["hardware"]) for run in runs if "hardware" in run.result],
    }
    facts = []
    for name, values in told.items():
        numbers = Counter(values).most_common()
        each = [f"{value} ({counted(count, 'run')})" if len(numbers) > 1 else value for value, count in numbers]
        if each:
            facts.append(f"{name} {', '.join(each)}")
    return facts


def _device(hardware: dict[str, Any]) -> str:
    return f"{hardware.get('gpu') or hardware.get('device')}, {hardware.get('precision')}"


def _run(run: FinishedRun, label: str, section: Section, to: Path) -> dict[str, Any]:
    """A row of the list of runs."""
    measure, result = section.setting.measure, run.result
    if section.setting.tested:
        tested = key(run.tested, measure)
        value, half = result[tested], result.get(half_of(tested))
        spread = TOO_FEW if half is None else f"{tables.number(half, measure)} over {run.interval_over}"
    else:
        value, spread = result.get(SCORE), ""
        value = -value if value is not None and measure == ERROR else value
    seconds = run.train_seconds
    return {
        "label": label,
        "seed": run.seed,
        "result": tables.number(value, measure) + ("" if section.setting.tested else " (validation)"),
        "half": spread,
        "episodes": result.get(TEST_EPISODES, ""),
        "seconds": "" if seconds is None else f"{seconds:,.0f} s",
        "folder": run.folder.name,
        "link": _link(run.folder, to),
    }


def _link(folder: Path, to: Path) -> str:
    """The address of a run's folder on the page in `to`: the way from there, or the whole where they are on two drives."""
    try:
        return quote(Path(os.path.relpath(folder, to)).as_posix()) + "/"
    except ValueError:
        return Path(os.path.abspath(folder)).as_uri() + "/"
