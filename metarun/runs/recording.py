"""What a finished run writes of itself: `result.json`, and the config that was used."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig

from metarun import files
from metarun.config import flat, to_container
from metarun.data.origin import NO_LABELS, Origin
from metarun.data.source import DataSource
from metarun.encoders.encoded import classes_seen, of_any, saw_of
from metarun.inference.kept import kept_learner
from metarun.ops import batch_norm
from metarun.runs import contents, provenance, result
from metarun.runs.building import build_stages
from metarun.runs.run import Run
from metarun.stages.transfer import uses_method


def finish(run: Run, overrides: list[str], choices: dict[str, str], command: list[str], seconds: float) -> None:
    """Writes `result.json`, the mark of a finished run.

    Args:
        run: The run, whose stages have all been carried out.
        overrides: What was typed, as `result.json` keeps it.
        choices: The choice of each config group.
        command: The whole command, which begins with the words that start Python on metarun.
        seconds: How long this sitting took.
    """
    algorithm, config = run.algorithm, run.config
    main = result.tested(run.result)
    run.logger.hparams(flat(recorded(config)), run.result.get(main or ""), run.result.get(result.SCORE))
    data, left_out = run.data.describe(), unused(config)
    run.result |= {
        result.PROTOCOL: protocol(run, data),
        **({result.DATA: data} if config.recipe.source else {}),
        **({result.LEARNER: kept} if (kept := kept_learner(run)) else {}),
        **({result.CONTENT: run.target.describe()} if run.target else {}),
        "parameters": sum(value.numel() for value in algorithm.parameters()),
        "hardware": run.hardware.describe(),
        "versions": provenance.versions(),
        result.GIT_COMMIT: provenance.git_commit(),
        result.COMMAND: shlex.join(["metarun", *command[3:]]),
        result.OVERRIDES: overrides,
        result.CHOICES: {
            group: choice
            for group, choice in choices.items()
            if not group.startswith("hydra/") and group.partition("@")[0] not in left_out
        },
        result.SECONDS: seconds,
        "peak_memory": run.hardware.peak_memory(),
    }
    files.save_json(run.folder / contents.RESULT, run.result)


def protocol(run: Run, data: dict[str, Any]) -> dict[str, Any]:
    """Says how the numbers came about: what holds of the last learner, and what each stage says of itself."""
    algorithm = run.algorithm
    found: dict[str, Any] = {
        "norm": algorithm.backbone.norm,
        result.TRANSDUCTIVE: algorithm.transductive,
    }
    if run.target:
        found["labelled_images"] = batch_norm.labelled_rule(algorithm.backbone.norm)
    tested = [run.target.source] if run.target else list(run.tests.values()) or [run.data]
    if told := saw_of(tested, None if run.target else "test"):
        found["encoder"] = told
    # Of the network itself: not of what encoded its items, or made its training tasks.
    brought = [one for one in run.learner.origins if one.key in ("backbone", "backbone.from", "checkpoint")]
    library = next((one.library for one in brought if one.library), None)
    if library:
        found["backbone"] = {**library, "saw_these_classes": library_saw(library["saw"], tested)}
    if run.config.recipe.source:
        found |= {
            "test_inner_steps": algorithm.test_steps,
            "split": data.get("split", run.config.data.get("split")),
        }
    if overlap := run.trained_on_tests:
        found["trained_on_tests"] = overlap
    if run.data.labels_read:
        found["labels_read"] = labels_read(run.data.labels_read, run.learner.origins)
    found[result.SELECTED_BY] = run.learner.selected_by
    seen: dict[str, str] = {}
    meta_tested = any(stage.measures == result.TEST for stage in run.stages)
    for stage in run.stages:
        said = stage.protocol(run)
        seen |= said.get(result.SEEN, {})
        # What stands above is of the meta-test.
        if meta_tested and stage.measures == result.TARGET and result.TRANSDUCTIVE in said:
            found[result.TARGET] = _mode(run, said.pop(result.TRANSDUCTIVE))
        found |= said
    for name, of_set in found.get(result.SETS, {}).items():  # what is said above is of all of them together
        data_set = [run.tests[name]]
        if told := saw_of(data_set, "test"):
            of_set["saw_these_classes"] = told["saw_these_classes"]
        elif library:
            of_set["saw_these_classes"] = library_saw(library["saw"], data_set)
    return {**found, **_mode(run, found[result.TRANSDUCTIVE]), result.SEEN: seen}


def _mode(run: Run, transductive: bool) -> dict[str, bool]:
    """Says whether a prediction depends on other queries; of one query alone nothing is assumed of the others."""
    assumed = {"assumes_balanced_queries": run.algorithm.assumes_balanced_queries} if transductive else {}
    return {result.TRANSDUCTIVE: transductive, **assumed}


def library_saw(saw: str | None, tested: Iterable[DataSource]) -> str:
    """Says whether a library's weights saw classes that are tested on: `yes` if those of one of the data sets.

    Args:
        saw: What they were pretrained on, by name; None where it is not known.
        tested: The data sets.
    """
    return of_any(classes_seen(saw, member) for data in tested for member in data.underlying.members.values())


def labels_read(own: str, origins: Iterable[Origin]) -> str:
    """Says which labels were read before the test, by the run itself and for the weights that it began with.

    Args:
        own: Those that the run itself read.
        origins: Where these weights come from.
    """
    found = [own]
    for origin in origins:
        same = next((known for known in (own, NO_LABELS) if origin.labels_read.startswith(known)), None)
        if same is None:
            found.append(f"{origin.key}: {origin.labels_read}")
        else:  # what remains is of that with which these weights began in their turn
            found += filter(None, [origin.labels_read.removeprefix(same).removeprefix("; ")])
    return "; ".join(dict.fromkeys(found))


def unused(config: DictConfig) -> tuple[str, ...]:
    """Lists the parts and groups of the config that the recipe does not use.

    Without a source these are those that only a source needs, and where all stages use what an earlier run learned, its data
    and its network too, which are not those of this command line.
    """
    if config.recipe.source:
        return ()
    source = ("data", "unsupervised", "pretrain", "wrapper", "test", "continual")
    method = ("algo", "task", "train", "optimizer", "schedule", "preset", "usual")
    built = build_stages(config)
    if not any(stage.continues_config or stage.needs_data for stage in built):
        return (*source, *method, "backbone", "encoder", "augment", "target", "transfer")
    gives = any(stage.gives_weights for stage in built)
    return source if gives or uses_method(config) else (*source, *method)


def recorded(config: DictConfig) -> dict[str, Any]:
    """The plain values of the config, without what the recipe does not use."""
    left_out = unused(config)
    return {key: value for key, value in to_container(config).items() if key not in left_out}
