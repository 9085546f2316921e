"""Whether the code that made a result has changed since: the modules and configs that its choices lead to, then and now."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
# They report and launch, and compute no number of a run, but for what builds its data sets and draws its tasks.
UNRELATED = ("metarun.cli", "metarun.report", "metarun.sweeps", "metarun.plugins", "metarun.runs")
BUILDING = ("metarun.runs.building", "metarun.runs.run")  # which no config names


class Checkout:
    """A git checkout of metarun, asked what of a result's code changed.

    Args:
        root: Its top folder.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        # A table has hundreds of results of few commits, and these share most of their blobs.
        self._differences = functools.cache(self._read_differences)
        self._imports = functools.cache(self._read_imports)
        self._modules = functools.cache(self._read_modules)
        self._bases = functools.cache(self._read_bases)
        self._meaning = functools.cache(self._read_meaning)

    def git(self, *words: str) -> str:
        """Output of a git command; raises `subprocess.CalledProcessError` where it fails."""
        done = subprocess.run(
            ["git", "-C", str(self.root), *words], capture_output=True, text=True, check=True, encoding="utf-8"
        )
        return done.stdout

    def dirty(self) -> list[str]:
        """Tracked files with changes that are not committed, and files of the code that git does not know."""
        code = self.git("status", "--porcelain", "--untracked-files=all", "--", "metarun", "conf")
        tracked = self.git("status", "--porcelain", "--untracked-files=no")
        return sorted({line[3:] for line in (code + tracked).splitlines()})

    def code(self) -> str:
        """A short name of the code that HEAD has: equal for commits that differ in other files alone."""
        return self.git("rev-parse", "HEAD:metarun")[:6] + self.git("rev-parse", "HEAD:conf")[:6]

    def since(self, commit: str, choices: Mapping[str, Any]) -> list[str]:
        """Files of a run's code that say something else now than at a commit.

        Args:
            commit: The commit that the run was made at.
            choices: Its choices of Hydra's groups.

        Returns:
            Paths below the root; a commit that this clone does not have counts as a change of its own.
        """
        try:
            differences = self._differences(commit)
        except subprocess.CalledProcessError:
            return [f"commit {commit[:9]}, which this clone does not have"]
        return [path for path in self.files(choices) if path in differences and self._differs(*differences[path])]

    def files(self, choices: Mapping[str, Any]) -> list[str]:
        """Configs of a run's choices, and modules that these name, with all that they import."""
        configs = set(self._configs(choices))
        modules = {*BUILDING, *(module for path in configs for module in self._modules(path))}
        found: set[str] = set()
        open_ = {path for module in modules for path in self._located(module)}
        while open_:
            path = open_.pop()
            if path not in found:
                found.add(path)
                open_ |= set(self._imports(path)) - found
        return sorted(configs | found)

    def _configs(self, choices: Mapping[str, Any]) -> Iterable[str]:
        """The YAML of each choice, with those that it is built on."""
        waiting = ["config"]
        waiting += [f"{group.partition('@')[0]}/{choice}" for group, choice in choices.items() if choice]
        seen: set[str] = set()
        while waiting:
            name = waiting.pop().lstrip("/")
            path = f"conf/{name}.yaml"
            if name in seen or not (self.root / path).is_file():
                continue
            seen.add(name)
            yield path
            waiting += [base for group, base in self._bases(path) if group not in choices]

    def _read_bases(self, path: str) -> list[tuple[str, str]]:
        """The configs that a config is built on, each with the group that it is chosen in, or an empty string."""
        entries = (yaml.safe_load(self._now(path) or "") or {}).get("defaults", [])
        folder = Path(path).relative_to("conf").parent
        found = []
        for entry in entries:
            if isinstance(entry, str):
                found.append(("", str(folder / entry)))
                continue
            for group, choice in entry.items():  # `/data@test.data.omniglot: omniglot`
                if choice and not group.startswith("override "):  # what is overridden is among the choices
                    group = str(folder / group.removeprefix("optional ")).removeprefix("/")
                    found.append((group, f"{group.partition('@')[0]}/{choice}"))
        return found

    def _now(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def _located(self, module: str) -> list[str]:
        """The file of a module, or of that which a dotted name is in, with the packages above it."""
        parts = module.split(".")
        if _within(module, UNRELATED) and not _within(module, BUILDING):
            return []
        found = []
        for length in range(2, len(parts) + 1):  # the top package has no code of a run
            base = Path(*parts[:length])
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if (self.root / path).is_file():
                    found.append(str(path))
        return found

    def _read_imports(self, path: str) -> list[str]:
        """Files that a module imports, at its top or later."""
        package = list(Path(path).parent.parts)
        names: set[str] = set()
        for node in ast.walk(ast.parse((self.root / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        return [file for name in names if name.startswith("metarun.") for file in self._located(name)]

    def _read_modules(self, path: str) -> list[str]:
        """Modules that a config names."""
        return re.findall(r"\bmetarun(?:\.\w+)+", self._now(path) or "")

    def _read_differences(self, commit: str) -> dict[str, tuple[str, str, str]]:
        """Files of the code that differ between a commit and HEAD: name now -> suffix, blob then, blob now."""
        lines = self.git("diff", "--raw", "--no-abbrev", "-M", commit, "HEAD", "--", "metarun", "conf").splitlines()
        found = {}
        for line in lines:
            facts, *names = line.split("\t")
            then, now = facts.split()[2:4]
            found[names[-1]] = (Path(names[-1]).suffix, then, now)
        return found

    def _differs(self, suffix: str, then: str, now: str) -> bool:
        if not int(then, 16) or not int(now, 16):  # a file that was added, or is gone
            return True
        return bool(self._meaning(suffix, then) != self._meaning(suffix, now))

    def _read_meaning(self, suffix: str, blob: str) -> Any:
        return meaning(suffix, self.git("cat-file", "blob", blob))


def _within(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def meaning(suffix: str, text: str) -> Any:
    """What a file of a suffix says to the machine: its syntax without comments and docstrings, or its YAML values."""
    if suffix == ".yaml":
        return yaml.safe_load(text)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
