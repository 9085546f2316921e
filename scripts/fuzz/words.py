"""Values that the schema does not allow, or only just, in commands of all kinds."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metarun.config import Config
from metarun.config.validation import settings

from .commands import BASE, Findings, check, shown

VALUES = [
    "0", "1", "-1", "2", "1.5", "-0.0", "1e-300", "1e400", "nan", "-nan", "inf", "-inf", str(2**31), str(2**63 - 1), str(2**63),
    str(-(2**63) - 1), str(2**64), "1" + "0" * 400, "true", "null", "~", "''", "a", "[]", "[1,2]", "[1,a]", "{}", "{a: 1}", "[[1]]",
    "[null]", "é", "日本", "%s", "$x", "${seed}", "${nowhere}", "\\\\", "a b", "=", "a=b", "a,b", "interval(0,1)", "range(1,3)",
    "choice(1,2)",
    "glob(*)", "1_000", "0x10", "0b1", "1e3", "+5", "(", ")", "[", "]", "{", "}", "'", '"', "#", "/", "../..", "~/x", "cpu", "gpu",
    "torch.load", "builtins.exec", "metarun.algos.maml.MAML", "$", "${oc.env:HOME}", "a" * 3000,
]  # fmt: skip
KEYS = ["algo", "data", "backbone", "optimizer", "schedule", "hardware", "wrapper", "augment", "target", "transfer", "recipe", "approach",
        "preset", "experiment", "debug", "hydra/launcher", "hydra/sweeper", "hydra.launcher.at_once", "hydra.sweeper.trials",
        "hydra.job.name", "hydra.mode", "hydra.verbose", "algo.inner_lr", "algo.inner_steps", "algo.test_inner_steps", "backbone.width",
        "backbone.layers", "backbone.norm", "data.noise", "train.optimizer.lr", "train.optimizer.fused", "train.schedule._target_",
        "algo._target_", "nowhere", "algo.nowhere", "nowhere.a.b"]  # fmt: skip
OPTIONS = ["--cfg", "job", "--dry-run", "-sc", "--info", "--config-dir", "nowhere", "--config-name", "-h",
           "--hydra-help",
           "--version", "--resolve", "--package", "-x", "--", ""]  # fmt: skip


def schema_keys() -> list[str]:
    """Every key of the schema, and some of groups and of Hydra."""
    return [*(key for key, _ in settings(Config) if not key.startswith(("outputs", "runs", "checkpoint"))), *KEYS]


def words_strategy(bases: Sequence[Sequence[str]] = (BASE,)) -> Any:
    """Command lines: one of `bases`, perhaps with a word changed or left out, and one to three more words, anywhere."""
    st: Any = importlib.import_module("hypothesis.strategies")

    value = st.one_of(
        st.sampled_from(VALUES),
        st.integers().map(str),
        st.floats().map(str),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    )
    sign = st.sampled_from(["", "", "", "", "+", "~", "++"])
    word = st.builds(lambda mark, key, text: f"{mark}{key}={text}", sign, st.sampled_from(schema_keys()), value)
    words = st.lists(st.one_of(word, word, word, word, st.sampled_from(OPTIONS)), min_size=1, max_size=3)
    words = st.one_of(words, words, words, words.map(lambda found: ["-m", *found, "--dry-run"]))

    def changed(base: Sequence[str], added: list[str], how: int, at: int, text: str) -> list[str]:
        kept = list(base)
        at %= len(kept)
        if how == 0:
            del kept[at]
        elif how == 1 and "=" in kept[at]:
            kept[at] = f"{kept[at].partition('=')[0]}={text}"
        elif how == 2:
            kept[at] = kept[at][:-1]
        return [*kept, *added]

    plain = st.builds(changed, st.sampled_from(bases), words, st.integers(0, 8), st.integers(0, 30), value)
    own = st.builds(changed, st.sampled_from(bases), st.just([]), st.integers(0, 2), st.integers(0, 30), value)
    helped = st.lists(st.one_of(st.sampled_from(schema_keys()), value), min_size=0, max_size=2).map(
        lambda of: ["help", *of]
    )
    return st.one_of(plain, plain, plain, own, helped)


def fuzz_words(
    seconds: float, seed: int, bases: Sequence[Sequence[str]] = (BASE,), examples: int = 50
) -> tuple[int, int]:
    """Tries command lines for some seconds, `examples` between two looks at the clock, and prints each finding.

    Args:
        seconds: How long.
        seed: Of the first; the next ones have the numbers after it.
        bases: The commands that are varied.
        examples: As many are tried between two looks at the clock.

    Returns:
        How many were tried, and how many findings there are.
    """
    hypothesis: Any = importlib.import_module("hypothesis")  # which not everybody has
    began, found = time.monotonic(), Findings("command lines")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        number = seed

        def once(words: list[str]) -> None:
            outputs = Path(folder, "outputs")
            shutil.rmtree(outputs, ignore_errors=True)
            with found.trial(shown(words)):
                check(words, outputs)

        while time.monotonic() - began < seconds:
            given: Any = hypothesis.given  # whose result has no type, nor that of seed
            trial = given(words_strategy(bases))(once)
            options = hypothesis.settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            seeded: Any = hypothesis.seed
            seeded(number)(options(trial))()
            number += 1
    return found.counts()
