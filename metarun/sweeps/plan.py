"""What a sweep has to do: its jobs, their run folders, which are finished, and what to say in the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from metarun.config import check
from metarun.config.overrides import UNESCAPED, canonical, hint_of, key_of, make_literal, read, reading, varies
from metarun.config.shorthand import check_preset, expanded, folded, folded_choices, keys_of
from metarun.errors import JobRefused, JobsFailed, MadeOtherwise, UserError
from metarun.report.text import main_number
from metarun.runs import contents, result
from metarun.runs.folder import (
    check_writable,
    choose_folder,
    default_name,
    name_parts,
    named_after,
    refuse_other_config,
)
from metarun.sweeps.jobs import Job, Outcome, check_data, check_stages, completed, is_current, options_of
from metarun.system.launched import rank_and_size
from metarun.text import counted, duration, printable, shell_path

Ended = tuple[Job, Outcome, float]  # the seconds too
DECIDING = ("approach", "recipe", "recipe.source", "experiment")  # on whether a source is used
CHOSEN_BY = {"approach": ("algo", "transfer"), "recipe": ("algo",)}  # what else differs where these are swept


def read_words(loader: Any, config: DictConfig, arguments: Sequence[str], params: Mapping[str, str]) -> list[Override]:
    """Reads what a sweep was told.

    Args:
        loader: Hydra's loader of configs.
        config: The config of the sweep's command line.
        arguments: The overrides as they were typed.
        params: More keys and their values, from a file.

    Returns:
        The overrides, those of the file first.
    """
    typed = keys_of(arguments)  # which goes before what stands in a file
    own = {key: value for key, value in params.items() if key not in typed}
    found = OverridesParser.create(config_loader=loader).parse_overrides([*read_params(own, config), *arguments])
    for override in found:
        if isinstance(value := override.value(), ChoiceSweep):
            value.list = [_quoted(item) for item in value.list]
    return list(found)


def _quoted(item: Any) -> Any:
    """A text of several in quotes, where Hydra would write what it finds odd in it with a backslash: `my images`, `a:b`; in lists too."""
    if isinstance(item, list):
        return [_quoted(one) for one in item]
    if isinstance(item, str) and not UNESCAPED.fullmatch(item):
        return QuotedString(item, Quote.single)
    return item


def sweep_name(overrides: Sequence[Override], config: DictConfig, source: bool | None = None) -> str | None:
    """The name that all runs of the sweep share; None where each has it by itself, since nothing in it is swept.

    What is swept of its parts gives way to the word `sweep`: `glyphs-sweep` compares methods on glyphs.

    Args:
        overrides: Those of the sweep.
        config: The config of the sweep's command line.
        source: Whether any job uses a source; None where that is the config's to say.
    """
    swept = {override.key_or_group for override in overrides if varies(override)}
    swept |= {group for whole in swept for group in CHOSEN_BY.get(whole, ())}
    choices = folded_choices(config.hydra.runtime.choices, config)
    source = bool(config.recipe.source) if source is None else source
    parts = ["experiment"] if choices.get("experiment") or "experiment" in swept else name_parts(source)
    if any(override.key_or_group == "name" for override in overrides) or not swept & {*parts, "checkpoint"}:
        return None
    if "checkpoint" in swept:
        return "test-sweep"
    kept = named_after([part for part in parts if part not in swept], choices)
    return f"{kept}-sweep" if kept else "sweep"


def uses_source(loader: Any, master: DictConfig, batch: Sequence[Sequence[str]]) -> bool:
    """Whether any of the jobs of these words uses a source. A config is composed for each choice that decides on it."""

    def one(words: Sequence[str]) -> bool:
        try:
            return bool(loader.load_sweep_config(master, expanded(words)).recipe.source)
        except (HydraException, OmegaConfBaseException, UserError):  # which `jobs_of` tells
            return True

    chosen = {tuple(word for word in words if key_of(word) in DECIDING): words for words in batch}
    return any(map(one, chosen.values()))


def without_unread(
    loader: Any, master: DictConfig, batch: Sequence[Sequence[str]], checked: bool = False
) -> Sequence[Sequence[str]]:
    """The words of each job; where recipes are swept, without those that its own has no use for and another's has.

    Args:
        loader: Hydra's loader of configs.
        master: The config of the sweep's command line.
        batch: The words of each job.
        checked: Whether recipes are swept beside these jobs too, and for each key one of them is known to have a use.
    """
    if not checked and len({word for words in batch for word in words if key_of(word) == "recipe"}) < 2:
        return batch
    from metarun.runs.continuation import unread  # here: it has torch imported

    try:
        found = [unread(loader.load_sweep_config(master, expanded(words)), words) for words in batch]
    except (HydraException, OmegaConfBaseException, UserError):  # which `jobs_of` tells
        return batch
    by_all = set[str]() if checked else set.intersection(*({key_of(word) for word in own} for own in found))
    return [
        [word for word in words if word not in own or key_of(word) in by_all]
        for words, own in zip(batch, found, strict=True)
    ]


def jobs_of(loader: Any, master: DictConfig, batch: Sequence[Sequence[str]]) -> list[tuple[Job, Any]]:
    """The jobs of these words, each with its config; raises `JobRefused` where one cannot be composed, before any has run.

    The same job twice is one; `UserError` where jobs differ only in what changes no number.
    """
    if rank_and_size()[1] > 1:
        raise UserError("-m: a sweep starts its own processes; torchrun is for a single run")
    batch = without_unread(loader, master, batch)
    jobs: dict[Path, tuple[Job, Any]] = {}
    options = options_of(master.hydra)
    common = set(batch[0]).intersection(*batch) if batch else set()
    shared = {*common, *folded(word for word in batch[0] if word in common)} if batch else common
    for words in batch:
        differing_words = " ".join(printable(word) for word in words if word not in common)
        with naming(differing_words if len(batch) > 1 else ""):
            config = loader.load_sweep_config(master, expanded(words))
            raw = cast(list[str], OmegaConf.to_container(config.hydra.overrides.task))  # as they are, `${...}` too
            choices = folded_choices(config.hydra.runtime.choices, config)
            if not config.checkpoint:  # whose run has a method and data of its own, and its preset with them
                check_preset(raw, config.hydra.runtime.choices)
            with open_dict(config):
                del config["hydra"]
            overrides = canonical(raw, config)
            make_literal(config)
            config.name = config.name or default_name(choices, config.recipe.source, config.checkpoint)
            folder = choose_folder(config, overrides)
        own = [word for word in words if word.lstrip("+~").startswith("hydra")]
        differing = [word for word, hydras in zip(overrides, folded(raw), strict=True) if hydras not in shared]
        label = printable(" ".join(differing or overrides))
        job = Job((*options, *own, *overrides), tuple(raw), folder, label, tuple(choices.items()))
        known, other = jobs.setdefault(folder, (job, config))
        if known is not job and other != config:
            raise UserError(f"{label}: changes no number, so that {known.label} is the same run; nothing to sweep")
    return list(jobs.values())


def read_params(params: Mapping[str, str], master: DictConfig) -> list[str]:
    """The words of a sweeper's `params`, which stand in a file, read as those of the command line are."""
    words = {key: f"{key}={value}" for key, value in params.items()}
    hints = {key: hint_of(key, lambda path: OmegaConf.select(master, path)) for key in words}
    return [read(word, reading(hints[key]), sweep=True) for key, word in words.items()]


def fixed_word(override: Override) -> str:
    """An override that has one value, as the word of a job."""
    if override.is_sweep_override():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return str(override.input_line)


def check_jobs(jobs: Sequence[tuple[Job, Any]], here: bool = False) -> None:
    """Raises `JobRefused` for the first job that its config, its recipe or its checkpoint make impossible, before any has run.

    With `here`, jobs run on this machine, and what they need must be on it.
    """
    for job, config in jobs:
        with naming(job.label if len(jobs) > 1 else ""):
            check(config)
    for job, config in jobs:
        with naming(job.label if len(jobs) > 1 else ""):
            check_stages(job, config, here)


def check_folders(jobs: Iterable[Job]) -> None:
    """Checks that jobs can write their runs, and what a sweep keeps beside these; raises `UserError` before any has run."""
    for folder in dict.fromkeys(folder for job in jobs for folder in (job.folder, job.log.parent)):
        check_writable(folder)


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Errors that a user can mend become a `JobRefused` of the job with this label."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        raise JobRefused(label, error) from error


def state(job: Job) -> str:
    """How far the run of a job is, in a word or two."""
    if job.finished:
        return "finished"
    with suppress(OSError):  # of a folder that may not be looked into, which the run itself tells when it is started
        if (job.folder / contents.CONFIG).is_file():
            return "to go on"
    return "to run"


def already_ended(jobs: Iterable[tuple[Job, Any]], look_at_data: bool) -> list[Ended]:
    """The jobs that need not run: finished before, or in whose folder lies a result of another config, other data or weights.

    Args:
        jobs: All jobs, with their configs.
        look_at_data: Whether the data that are there are compared with those of each run.
    """
    ended, known = [], dict[str, Any]()
    for job, config in jobs:
        if job.finished:
            try:
                whole = completed(job, config) if config.checkpoint else config
            except UserError:  # which `check_jobs` tells
                continue
            try:
                refuse_other_config(job.folder, whole)
                if config.checkpoint and not is_current(job, whole):
                    continue
                if look_at_data:
                    check_data(job, whole, known)
            except UserError as error:
                ended.append((job, Outcome(2, str(error), refused=isinstance(error, MadeOtherwise)), 0.0))
            else:
                ended.append((job, Outcome(), 0.0))
    return ended


def failures(ended: Iterable[Ended]) -> list[str]:
    """A line or two for each job that failed."""
    lines = []
    for job, outcome, _ in ended:
        if outcome.status:
            lines.append(f"  {job.label}\n    {printable(outcome.message)}")
            if job.log.is_file():
                lines.append(f"    its output: {shell_path(job.log)}")
    return lines


def progress(job: Job, outcome: Outcome, seconds: float, number: int, total: int) -> str:
    """The line of a job that has ended.

    Args:
        job: The job.
        outcome: How it ended.
        seconds: How long it took.
        number: How many have ended, it included.
        total: How many there are.
    """
    finished = outcome.status == 0 and job.finished
    text = (main_number(job.result) or "done") if finished else printable(outcome.message)
    return f"[{number}/{total}] {seconds:.0f} s  {job.label}  {text}"


def time_left(seconds: float, ended: int, total: int) -> str:
    """What follows the line of a job that has ended: about how long the others take, where some are left."""
    return f"  (about {duration(seconds / ended * (total - ended))} left)" if 0 < ended < total else ""


def estimate(folder: Path, to_run: int) -> str:
    """What follows the number of runs to come: how long they take one after the other, by those in `folder` that have a result."""
    taken = []
    for path in folder.glob(f"*/{contents.RESULT}"):
        with suppress(UserError, TypeError, ValueError):  # a damaged one, which its own command tells
            taken.append(float(result.stored(path.parent).get(result.SECONDS, 0.0)))
    return f" (about {duration(sum(taken) / len(taken) * to_run)} one after the other)" if taken and to_run else ""


def say(line: str) -> None:
    """On the terminal, where progress goes."""
    print(line, file=sys.stderr, flush=True)


def conclude(ended: Sequence[Ended], then: str = "") -> None:
    """The report over the folders of the jobs; then the jobs that failed, and a `JobsFailed` if there are any.

    Args:
        ended: The jobs.
        then: What to do about those that failed; empty where the same command runs them again.
    """
    from metarun import report

    failed = failures(ended)
    try:
        for root in dict.fromkeys(job.folder.parent for job, _, _ in ended):
            if root.is_dir():
                report.write([root], root / contents.REPORT, root.name)
    except UserError as error:
        if not failed:
            raise
        say(f"\n{error}")
    if failed:
        say("\nfailed:\n" + "\n".join(failed))
        count = sum(bool(outcome.status) for _, outcome, _ in ended)
        then = then or _again(count, sum(outcome.refused for _, outcome, _ in ended))
        raise JobsFailed(f"{count} of {counted(len(ended), 'job')} failed, listed above; {then}")


def _again(failed: int, refused: int) -> str:
    """What the same command does about jobs that failed, of which some are refused for what their folders were made with."""
    if not refused:
        return "the same command runs them again"
    if refused == failed:
        return "the same command refuses them again, until what is said there is done"
    return f"the same command runs them again, but for the {refused} that it refuses until what is said there is done"
