"""Run folders as metarun leaves them, made up, for the tests of reports."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metarun.report.collect import collect
from metarun.report.summary import Section, summarise

GENERATOR = np.random.default_rng(0)


def make_run(
    folder: Path,
    *words: str,
    scores: Any = None,
    seed: int = 0,
    measure: str = "acc",
    ways: int = 5,
    shots: int = 1,
    fingerprint: str = "f0",
    choices: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    curve: list[float] | None = None,
) -> Path:
    """A run folder as metarun leaves it, made of the test scores `[episodes]` or `[inner steps, episodes]`.

    `config` and `result` come on top of what is made up here.
    """
    folder.mkdir(parents=True)
    chosen = {"algo": "protonet", "data": "omniglot", "backbone": "conv4", "recipe": "meta", "experiment": None}
    task = {"ways": ways, "shots": shots, "queries": 15}
    stored: dict[str, Any] = {
        "seed": seed,
        "name": "made",
        "checkpoint": None,
        "task": task,
        "test": {"task": {"ways": None}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**stored, **(config or {})}))
    data = {"fingerprint": fingerprint} | ({} if measure == "mse" else {"classes": {"train": 8, "val": 4, "test": 4}})
    found: dict[str, Any] = {
        "train/steps": 100, "train/seconds": 60.0, "val/score": 0.5 if measure == "acc" else -0.5,
        "protocol": {"norm": "batch", "transductive": False, "test": task, "split": None},
        "data": data, "command": shlex.join(["metarun", *words, f"seed={seed}"]),
        "overrides": [*words, f"seed={seed}"], "choices": chosen | (choices or {}),
        "versions": {"torch": "2.9.0", "python": "3.11.7"}, "git_commit": "0123456789abcdef", "peak_memory": {"host": 2**30},
        "hardware": {"device": "cpu", "gpu": None, "precision": "float32"},
    }  # fmt: skip
    if scores is not None:
        values = np.atleast_2d(np.asarray(scores, dtype=float))
        of_target = "-target" if "target/acc" in (result or {}) else ""  # beside the scores of the meta-test
        np.savez_compressed(folder / f"test_scores{of_target}.npz", steps=np.arange(len(values)), values=values)
        after = {str(step): summary(row, measure) for step, row in enumerate(values)}
        found |= {f"test/{name}": value for name, value in summary(values[-1], measure).items()}
        found["test/episodes"] = values.shape[1]
        if len(values) > 1:
            found["test/after_inner_steps"] = after
    (folder / "result.json").write_text(json.dumps(found | (result or {})))
    if curve:
        name = "val/acc" if measure == "acc" else "val/mse_median"
        lines = [json.dumps({"step": 10 * (index + 1), name: value}) for index, value in enumerate(curve)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def summary(values: np.ndarray, measure: str) -> dict[str, float]:
    """The numbers of `result.json`."""
    finite = values[np.isfinite(values)]
    numbers = {measure: finite.mean(), f"{measure}_ci95": 1.96 * finite.std(ddof=1) / np.sqrt(len(finite))}
    if measure == "mse":
        numbers |= {"mse_median": float(np.median(values)), "diverged": int((~np.isfinite(values)).sum())}
    return numbers


def sections(root: Path) -> list[Section]:
    return summarise(collect([root], root / "report"))


def pair(root: Path, ours: np.ndarray, theirs: np.ndarray, seed: int = 0, **options: Any) -> None:
    """A run of maml and one of protonet."""
    for algo, scores in (("maml", ours), ("protonet", theirs)):
        make_run(root / f"{algo}{seed}", f"algo={algo}", scores=scores, seed=seed, choices={"algo": algo}, **options)


def make_test(folder: Path, trained: Path, *words: str, result: dict[str, Any] | None = None, **options: Any) -> Path:
    """A test of the run in the folder `trained`; its choices are those of its own command line, and its seed by itself that run's."""
    words = ("recipe=test", f"checkpoint={trained}", *words)
    config = {"checkpoint": str(trained), "data": {"root": "here"}} | options.pop("config", {})
    found = {"checkpoint/sha256": trained.name} | (result or {})
    file = make_run(folder, *words, config=config, result=found, **options) / "result.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stored.items() if not key.startswith(("train/", "val/"))}))
    return folder


def grid(root: Path, seeds: int = 2) -> Path:
    """Two methods, of which protonet is better, times two settings; and an unfinished run."""
    for shots in (1, 5):
        for seed in range(seeds):
            hard = GENERATOR.normal(0.8, 0.05, 100)
            for algo, gain in (("maml", 0.0), ("protonet", 0.1)):
                steps = [hard - 0.5, hard - 0.1 + 0.01 * seed, hard + gain + 0.01 * seed]
                make_run(
                    root / f"algo={algo},shots={shots},seed={seed}", f"algo={algo}", f"task.shots={shots}",
                    scores=steps if algo == "maml" else steps[-1], shots=shots, seed=seed, choices={"algo": algo},
                    curve=[0.4, 0.6 + gain, 0.7 + gain + 0.01 * seed],
                )  # fmt: skip
    (root / "unfinished run").mkdir()
    (root / "unfinished run" / "config.yaml").write_text("seed: 9\n")
    return root


def with_target(root: Path, algo: str, *accuracies: float, half: float | None = 0.1, **numbers: Any) -> None:
    """A run on a target that learned from 5, 10, ... images."""
    curve = [
        {"train_images": 5 * 2**n, "acc": each, "acc_ci95": half, "test_images": 40}
        for n, each in enumerate(accuracies)
    ]
    found = {f"target/{name}": value for name, value in curve[-1].items()} | {"target/curve": curve}
    found |= {"target/classes": ["a", "b"], "target/data": {"fingerprint": "f"}, "target/over": "repeats", **numbers}
    make_run(root / algo, f"algo={algo}", choices={"algo": algo, "target": "digits"}, result=found)
