"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest

from metarun import config as schema
from metarun.config.folder import CONF
from metarun.ops import measures
from metarun.runs import contents, result

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
    skipping = {path.name: len(word.findall(path.read_text())) for path in Path(__file__).parent.rglob("*.py")}
    assert {name: count for name, count in skipping.items() if count} == {"test_slurm.py": 1}


# A module imports only from its own line and from those above it. A room that is not named module by module stands as a whole.
ORDER = """
metarun.errors
metarun.text metarun.terminal metarun.progress metarun.renamed metarun.optional metarun.lazy metarun.templates
metarun.system metarun.files
metarun.config
metarun.trust
metarun.ops
metarun.core
metarun.data
metarun.wrappers
metarun.runs.contents metarun.runs.result
metarun.runs.folder metarun.runs.provenance metarun.runs.logger metarun.runs.seen metarun.runs.trial
metarun.engine
metarun.backbones
metarun.encoders
metarun.target
metarun.export
metarun.inference
metarun.unsupervised
metarun.algos
metarun.report
metarun.runs.run metarun.runs.fingerprints
metarun.stages
metarun.runs.building metarun.runs.continuation metarun.runs.recording metarun.runs.carry_out
metarun.sweeps
metarun.plugins
metarun.inspection
metarun.shell
metarun.cli
metarun.api metarun
metarun.__main__
"""
LEVEL = {name: number for number, line in enumerate(ORDER.split("\n")) for name in line.split()}
# What imports upwards after all, and why.
UPWARDS = {
    (
        "metarun.config.building",
        "metarun.core",
    ): "task_of makes a TaskShape of a config, which is all that config knows of core",
    (
        "metarun.config.building",
        "metarun.ops.optimizers",
    ): "an optimiser that a config names leaves torch's compiler alone, as those do that methods name",
    ("metarun.sweeps.jobs", "metarun.cli"): "a job is a command line, so the process of a job enters by the door",
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a module, which several rules look at."""
    return ast.parse(path.read_text(encoding="utf-8"))


def level(module: str) -> int | None:
    """The line of ORDER that the module, or the room around it, stands on."""
    while module not in LEVEL:
        module = module.rpartition(".")[0]
        if module in ("", "metarun"):  # a module at the top has a place of its own, or none
            return None
    return LEVEL[module]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """The modules of metarun that a file imports, at its top or in a function, but not for annotations alone."""
    known = set(map(dotted, MODULES))
    tree = parsed(path)
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("metarun"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metarun"):
            for name in node.names:
                yield f"{node.module}.{name.name}" if f"{node.module}.{name.name}" in known else str(node.module)


def test_every_module_has_a_place_and_imports_only_what_lies_below() -> None:
    upwards = set()
    for path in MODULES:
        here = dotted(path)
        if path.name == "__init__.py" and not set(imported(path)):
            continue
        assert level(here) is not None, f"{here} stands on no line of ORDER"
        for there in imported(path):
            if there != "metarun" and level(there) > level(here):  # type: ignore[operator]
                upwards.add((here, there))
    assert upwards == set(UPWARDS)


def test_the_map_of_the_rooms_is_the_order_that_is_tested() -> None:
    text = (ROOT / "metarun" / "README.md").read_text()
    (table,) = re.findall(r"^\| room \|.*?\n((?:\|.*\n)+)", text, re.M)
    rows = [re.findall(r"`([\w./]+)`", line.split("|")[1]) for line in table.splitlines()[1:]]
    levels = [
        [level("metarun." + name.removesuffix(".py").rstrip("/").replace("/", ".")) for name in row] for row in rows
    ]
    assert all(None not in row for row in levels)
    flat = [number for row in levels for number in row]
    assert flat == sorted(flat)
    assert set(flat) >= set(LEVEL.values()) - {LEVEL["metarun.__main__"]}


@pytest.mark.parametrize(
    "room",
    sorted({path.parent for path in MODULES if path.parent.name not in ("metarun", "hydra_plugins")}),
    ids=dotted,
)
def test_every_room_says_what_lies_in_it(room: Path) -> None:
    assert (ast.get_docstring(parsed(room / "__init__.py")) or "").endswith(".")


def test_the_readme_of_a_room_names_its_files() -> None:
    """But for those of a method, a network or a data set, which a YAML names, and those of a stage, which the room's `__init__.py` does.

    In a room without a README the docstring of `__init__.py` names them.
    """
    choices = "".join(path.read_text() for path in YAMLS)
    missing = []
    for path in MODULES:
        page = path.with_name("README.md")
        if path.name == "__init__.py" or path.parent.name in ("metarun", "hydra_plugins"):
            continue
        if not page.is_file():
            page = path.with_name("__init__.py")
            if not re.search(rf"[`/]{path.name}`", ast.get_docstring(parsed(page)) or ""):
                missing.append(f"{path.relative_to(ROOT)} in {page.relative_to(ROOT)}")
            continue
        named = re.search(rf"[`/]{path.name}`", page.read_text()) or f"{dotted(path)}." in choices
        if not named and f"from {dotted(path)} " not in path.with_name("__init__.py").read_text():
            missing.append(f"{path.relative_to(ROOT)} in {page.relative_to(ROOT)}")
    assert missing == []


def test_every_module_begins_with_what_it_is() -> None:
    assert [str(path) for path in MODULES if not ast.get_docstring(parsed(path))] == []


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Those of the body of a module or of a class, and of the public classes in it."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef):
            yield node


def raises_user_error(function: ast.FunctionDef) -> bool:
    """Whether a function raises a `UserError` itself, and catches none."""
    raises, waiting = False, list[ast.AST](function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.ExceptHandler) and node.type and "UserError" in ast.unparse(node.type):
            return False
        raises = raises or (isinstance(node, ast.Raise) and ast.unparse(node).startswith("raise UserError("))
        waiting += ast.iter_child_nodes(node)
    return raises


def test_a_public_function_says_which_errors_it_raises() -> None:
    """Those that a user is meant to read. What an implementation of a contract leaves out, the contract says."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in MODULES
        for node in public_functions(parsed(path).body)
        if raises_user_error(node) and "UserError" not in (ast.get_docstring(node) or "UserError")
    ]
    assert silent == []


YAMLS = sorted(CONF.rglob("*.yaml"))


def command(path: Path) -> list[str]:
    """The words of the command in the comment that a YAML begins with."""
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    found = re.fullmatch(r"# .+[;:] metarun(?P<words>( .*)?)", first)
    assert found, f"{path}: begins with {first!r}, not with '# what it is; metarun a command'"
    return shlex.split(found["words"])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_yaml_begins_with_a_command_that_composes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_DATA", "/data")
    words = [word for word in command(path) if word not in ("-m", "--multirun", "--cfg", "job")]
    swept = re.compile(r"=(?:(?:choice|range|interval|tag|shuffle|glob|sort)\(.*|(?![\[{'\"]).*?,.*)$")
    first = [re.sub(r"=([\w./]+),.*", r"=\1", word) for word in words if not re.search(r"=\w+\(", word)]
    assert all(not swept.search(word) for word in first)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=first)
    if composed.recipe.run.endswith("carry_out.run"):
        schema.check(composed)


def test_keys_of_results_are_named_once() -> None:
    """Those with a slash, which no other word has: `runs/result.py` has the name of each, which nobody puts together again."""
    known = {value for value in vars(result).values() if isinstance(value, str) and "/" in value}
    assert {"test/acc", "target/curve", "val/score"} <= known
    others = [path for path in (*MODULES, *(ROOT / "scripts").rglob("*.py")) if path != Path(result.__file__)]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in others
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known
    ]
    assert found == []
    together = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in others
        for node in ast.walk(parsed(path))
        if put_together(node) in known | set(MEASURED)
    ]
    assert together == []


def test_measures_are_named_once() -> None:
    known = {value for name, value in vars(measures).items() if name.isupper() and isinstance(value, str)}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in (*MODULES, *(ROOT / "scripts").rglob("*.py"))
        for node in ast.walk(parsed(path))
        if path != Path(measures.__file__) and isinstance(node, ast.Constant) and node.value in known
    ]
    assert {"acc", "mse"} <= known
    assert found == []


def test_files_of_a_run_are_named_once() -> None:
    """Those with an ending, which no other word has; and the table of what is in a run's folder has each, but those of a stage apart."""
    known = {value for name, value in vars(contents).items() if name.isupper() and "." in value}
    assert {contents.RESULT, contents.SCORES} <= known
    # The second compares two trees, and imports the metarun of neither.
    naming = {Path(contents.__file__), ROOT / "scripts" / "same_numbers.py"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in (*MODULES, *(ROOT / "scripts").rglob("*.py"))
        for node in ast.walk(parsed(path))
        if path not in naming and isinstance(node, ast.Constant) and node.value in known
    ]
    assert found == []
    table = set(re.findall(r"`([\w.]+)`", (ROOT / "metarun" / "runs" / "README.md").read_text()))
    assert known - {contents.STAGE, contents.DEPENDS_ON} <= table


MEASURED = [f"/{name}" for name in (*result.MEASURES, result.EPISODES, result.AFTER_INNER_STEPS, result.CALIBRATION)]


def put_together(node: ast.AST) -> str:
    """The key that `key(KIND, "measure")` makes, and the text behind the kind in `f"{kind}/measure"`; empty of anything else."""
    match node:
        case ast.Call(
            func=ast.Name(id="key" | "key_of_result") | ast.Attribute(attr="key"), args=[kind, ast.Constant(value)]
        ):
            named = getattr(result, ast.unparse(kind).rpartition(".")[2], None)
            return f"{named}/{value}"
        case ast.JoinedStr(values=[ast.FormattedValue(), ast.Constant(str(text))]):
            return text
    return ""


def opens_text_in_the_systems_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text without an encoding: as UTF-8 on one system, in a code page of its own on Windows."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = {word.arg: word.value for word in call.keywords}
    if "encoding" in words:
        return False
    if name in ("read_text", "write_text"):
        return not (name == "read_text" and call.args and ast.unparse(call.args[0]).strip("'\"") == "utf-8")
    if name in ("run", "Popen", "check_output", "check_call"):
        return "text" in words or "universal_newlines" in words
    if name not in ("open", "fdopen") or ast.unparse(call.func) in ("Image.open", "os.open", "tarfile.open"):
        return False
    at = 1 if isinstance(call.func, ast.Name) or name == "fdopen" or ast.unparse(call.func) == "gzip.open" else 0
    default = ast.Constant("rb" if ast.unparse(call.func) == "gzip.open" else "r")
    mode = words.get("mode", call.args[at] if len(call.args) > at else default)
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value


def test_text_is_utf_8_on_every_system() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in (*MODULES, *(ROOT / "scripts").rglob("*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and opens_text_in_the_systems_encoding(node)
    ]
    assert found == []
    seen = "open(p)|p.read_text()|p.write_text(t)|p.open('a')|run(w, text=True)|open(p, mode='w')|os.fdopen(n, 'w')"
    fine = "open(p, 'rb')|p.open('rb')|p.read_text(encoding='utf-8')|run(w)|Image.open(p)|open(p, encoding='utf-8')"
    for text, expected in [(seen, True), (fine, False)]:
        for one in text.split("|"):
            call = ast.parse(one, mode="eval").body
            assert isinstance(call, ast.Call)
            assert opens_text_in_the_systems_encoding(call) is expected, one
