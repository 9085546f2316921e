"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "metarun").rglob("*.py"))


def test_nothing_but_a_config_knows_a_method_by_name() -> None:
    names = "|".join(
        found
        for path in (ROOT / "metarun" / "algos").glob("*.py")
        for found in re.findall(r"^class (\w+)", path.read_text(), re.M)
    )
    assert "MAML" in names
    # But for what a method says of itself.
    compared = r"\balgo\w*(\.(?!trains_on|uses_target)\w+)?\s*[!=]="
    known = re.compile(rf"metarun\.algos|{compared}|isinstance\([^)]*\b({names})\b")
    others = [path for path in MODULES if path.parent.name != "algos"]
    assert [f"{path}: {found[0]}" for path in others for found in known.finditer(path.read_text())] == []


def test_no_test_is_skipped() -> None:
    """But those of a real Slurm, which needs root and Debian's packages."""
    word = re.compile(r"\b(skip|skipif|importorskip|xfail)\(")
    skipping = {path.name: len(word.findall(path.read_text())) for path in Path(__file__).parent.glob("*.py")}
    assert {name: count for name, count in skipping.items() if count} == {"test_slurm.py": 1}
