"""The wheel, a bare clone, and the scripts that prepare a machine."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

import metarun
from metarun.renamed import CHOICES, GROUPS

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"pyproject.toml", "conf", "metarun", "tests", "scripts", "outputs", "README.md", "LICENSE"}
CHANGELOG = (ROOT / "metarun" / "CHANGELOG.md").read_text()
FIND = "from metarun.config.folder import CONF; print(CONF)"


def files(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"metarun-{metarun.__version__}.dist-info/{name}").decode()


def python(*words: str, inside: Path, code: Path) -> str:
    """What Python prints in the folder `inside` with the package in `code` before any other."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=inside, env=environment, check=True, capture_output=True, text=True).stdout


def test_wheel_holds_the_package_and_all_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {f"metarun/{name}" for name in files(ROOT / "conf", "*.yaml", "*.md")}
    assert "metarun/conf/hydra/launcher/slurm.yaml" in configs
    assert inside == configs | files(ROOT / "metarun", "*.py", "*.txt", "*.html", "*.yaml", "*.md", "py.typed")


def test_metadata(wheel: Path) -> None:
    about = Parser().parsestr(metadata(wheel, "METADATA"))
    assert about["Version"] == metarun.__version__
    assert about["Requires-Python"] == ">=3.11"
    assert about["License-Expression"] == "MIT"
    assert about.get_payload() == (ROOT / "README.md").read_text()
    assert "metarun = metarun.__main__:main" in metadata(wheel, "entry_points.txt")
    assert metadata(wheel, "licenses/LICENSE").startswith("MIT License")


def test_wheel_finds_its_configs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    code, empty = tmp_path / "code", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(code)
    assert python("-c", FIND, inside=empty, code=code).strip() == str(code / "metarun" / "conf")
    assert "_target_: metarun.algos.maml.MAML" in python(
        "-m", "metarun", "algo=maml", "--cfg", "job", inside=empty, code=code
    )
    assert not list(empty.iterdir())


def test_bare_clone_finds_its_configs(tmp_path: Path) -> None:
    for name in ("metarun", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert python("-c", FIND, inside=tmp_path, code=tmp_path).strip() == str(tmp_path / "conf")
    assert "Omniglot" in python("-m", "metarun", "data=omniglot", "--cfg", "job", inside=tmp_path, code=tmp_path)


def test_top_level() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)} == TOP_LEVEL
    assert (ROOT / "outputs" / ".gitkeep").is_file()


def test_type_checkers_of_others_find_the_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "metarun/py.typed" in archive.namelist()


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / ".github" / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.M)
    assert citation["version"] == metarun.__version__
    assert (metarun.__version__, citation["date-released"]) == released[0]


def test_changelog_has_the_sections_of_its_form() -> None:
    assert re.findall(r"^## (.*)$", CHANGELOG, re.M)[0] == "[Unreleased]"
    kinds = set(re.findall(r"^### (.*)$", CHANGELOG, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize(("old", "new"), [*GROUPS.items(), *CHOICES["recipe"].items()])
def test_changelog_names_every_word_that_was_renamed(old: str, new: str) -> None:
    assert re.search(rf"`[^`]*\b{new}\b[^`]*` was `[^`]*\b{old}\b[^`]*`", CHANGELOG)


def test_workflow_runs_the_test_command_on_every_python_that_the_package_names() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["linux"][-1] == "scripts/test.sh"
    assert set(commands) == {"linux", "macos", "windows"}
    assert commands["macos"][-1].startswith("scripts/test.sh ")  # Windows has no shell that could run it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert jobs["linux"]["strategy"]["matrix"]["python"] == named
    scripts = {word for lines in commands.values() for line in lines for word in line.split()}
    paths = [word for word in scripts if word.startswith(("scripts/", "tests/"))]
    assert {"scripts/demo.sh", "scripts/test.sh", "tests/test_style.py"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_what_the_workflow_runs_elsewhere_uses_nothing_that_is_not_there() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    lacking = {
        "macos": r"/dev/full",
        "windows": r"os\.kill\(|signal\.SIG(?!INT\b|TERM\b|_)\w+|/dev/\w+|\"bash\"|ForkServer\(",
    }
    for name, pattern in lacking.items():
        named = re.findall(r"\btests/\S+\.py", jobs[name]["steps"][-1]["run"])
        assert named
        assert {file: found for file in named if (found := re.findall(pattern, (ROOT / file).read_text()))} == {}


def test_data_of_the_workflow_lie_where_git_does_not_see_them_and_are_there_before_the_tests() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["linux"]
    folder = job["env"]["METARUN_DATA"].removeprefix("${{ github.workspace }}/")
    assert folder.split("/")[0] + "/" in (ROOT / ".gitignore").read_text().splitlines()
    assert [step["with"]["path"] for step in job["steps"] if "cache@" in step.get("uses", "")] == [folder]
    before = "".join(step.get("run", "") for step in job["steps"][:-1])
    assert "Omniglot()" in before
    assert "$METARUN_DATA/omniglot/splits/vinyals/" in before


def test_hooks_before_a_commit_are_the_checks_of_the_test_command() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    script = (ROOT / "scripts" / "test.sh").read_text()
    for hook in hooks:
        assert re.search(rf"^{hook['name']}\b", script, re.M)


@pytest.mark.parametrize("script", ["scripts/demo.sh", "scripts/test.sh", ".ci/run"])
def test_scripts_are_runnable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a fresh clone, in a folder with a space in its name, as the making of `.venv` looks at."""
    for name in ("pyproject.toml", "metarun/__init__.py", "scripts/constraints.txt", "scripts/venv.sh"):
        target = tmp_path / "a clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "a clone"


def enter(checkout: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """Sources venv.sh from another folder, with `python` as the interpreter to use."""
    command = ["bash", "-euo", "pipefail", "-c", 'source "$0" && echo entered "$PWD"', checkout / "scripts" / "venv.sh"]
    return subprocess.run(command, cwd="/", env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)


def fake_python(path: Path, *, old: bool) -> Path:
    """An interpreter that is too old, or that has no venv module."""
    answer = "exit 1" if old else 'echo "$0"'
    path.write_text(f'#!/bin/sh\ncase "$2" in *version_info*) {answer} ;; *) exit 1 ;; esac\n')
    path.chmod(0o755)
    return path


def test_no_new_enough_python_is_one_line(checkout: Path, tmp_path: Path) -> None:
    done = enter(checkout, fake_python(tmp_path / "python", old=True))
    assert done.returncode == 1
    assert done.stderr == (
        f"metarun: needs Python 3.11 or newer, and found none at {tmp_path}/python; install one, or set PYTHON=/path/to/python\n"
    )


def test_missing_venv_module_is_one_line(checkout: Path, tmp_path: Path) -> None:
    done = enter(checkout, fake_python(tmp_path / "a python", old=False))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt install python3-venv" in done.stderr


@pytest.mark.parametrize("held", ["bin", "env/bin", "notes", ""])
def test_environment_that_a_link_leads_to_is_not_emptied(held: str, checkout: Path, tmp_path: Path) -> None:
    if held:  # else it leads nowhere
        (tmp_path / "theirs" / held).mkdir(parents=True)
    (checkout / ".venv").symlink_to(tmp_path / "theirs")
    done = enter(checkout, Path(sys.executable))
    assert done.returncode == 1
    assert done.stderr == (
        f"metarun: .venv is a link to {tmp_path}/theirs, and making it anew would empty that; remove the link\n"
    )
    assert (tmp_path / "theirs" / held).is_dir() == bool(held)


def test_environment_is_used_again_until_its_recipe_changes(checkout: Path, tmp_path: Path) -> None:
    old = fake_python(tmp_path / "python", old=True)
    recipe = "cat pyproject.toml metarun/__init__.py scripts/constraints.txt | cksum"
    checksum = subprocess.run(["bash", "-c", recipe], cwd=checkout, check=True, capture_output=True, text=True).stdout
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to("/bin/true")
    (checkout / ".venv" / "made-from").write_text(f"{checkout} {checksum}")
    assert enter(checkout, old).stdout == f"entered {checkout}\n"
    (checkout / "scripts" / "constraints.txt").write_text("torch==2.0\n")
    assert enter(checkout, old).returncode == 1
