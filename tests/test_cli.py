"""The command line: help, completion, the config of every choice, and one line for everything a user can get wrong."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import choices
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, OmegaConf
from rights import kept_out
from shell import SINUSOID, environment, make_images, metarun, one_line, run_folder

from metarun import config as schema
from metarun.config.folder import CONF
from metarun.shell import one_composition
from metarun.shell.arguments import NEEDED

LOADED = """
import json, sys
import hydra.main, hydra._internal.hydra, hydra._internal.config_loader_impl
hydras = set(sys.modules)
from metarun.cli import main
try:
    main()
finally:
    print(json.dumps(sorted({*sys.modules} - hydras)), file=sys.stderr)
"""
SLOW = {"torch", "numpy", "scipy", "matplotlib", "rich", "PIL", "filelock", "asyncio", "subprocess", "multiprocessing"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (["--help"], ["algo: ", "protonet", "metarun -m ", "METARUN_DATA", "--cfg job"]),
        (["help", "algo=maml"], ["algo.inner_lr"]),
        (["--cfg", "job"], ["algo:\n  _target_: metarun.algos.protonet.ProtoNet", "max_seconds: null", "  shots: 1\n"]),
        (["--cfg", "job", "algo=maml", "data=sinusoid"], ["inner_steps: 1", "ways: 1"]),
    ],
)
def test_what_only_shows_something_imports_little(word: list[str], expected: list[str]) -> None:
    """It shall take a few tenths of a second, of which Hydra is the most."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *word], env=environment(), capture_output=True, text=True, check=True
    )
    assert all(text in done.stdout for text in expected), done.stdout
    loaded = json.loads(done.stderr)
    assert SLOW & {name.partition(".")[0] for name in loaded} == set()
    rooms = (
        "config|shell|system|system.launched|system.platform|ops|ops.measures|runs|runs.contents|runs.result|runs.trial|sweeps|sweeps.jobs|cli|errors|"
        "files|lazy|renamed|text"
    )
    own = {name for name in loaded if re.match(r"metarun\b", name)}
    assert {name for name in own if not re.fullmatch(rf"metarun(\.({rooms}|(config|shell)\..*))?", name)} == set()
    assert len(loaded) < 90, loaded


TELLING = """
import os, signal
from metarun import cli
tell = cli.one_line
cli.one_line = lambda error: (os.kill(os.getpid(), signal.SIGTERM), tell(error))[1]
cli.main()
"""


def test_signal_while_an_error_is_told_is_no_traceback() -> None:
    """As a launcher sends it when another rank has met the same error a little earlier."""
    done = subprocess.run(
        [sys.executable, "-c", TELLING, "train.stesp=6"], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (143, "metarun: interrupted by SIGTERM; the same command goes on\n")


INTERRUPTED = """
import os, signal, sys
from importlib.abc import MetaPathFinder
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background ignore it
from metarun.__main__ import main
class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
module = sys.argv.pop(1)
sys.meta_path.insert(0, CtrlC())
main()
"""


@pytest.mark.parametrize(
    ("module", "word", "status", "told"),
    [
        ("hydra", "--version", -signal.SIGINT, ""),
        ("metarun.config.help", "help", 130, "metarun: interrupted; the same command goes on\n"),
        ("metarun.config.help", "--help", 130, "metarun: interrupted; the same command goes on\n"),
    ],
)
def test_ctrl_c_while_modules_are_imported_is_no_traceback(module: str, word: str, status: int, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, word], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "", told)


GROUPS = ("algo", "backbone", "data", "hardware", "optimizer", "recipe", "schedule", "experiment")


def test_help_lists_every_choice() -> None:
    out = metarun("--help").out
    folders = {path.parent for group in GROUPS for path in (CONF / group).rglob("*.yaml")}
    assert CONF / "algo" / "learn2learn" in folders
    unwrapped = out.replace("\n  ", " ")
    for folder in folders:
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        assert f"\n{folder.relative_to(CONF).as_posix()}: {', '.join(names)}\n" in unwrapped
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.partition("\nGroups ")[0].splitlines()) < 24, "the commands fit the first screen"


def test_shell_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    done = metarun("-sc", "install=bash")
    assert done.status == 0
    assert done.out.rstrip().endswith("hydra_bash_completion metarun")
    for typed, expected in {"algo=proton": ["algo=protonet"], "train.st": ["train.steps="]}.items():
        monkeypatch.setenv("COMP_LINE", f"metarun {typed}")
        monkeypatch.setenv("COMP_POINT", str(len(f"metarun {typed}")))
        assert metarun("-sc", "query=bash").out.split() == expected


@pytest.mark.parametrize("word", ["install", "install=tcsh", "nothing=bash", "query=fish"])
def test_shell_completion_is_asked_for_in_known_words(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    told = "for the shell to ask; -sc install=fish" if word == "query=fish" else "takes one word, install=bash"
    one_line(metarun("-sc", word), told)


def test_a_single_run_composes_its_config_once_and_as_hydra_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = list[DictConfig]()
    impl = ConfigLoaderImpl._load_configuration_impl

    def kept(*arguments: Any, **options: Any) -> DictConfig:
        composed.append(impl(*arguments, **options))
        return composed[-1]

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", kept)
    words = ["recipe=runs", f"runs={tmp_path}", "hydra.verbose=false"]
    outcome = metarun(*words)
    assert len(composed) == 1
    monkeypatch.setattr(Hydra, "get_mode", Hydra.get_mode.__wrapped__)
    monkeypatch.setattr(one_composition, "install", lambda: None)
    assert metarun(*words) == outcome
    once, to_read_the_mode, to_run = [OmegaConf.to_container(config, resolve=False) for config in composed]
    assert once == to_run != to_read_the_mode


def test_a_mode_that_a_file_chooses_holds(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    swept = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    dry_run: true\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n# Two methods\n{swept}")
    for methods in ("maml,anil", "maml"):
        outcome = metarun("--config-dir", str(tmp_path), "experiment=mine", f"algo={methods}", f"outputs={tmp_path}")
        assert outcome.status == 0, outcome.err
        for method in methods.split(","):
            (line,) = (line for line in outcome.out.splitlines() if line.endswith(f"  {tmp_path}/mine/algo-{method}"))
            assert line.startswith("to run ")


def test_output_into_a_closed_pipe_is_no_error() -> None:
    command = f"'{sys.executable}' -m metarun --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) in [(141, ""), (0, "")]  # 0 where the help was in the pipe before it closed


def every_yaml() -> list[str]:
    return sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))


@pytest.mark.parametrize("name", every_yaml())
def test_yaml_says_what_it_is_and_how_it_runs(name: str) -> None:
    first = next(line for line in (CONF / name).read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ")
    about, _, command = first.rpartition("metarun")
    assert len(about) > len("# ; ")
    group, _, choice = name.removesuffix(".yaml").rpartition("/")
    if "/" in group and not group.startswith("hydra/"):  # in a folder of a group
        group, _, choice = name.removesuffix(".yaml").partition("/")
    if group and group != "preset":
        assert f"{group}={choice}" in command


GIVEN = {  # what a data set or backbone needs besides its name
    "domains": ["+data@data.sets.glyphs=glyphs"],
    "folder": ["data.root=anywhere"],
    "text": ["data.root=anywhere"],
    "learn2learn": ["data.dataset=MiniImagenet"],
    "torchvision": ["data.dataset=MNIST"],
    "pretrained": ["backbone.name=torchvision:resnet18"],
}


def check(*overrides: str) -> None:
    schema.check(compose("config", overrides=list(overrides)))


@pytest.fixture(scope="module")
def composer():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def speaks_of_the_backbone(preset: str) -> bool:
    """Whether a preset, or one that it goes on from, has the word anywhere."""
    text = (CONF / "preset" / f"{preset}.yaml").read_text()
    return "backbone" in text or any(map(speaks_of_the_backbone, re.findall(r"^  - /preset/(\S+)$", text, re.M)))


def asked_of_the_backbone(algo: str) -> str:
    """What a method's file sets of the backbone, the same for all methods that set the same."""
    file = OmegaConf.load(CONF / "algo" / f"{algo}.yaml")
    assert all(str(next(iter(default))).startswith("override ") for default in file.get("defaults", []))
    return str(file.get("backbone"))


@functools.cache
def compositions() -> dict[str, set[tuple[str, str]]]:
    """The pairs of data set and backbone that each method is composed with, so that what can meet does so once.

    A method meets a backbone in the keys that its file sets of it: methods that set the same keys to the same values, or none, take
    turns with the backbones. A data set that sets more than keys of `data` meets every method; the others, of which neither a method
    nor a backbone has a key, take turns, and meet a backbone that looks at the data. All three go together where a preset of two
    speaks of the third, by its name or by keys of `usual`, which some backbones read.
    """
    presets, data_sets, backbones = choices("preset"), choices("data"), choices("backbone")
    of_tasks = [data for data in data_sets if "# @package _global_" in (CONF / "data" / f"{data}.yaml").read_text()]
    others = itertools.cycle(data for data in data_sets if data not in of_tasks)
    reading = {name: re.findall(r"\$\{(\w+)", (CONF / "backbone" / f"{name}.yaml").read_text()) for name in backbones}
    of_usual, of_pixels = (
        [name for name in backbones if key in reading[name]] for key in ("usual", "pixels_normalized")
    )
    assert set().union(*reading.values()) == {"usual", "pixels_normalized"}  # the latter looks at any data
    alike: dict[str, list[str]] = {}
    for algo in choices("algo"):
        alike.setdefault(asked_of_the_backbone(algo), []).append(algo)
    found: dict[str, set[tuple[str, str]]] = {}
    for methods in alike.values():
        turns = itertools.cycle(backbones)
        for algo in methods:
            found[algo] = {(data, next(turns)) for data in of_tasks} | {(next(others), next(turns))}
        for backbone in backbones[len(methods) * (len(of_tasks) + 1) :]:
            found[methods[0]].add((next(others), backbone))
    for data, backbone, algo in zip(data_sets, itertools.cycle(of_pixels), found, strict=False):
        found[algo].add((data, backbone))
    for turn, algo in enumerate(found):
        for data in data_sets:
            if f"{algo}_{data}" in presets:
                spoken = speaks_of_the_backbone(f"{algo}_{data}")
                found[algo] |= {
                    (data, name) for name in (backbones if spoken else [*of_usual, backbones[turn % len(backbones)]])
                }
    return found


@pytest.mark.usefixtures("composer")
@pytest.mark.parametrize("algo", choices("algo"))
def test_every_composition_is_sound(algo: str) -> None:
    for data, backbone in sorted(compositions()[algo]):
        check(f"algo={algo}", f"data={data}", f"backbone={backbone}", *GIVEN.get(data, []), *GIVEN.get(backbone, []))


@pytest.mark.usefixtures("composer")
@pytest.mark.parametrize(
    "choice",
    [f"{group}={name}" for group in ("experiment", "hardware", "optimizer", "schedule", "recipe", "transfer", "target")
     for name in choices(group)],
)  # fmt: skip
def test_every_other_choice_is_sound(choice: str) -> None:
    if choice.startswith("schedule="):
        check(choice, "algo=maml")
    needed = {"experiment=skin": ["target.data.root=."]}.get(choice, [])  # a folder of the user's own
    if choice.startswith("target="):
        needed = [f"target.{word}" for word in GIVEN.get(choice.removeprefix("target="), [])]
    check(choice, *needed)


def unknown_key(known: str) -> str:
    return f"there is no such key; did you mean {known}"


MISTAKES: list[tuple[str, list[str]]] = [
    # groups
    ("algo=mmal", ["algo=mmal: there is no such choice; did you mean maml"]),
    ("algo=learn2learn/mmal", ["algo=learn2learn/mmal: there is no such choice; did you mean learn2learn/maml"]),
    ("algo=learn2learn", ["algo=learn2learn: there is no such choice; did you mean learn2learn/"]),
    ("algo=learn2lern/maml", ["algo=learn2lern/maml: there is no such choice; did you mean learn2learn/maml"]),
    ("hardware=tpu", ["hardware=tpu: there is no such choice; did you mean cpu?"]),
    ("recipe=zzz", ["recipe=zzz: there is no such choice; there are "]),
    ("experiment=zzz", ["experiment=zzz: there is no such choice; there are ", " more (metarun help experiment)"]),
    ("dta=omniglot", ["dta: " + unknown_key("data?")]),
    *((f"{group}=null", [f"{group}=null: a run has one; leave the word out"]) for group in NEEDED),
    ("around=ats", ["around: is called wrapper now"]),
    ("wrapper=atz", ["wrapper=atz: there is no such choice; did you mean ats"]),
    ("around.chosen=3", ["around: is called wrapper now"]),
    ("+around.chosen=3", ["around: is called wrapper now"]),
    ("finetune=all", ["finetune: is called transfer now"]),
    ("finetune.steps=3", ["finetune: is called transfer now"]),
    ("recipe=adapt", ["recipe=adapt: is called recipe=domain_adaptation now"]),
    ("recipe=finetune", ["recipe=finetune: is called recipe=target_only now"]),
    ("algo@other=maml", ["algo@other", "did you mean algo?"]),
    ("data=3", ["data=3: was given no name of a choice; ~data leaves the group out"]),
    ("debug=true", ["debug=true: was given no name of a choice"]),
    ("preset=maml_sinusiod", ["preset=maml_sinusiod: there is no such choice; did you mean maml_sinusoid"]),
    ("preset=papr", ["preset=papr: there is no such choice; did you mean paper"]),
    ("preset=nothing", ["preset=nothing: there is no such choice; there are "]),
    ("algo=maml,reptile", ["algo=maml,reptile", "-m"]),
    ("algo=[maml,reptile]", ["-m algo=a,b"]),
    ("algo=MAML", ["algo=MAML: there is no such choice; did you mean maml?"]),
    ("algo=maml.yaml", ["algo=maml.yaml: a choice is named without the ending of its file; write algo=maml"]),
    ("data=omniglot.yml", ["write data=omniglot"]),
    ("data=Omniglot", ["data=Omniglot: there is no such choice; did you mean omniglot?"]),
    ("data=miniImageNet", ["data=miniImageNet: there is no such choice; did you mean mini_imagenet?"]),
    ("data=cifar10", ["data=cifar10: there is no such choice; data=torchvision data.dataset=CIFAR10 is that of a library"]),
    ("data=fashion_mnist", ["there is no such choice; data=torchvision data.dataset=FashionMNIST is that of a library"]),
    ("hardware=gpu", ["hardware=gpu: there is no such choice; did you mean cuda?"]),
    ("hardware.device=gpu", ["hardware.device=gpu: is not one of auto, cpu, cuda, mps; did you mean cuda?"]),
    # keys
    ("train.optimizer.warmth=1", ["train.optimizer.warmth: there is no such key; train.optimizer has lr"]),
    ("way=3", ["way: there is no such key; did you mean task.ways, "]),
    ("query=3", ["query: there is no such key; did you mean task.queries, "]),
    ("steps=3", ["steps: there is no such key; did you mean train.steps, "]),
    ("epochs=3", ["epochs: there is no such key; did you mean train.steps?"]),
    ("train.epochs=3", ["train.epochs: there is no such key; did you mean train.steps?"]),
    ("task.n_way=3", ["task.n_way: there is no such key; did you mean task.ways?"]),
    ("optimizer.lr=3", ["optimizer.lr: there is no such key; did you mean train.optimizer.lr?"]),
    ("schedule=cosine schedule.warmup=5", ["schedule.warmup: there is no such key; did you mean train.schedule.warmup?"]),
    ("approach.algo=maml", ["approach.algo: there is no such key; approach=NAME chooses one, and has no keys below"]),
    ("preset.seed=1", ["preset.seed: there is no such key; preset=NAME chooses one, and has no keys below"]),
    ("train.time=60", ["train.time: there is no such key; did you mean train.max_seconds?"]),
    ("-m hydra/launcher=slurm hydra.launcher.time=60", ["hydra.launcher.time: there is no such key; did you mean hydra.launcher.minutes?"]),
    ("-m hydra/launcher=slurm hydra.launcher.nodes=2", ["hydra.launcher.nodes: there is no such key; hydra.launcher has partition, "]),
    ("trian.steps=3", ["trian: " + unknown_key("train, transfer, pretrain?")]),
    ("train.step=3", ["train.step: " + unknown_key("train.steps?")]),
    ("+train.step=3", ["train.step: " + unknown_key("train.steps?")]),
    ("stepz=3", ["stepz: " + unknown_key("train.steps, ")]),
    ("lr=0.1", ["lr: " + unknown_key("train.optimizer.lr?")]),
    ("train.optimizer.learning_rate=1", ["train.optimizer.learning_rate: " + unknown_key("train.optimizer.lr?")]),
    ("inner_lr=0.1", ["inner_lr: " + unknown_key("algo.inner_lr?")]),
    ("algo.inner_lr=0.1", ["algo.inner_lr: there is no such key; it is a key of algo=anil, ", " more (metarun help algo.inner_lr)"]),
    ("train.schedule.T_max=3", ["train.schedule.T_max: there is no such key; it is a key of ", "schedule=cosine"]),
    ("train.lr=1", ["train.lr: " + unknown_key("train.optimizer.lr?")]),
    ("algo=maml algo.inner_stepz=2", ["algo.inner_stepz: " + unknown_key("algo.inner_steps")]),
    ("algo=maml +algo.inner_stepz=2", ["algo.inner_stepz: MAML has no such setting; did you mean algo.inner_steps"]),
    ("+algo.depth=2", ["algo.depth: ProtoNet has no such setting"]),
    ("backbone.depth=2", ["backbone.depth: there is no such key; backbone has from, channels, downsample"]),
    ("+anything=1", ["anything: there is no such key"]),
    ("~data.rotation", ["data.rotation"]),
    # types and ranges
    ("train.steps=abc", ["train.steps=abc: is no whole number"]),
    ("train.steps=1.5", ["train.steps=1.5: is no whole number"]),
    ("train.steps=1e3", ["train.steps=1000.0: is no whole number; write 1000"]),
    ("train.max_seconds=2min", ["train.max_seconds=2min: is no number"]),
    ("train.steps=null", ["train.steps=null: must have a value; leave the word out for the usual one"]),
    ("target.data=[1]", ["target.data: has settings of its own, and is no single value; target=NAME chooses one"]),
    ("pretrain.algo=maml", ["pretrain.algo: has settings of its own, and is no single value; metarun help pretrain.algo lists them"]),
    ("test=null", ["test: has settings of its own, and is no single value"]),
    ("train.schedule=null", ["train.schedule: has settings of its own, and is no single value; schedule=NAME chooses one"]),
    ("train.schedule=[1]", ["train.schedule: has settings of its own, and is no single value; schedule=NAME chooses one"]),
    ("train.schedule={a:1}", ["train.schedule.a: there is no such key"]),
    ("train.schedule._target_=torch.load", ["train.schedule._target_=torch.load: "]),
    ("recipe=continual continual.rates=0.1", ["continual.rates: must be a list; write [a,b], or [a] for one value"]),
    ("train.optimizer.lr={a:1}", ["train.optimizer.lr={a: 1}: must be of type float"]),
    ("train.optimizer.betas=[0.9,0.99]", ["train.optimizer.betas: there is no such key", "; +train.optimizer.betas=... gives it"]),
    ("schedule=cosine train.schedule.eta_min=1", ["train.schedule.eta_min: ", "; +train.schedule.eta_min=... gives it"]),
    ("schedule=step train.schedule.gamma=-1", ["train.schedule.gamma=-1: must be at least 0"]),
    ("schedule=cosine train.schedule.T_max=-5", ["train.schedule.T_max=-5: must be at least 0"]),
    ("backbone.from=", ["backbone.from=: is empty, and must name a file or a folder or be null"]),
    ("checkpoint=", ["checkpoint=: is empty, and must name a file or a folder or be null"]),
    ("preset=[maml_sinusiod]", ["preset=maml_sinusiod: there is no such choice; did you mean maml_sinusoid"]),
    ("test.data=[null]", ["test.data=[null]: null is no name; data sets are written [omniglot,cifar_fs]"]),
    ("-m hydra/launcher=slrm", ["metarun: hydra/launcher=slrm: there is no such choice; did you mean slurm?"]),
    ("-m seed=0 hydra.launcher=null", ["hydra.launcher=null: a sweep has one"]),
    ("train.steps=???", ["train.steps: must be given"]),
    ("train.steps=${nowhere}", ["train.steps: ${nowhere} stands for the value of a key nowhere, and there is none"]),
    ("train=5", ["train: has settings of its own, and is no single value; metarun help train lists them"]),
    ("train.optimizer=sgd", ["train.optimizer: has settings of its own, and is no single value; optimizer=NAME chooses one"]),
    ("resume=maybe", ["resume=maybe: is no truth value (true, false)"]),
    ("train.optimizer.lr=abc", ["train.optimizer.lr=abc: must be of type float"]),
    ("train.optimizer.lr=-1", ["train.optimizer: ", "-1"]),
    ("algo=maml algo.inner_lr=null", ["algo.inner_lr=null: must be of type float"]),
    ("algo=maml algo.first_order=perhaps", ["algo.first_order=perhaps: must be of type bool"]),
    ("train.steps=-1", ["train.steps=-1: must be at least 0"]),
    ("test.episodes=1", ["test.episodes=1: must be from 2 to 10000000"]),
    ("algo=maml algo.inner_steps=-1", ["algo.inner_steps=-1: must be at least 0"]),
    ("algo=reptile algo.inner_batch=0", ["algo.inner_batch=0: must be at least 1"]),
    ("hardware.device=gpu", ["hardware.device=gpu: is not one of auto, cpu, cuda, mps; did you mean c"]),
    ("hardware.autocast=float16", ["hardware.autocast=float16: is not one of bfloat16; did you mean bfloat16?"]),
    ("backbone.norm=btch", ["backbone.norm=btch: ", "did you mean batch?"]),
    ("backbone.channels=0", ["backbone.channels=0: must be at least 1"]),
    ("data.split_seed=x", ["data.split_seed=x: must be of type int"]),
    ("name=a/b", ["name=a/b: "]),
    ("recipe.stages=[metarun.stages.trian]", ["recipe.stages: metarun.stages.trian cannot be imported"]),
    # the grammar of overrides
    ("train.steps", ["train.steps: cannot be read as key=value"]),
    ("train.steps=[1,2", ["train.steps=[1,2: cannot be read as key=value"]),
    ("train..steps=3", ["train..steps=3: cannot be read as key=value"]),
    ("=3", ["=3: cannot be read as key=value or group=choice"]),
    ("algo = maml", ["=: cannot be read as key=value or group=choice; no space stands beside ="]),
    ("algo maml", ["algo: cannot be read as key=value or group=choice; a choice of this group is written algo=NAME"]),
    ("algo:maml", ["algo:maml: cannot be read as key=value or group=choice; did you mean algo=maml?"]),
    ("train.steps:5", ["train.steps:5: cannot be read as key=value or group=choice; did you mean train.steps=5?"]),
    ("--algo=maml", ["unrecognized arguments: --algo=maml", "; did you mean algo=maml?"]),
    ("report", ["report: cannot be read as key=value or group=choice; did you mean recipe=report?"]),
    ("maml", ["did you mean algo=maml or approach=maml?"]),
    ("[a,b", ["brackets and commas may need quotes"]),
    ("nothing", ["nothing: cannot be read as key=value or group=choice; metarun --help shows how a command is written"]),
    # what a recipe would pass over
    ("support=x", ["this recipe has no use for it; it is for recipe=export and recipe=predict"]),
    ("unknown=auto", ["unknown=auto: this recipe has no use for it; it is for recipe=predict"]),
    ("recipe=test checkpoint=x images=x", ["this recipe has no use for it"]),
    ("target.train_images=200", ["target.train_images=200: there is no target; add recipe=transfer target="]),
    ("continual.classes=10", ["continual.classes=10: this recipe has no use for it; it is for recipe=continual"]),
    ("runs=x", ["this recipe has no use for it; metarun help runs says what has"]),
    # what does not fit together
    ("task.ways=5", ["task: ways = 5 is above the 4 classes of the train split: of 12 classes 4 for training", "take task.ways=4"]),
    ("test.task.ways=5", ["task: ways = 5 is above the 4 classes of the val split", "recipe=target_only"]),
    ("algo=protonet test.task.ways=5", ["ways = 5 is above the 4 classes of the val split", "take task.ways=4"]),
    ("task.shots=5", ["shots + queries = 5 + 2 = 7 is above the 6 images of the smallest class", "lower train.task.shots"]),
    ("test.task.queries=6", ["1 + 6 = 7 is above the 6 images", "val split"]),
    ("train.task.queries=0", ["train.task.queries=0"]),
    ("data=folder", ["data.root: must be given (data.root=...)"]),
    ("data=sinusoid", ["backbone: conv4 needs images"]),
    ("algo=protonet data=sinusoid backbone=mlp", ["algo: ProtoNet only classifies", "algo=maml"]),
    ("algo=maml data=sinusoid backbone=mlp task.ways=5", ["task.ways=1"]),
    ("data.image_size=8", ["16×16", "8×8"]),
    ("recipe=test", ["recipe=test: needs the run to test; add checkpoint="]),
    ("outputs=", ["outputs=: is empty, and must name a file or a folder"]),
    ("data=folder data.root=", ["data.root=: is empty, and must name a file or a folder"]),
    ("--config-dir nowhere", ["--config-dir nowhere: there is no such folder"]),
    ("recipe=test checkpoint=nowhere", ["checkpoint=nowhere: there is no such run"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def refused(outputs: Path, words: list[str], expected: list[str]) -> None:
    """`metarun words...` says what is expected in one line, exit status 2, and leaves nothing behind."""
    done = metarun(f"outputs={outputs}", *words)
    assert (done.status, done.out) == (2, ""), done
    assert len(done.said) == 1, done.err
    assert done.said[0].startswith("metarun: ")
    assert all(text in done.said[0] for text in expected), done.said[0]
    assert not outputs.exists()


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistake_is_one_line(words: str, expected: list[str], images: Path, tmp_path: Path) -> None:
    small = ["task.ways=4", "task.queries=2", "backbone.channels=4", "data.image_size=16"]
    given = words.split()
    if not any(word.startswith(("data=", "~data")) for word in given):
        given = ["data=folder", f"data.root={images}", *small, *given]
    refused(tmp_path / "outputs", given, expected)


YAML_MISTAKES: dict[str, tuple[str, list[str]]] = {
    "typo in train": ("train:\n  stepz: 3", ["experiment/mine: train.stepz: " + unknown_key("train.steps")]),
    "typo below train": ("train:\n  task:\n    wayz: 3", ["train.task.wayz: " + unknown_key("train.task.ways")]),
    "typo in algo": (
        "defaults:\n  - override /algo: maml\nalgo:\n  inner_stepz: 3",
        ["algo.inner_stepz: MAML has no such setting; did you mean algo.inner_steps"],
    ),
    "typo in data": ("data:\n  image_sise: 3", ["data.image_sise: Glyphs has no such setting; did you mean data.image_size"]),
    "unknown root": ("trian:\n  steps: 3", ["experiment/mine: trian: " + unknown_key("train, transfer, pretrain?")]),
    "wrong type": ("train:\n  steps: many", ["experiment/mine: train.steps=many: is no whole number"]),
    "value for a node": ("train: 5", ["experiment/mine: ", "5"]),
    "a renamed group": ("defaults:\n  - override /around: ats", ["around: is called wrapper now"]),
    "a renamed key": ("around:\n  chosen: 2", ["around: is called wrapper now"]),
    "a renamed recipe": (
        "defaults:\n  - override /recipe: adapt",
        ["recipe=adapt: is called recipe=domain_adaptation now"],
    ),
    "a list": ("- train", ["experiment/mine: "]),
    "unknown choice": ("defaults:\n  - override /algo: mmal", ["algo=mmal: there is no such choice; did you mean maml"]),
    "unknown group": ("defaults:\n  - override /algoo: maml", ["experiment/mine: algoo: ", "did you mean algo?"]),
    "no YAML": ("train: [1", ["mine.yaml, line 3: "]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", YAML_MISTAKES)
def test_mistake_in_a_users_yaml_is_one_line(mistake: str, tmp_path: Path) -> None:
    text, expected = YAML_MISTAKES[mistake]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    refused(tmp_path / "outputs", ["--config-dir", str(tmp_path), "experiment=mine"], expected)


@pytest.mark.parametrize(
    ("group", "package"),
    [
        ("experiment", "_global_"),
        ("preset", "_global_"),
        ("approach", "_global_"),
        ("optimizer", "train.optimizer"),
        ("schedule", "train.schedule"),
    ],
)
def test_users_yaml_without_its_package_line(group: str, package: str, tmp_path: Path) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text("train:\n  steps: 3\n")
    words = ["--config-dir", str(tmp_path), f"{group}=mine"]
    refused(tmp_path / "outputs", words, [f"{group}/mine: ", f"'# @package {package}'"])


def test_a_group_that_the_config_has_no_choice_of_says_how_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "mood").mkdir()
    (tmp_path / "mood" / "good.yaml").write_text("# @package _global_\nseed: 3\n")
    own = ["--config-dir", str(tmp_path)]
    refused(tmp_path / "outputs", [*own, "mood=good"], ["mood: is a group of your own", "+mood=NAME"])
    refused(tmp_path / "outputs", ["algo/learn2learn=maml"], ["write algo=learn2learn/NAME"])
    refused(
        tmp_path / "outputs",
        ["algo@pretrain=maml"],
        ["this recipe has none; - /algo@pretrain: NAME, among the defaults"],
    )
    stage = "{_target_:metarun.stages.Train,algo:pretrain.algo,train:pretrain.train}"
    words = [*SINUSOID[:3], "+algo@pretrain=maml", f"recipe.stages=[{stage}]"]
    refused(
        tmp_path / "outputs",
        words,
        ["pretrain.train.optimizer: has no _target_", "- /optimizer@pretrain.train.optimizer: NAME"],
    )
    refused(tmp_path / "outputs", ["algo@nowhere=maml"], ["algo@nowhere: there is no such group"])


@pytest.mark.parametrize(
    ("target", "reason"),
    [("nowhere.Mine", "No module named 'nowhere'"), ("metarun.algos.maml.Maml", "Maml"), ("broken.Mine", "broken.py")],
)
def test_target_that_cannot_be_imported(
    target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("class Mine(:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "outputs", [f"algo._target_={target}"], [f"algo._target_={target}: cannot be imported", reason])


def break_file(root: Path, name: str, content: bytes | None) -> Path:
    """`root` with one file of `train/train1` replaced: by `content`, or by its own first half."""
    file = root / "train" / "train1" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    return file


@pytest.mark.parametrize("content", [None, b"no image at all"], ids=["truncated", "text"])
def test_bad_image_is_named_and_may_be_skipped(content: bytes | None, images: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(images, root)
    file = break_file(root, "3.png", content)
    words = ["data=folder", f"data.root={root}", "data.image_size=16", "backbone.channels=2", "train.steps=1", "task.ways=3",
             "task.queries=2", "test.episodes=2", "train.validate_episodes=2", "test.baseline_episodes=0"]  # fmt: skip
    refused(tmp_path / "outputs", words, [f"{file} is not a whole image", "data.skip_bad=true"])
    done = metarun(*words, "data.skip_bad=true", f"outputs={tmp_path / 'outputs'}")
    assert done.status == 0, done.err


def test_paths_need_no_quotes_of_hydras(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that are typed, nor those of run folders, which are to be copied and pasted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(images, tmp_path / "it's a=b,c~2 (x)")
    (tmp_path / "o=1").mkdir()
    words = ["data=folder", "data.root=~/it's a=b,c~2 (x)", "data.image_size=16", "backbone.channels=2", "train.steps=1",
             "task.ways=3", "task.queries=2", "test.episodes=2", "train.validate_episodes=2", "test.baseline_episodes=0"]  # fmt: skip
    for _ in range(2):
        done = metarun(*words, f"outputs={tmp_path / 'o=1'}")
        assert done.status == 0, done.err
    assert "finished before" in done.out
    folder = run_folder(tmp_path / "o=1")
    done = metarun("recipe=test", f"checkpoint={folder}", "test.episodes=3", f"outputs={tmp_path / 'o=1'}")
    assert done.status == 0, done.err
    refused(
        tmp_path / "outputs",
        ["recipe=test", f"checkpoint={folder}__3"],
        [f"checkpoint={folder}__3: there is no such run"],
    )


def empty(tmp_path: Path) -> list[str]:
    (tmp_path / "root").mkdir()
    return ["data=folder", f"data.root={tmp_path / 'root'}"]


def empty_class(tmp_path: Path) -> list[str]:
    make_images(tmp_path / "root", classes=2)
    (tmp_path / "root" / "val" / "nothing").mkdir()
    return ["data=folder", f"data.root={tmp_path / 'root'}"]


def misspelt(tmp_path: Path) -> list[str]:
    (tmp_path / "pictures").mkdir()
    return ["data=folder", f"data.root={tmp_path / 'pictuers'}"]


def short_archive(tmp_path: Path) -> list[str]:
    (tmp_path / "root").mkdir()
    with zipfile.ZipFile(tmp_path / "root" / "images_background.zip", "w") as archive:
        archive.writestr("images_background/Futurama/character01/0001_01.png", b"")
    return ["data=omniglot", f"data.root={tmp_path / 'root'}"]


def broken_archive(tmp_path: Path) -> list[str]:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images_background.zip").write_bytes(b"PK\3\4 and then nothing")
    return ["data=omniglot", f"data.root={tmp_path / 'root'}"]


def no_archive(tmp_path: Path) -> list[str]:
    return ["data=omniglot", f"data.root={tmp_path / 'root'}", "data.download=false"]


def unwritable_outputs(tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return [*SINUSOID, f"outputs={tmp_path / 'file' / 'below'}"]


def dangling_outputs(tmp_path: Path) -> list[str]:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return [*SINUSOID, f"outputs={tmp_path / 'link'}"]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (empty, ["data.root: folder ", "/root is empty"]),
        (empty_class, ["/root/val/nothing is empty"]),
        (misspelt, ["there is no file or folder ", "did you mean pictures?"]),
        (short_archive, ["images_background.zip: 963 of 964 characters are missing: "]),
        (broken_archive, ["images_background.zip is not a whole zip archive"]),
        (no_archive, ["images_background", "download"]),
        (unwritable_outputs, ["file/below/", "cannot be written, for ", "file is no folder; choose another outputs="]),
        (dangling_outputs, ["link/", "cannot be written, for ", "link is no folder; choose another outputs="]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_folder_is_one_line(prepare: Callable[[Path], list[str]], expected: list[str], tmp_path: Path) -> None:
    words = prepare(tmp_path)
    outputs = next((word for word in words if word.startswith("outputs=")), f"outputs={tmp_path / 'outputs'}")
    done = metarun(*[word for word in words if word != outputs], outputs)
    assert (done.status, done.out, len(done.said)) == (2, "", 1), done
    assert all(text in done.said[0] for text in expected), done.said
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("outputs", ["locked/outputs", "locked", "file/below"])
def test_a_folder_that_cannot_be_written_is_told_before_the_data_are_read(
    outputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o555)
    monkeypatch.setattr("metarun.runs.carry_out.prepare_for_processes", functools.partial(pytest.fail, "read the data"))
    with kept_out():
        done = metarun(*SINUSOID, f"outputs={tmp_path / outputs}")
    one_line(
        done,
        "no folder; choose another outputs="
        if "file" in outputs
        else f"{tmp_path}/locked: nothing can be written there by",
    )


@pytest.mark.parametrize("variable", ["METARUN_DATA", "METARUN_CACHE"])
def test_root_that_cannot_be_written(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    # Were the folder not refused first, the download would fail here.
    monkeypatch.setattr("urllib.request.urlopen", functools.partial(pytest.fail, "tried to download"))
    refused(tmp_path / "outputs", ["data=omniglot"], [str(tmp_path / "file" / "below"), variable])


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_TRACEBACK", "1")
    with pytest.raises(BaseException, match="train\\.step: there is no such key") as caught:
        metarun("+train.step=3")
    assert isinstance(caught.value.__cause__, schema.UserError)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("recipe=report runs=. train.steps=5", "train.steps=5: this recipe has no use for it; it reads runs and outputs alone"),
        ("runs . seed=1", "seed=1: this recipe has no use for it; it reads runs and outputs alone"),
        ("recipe=predict checkpoint=x images=x train.steps=5", "train.steps=5: this recipe has no use for it; what checkpoint= names"),
        ("recipe=predict checkpoint=x images=x task.ways=3", "task.ways=3: this recipe has no use for it; what checkpoint= names"),
        ("recipe=export checkpoint=x algo=maml", "algo=maml: this recipe has no use for it; what checkpoint= names is used as it"),
        ("recipe=export checkpoint=x task.ways=3", "checkpoint=x: there is no such run"),
        ("recipe=export checkpoint=x algo.inner_lr=1", "algo.inner_lr: there is no such key; the checkpoint brings its own method"),
        ("recipe=test checkpoint=x algo.inner_lr=1", "algo.inner_lr: there is no such key; to override a setting of the checkpoint"),
        ("recipe=test checkpoint=x train.steps=5", "train.steps=5: this recipe has no use for it; it takes the weights of"),
        ("recipe=test checkpoint=x schedule=cosine", "schedule=cosine: this recipe has no use for it; it takes the weights"),
        # The temperature of a test is fitted on so many validation episodes.
        ("recipe=test checkpoint=x train.validate_episodes=5", "checkpoint=x: there is no such run"),
        ("recipe=test_continual checkpoint=x train.validate_episodes=5", "train.validate_episodes=5: this recipe has no use for it"),
        ("recipe=test checkpoint=x preset=paper", "checkpoint=x: there is no such run"),
        ("-m recipe=test checkpoint=x preset=paper seed=0,1", "checkpoint=x: there is no such run"),
        ("recipe=predict checkpoint=x images=x preset=paper", "preset=paper: this recipe has no use for it; what checkpoint= names"),
        ("recipe=predict checkpoint=x images=x debug=fast", "debug=fast: this recipe has no use for it; what checkpoint= names"),
        ("recipe=export checkpoint=x approach=maml", "approach=maml: this recipe has no use for it; what checkpoint= names"),
        ("recipe=report runs=. experiment=omniglot_short/maml", "experiment=omniglot_short/maml: this recipe has no use for it; it reads"),
        ("runs . debug=fast", "debug=fast: this recipe has no use for it; it reads runs and outputs alone"),
        ("recipe=target_only target=digits train.steps=5", "train.steps=5: this recipe has no use for it; it trains on no source; how the"),
        ("recipe=target_only target=digits algo=maml", "algo=maml: this recipe has no use for it; it uses the target alone"),
        ("recipe=target_only target=digits transfer=own train.steps=5", "train.steps=5: this recipe has no use for it; it trains on no"),
        ("recipe=target_only target=digits data=omniglot", "data=omniglot: this recipe has no use for it; it uses the target alone"),
        ("pretrain.train.steps=5", "pretrain.train.steps=5: this recipe has no use for it; none of its stages pretrains; recipe="),
        ("recipe=transfer target=digits pretrain.train.steps=5", "pretrain.train.steps=5: this recipe has no use for it; none of its"),
        ("-m recipe=meta,train pretrain.train.steps=5", "pretrain.train.steps=5: this recipe has no use for it; none of its stages"),
        ("checkpoint=x", "metarun: checkpoint=x: is for testing a finished run; add recipe=test"),
        ("data=folder data.root=x/y", "metarun: data.root: there is no file or folder x/y"),
        ("recipe=inspect images=x", "images=x: this recipe has no use for it; it looks at data= and target=: data=folder data.root="),
        ("recipe=inspect unknown=auto", "unknown=auto: this recipe has no use for it; it looks at data= and target="),
    ],
)  # fmt: skip
def test_what_a_recipe_has_no_use_for_is_refused(
    words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(metarun(*words.split()), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "algo=maml"], "run: cannot be read as key=value or group=choice; no verb is needed: metarun algo=maml data=omniglot, say"),
        (["version"], "version: cannot be read as key=value or group=choice; metarun --version tells it"),
        (["algo=maml data=omniglot seed=1"], "cannot be read as key=value or group=choice; these are several words, around which no"),
        (["algo=maml,", "data=omniglot"], "algo=maml,: cannot be read as key=value or group=choice; words stand apart by spaces alone"),
        (["--seed=3"], "unrecognized arguments: --seed=3; did you mean seed=3?"),
        (["--seed", "3"], "unrecognized arguments: --seed; a key has a value, seed=VALUE, and metarun help seed says more"),
        (["--epochs=5"], "unrecognized arguments: --epochs=5; did you mean train.steps?"),
        (["network=conv4"], "network: there is no such key; did you mean backbone?"),
        (["--output-dir=x"], "unrecognized arguments: --output-dir=x; did you mean outputs?"),
        (["--batch-size=5"], "unrecognized arguments: --batch-size=5; did you mean"),
        (["data=my_images/"], "; images of your own are data=folder data.root=my_images/, and texts data=text data.root=my_images/"),
        (["data=pictures"], "; images of your own are data=folder data.root=pictures, and texts data=text data.root=pictures"),
        (["recipe=report", "runs=pictures", "else/where"], "else/where: cannot be read as key=value or group=choice; a path is the"),
        (["recipe=test", "pictures"], "pictures: cannot be read as key=value or group=choice; a path is the value of a key: runs="),
        (["recipe=test", "checkpoint=p*"], "checkpoint=p*: is a pattern, and one is meant: pictures"),
        (["recipe=report", "runs=p*"], "runs=p*: is a pattern, and folders are meant: runs=[pictures]"),
        (["train.max_seconds=1.5h"], "train.max_seconds=1.5h: is no number; it is in seconds: 5400"),
        (["train.steps=1,000"], "train.steps=1,000: a comma separates the values of a sweep, which needs -m; one number is written 1000"),
        (["seed=0,1"], "seed=0,1: several values make a sweep, which needs -m; a list is written [a,b]"),
        (["algo=maml", "algo.inner_lr=0,01"], "algo.inner_lr=0,01: a comma separates the values of a sweep, which needs -m; one number is"),
        (["optimizer=cosine"], "optimizer=cosine: there is no such choice; did you mean schedule=cosine?"),
        (["seeds=0,1"], "seeds: there is no such key; did you mean seed?"),
        (["inner_steps=5"], "inner_steps: there is no such key; did you mean algo.inner_steps"),
        (["-m", "seed=0-2"], "seed=0-2: is no whole number; several are a sweep: -m 'seed=range(0,3)'"),
        (["-m", "seed=[0,1]"], "seed=[0, 1]: is no whole number; several are a sweep: -m seed=0,1"),
        (["-m", "algo=*"], "algo=*: there is no such choice; all of them are a sweep: -m 'algo=glob(*)'"),
        (["recipe=transfer", "target=~/x"], "; images of your own are target=folder target.data.root=~/x, and texts target=text target"),
        (["encoder=outputs/run"], "encoder=outputs/run: there is no such choice; the backbone of a run is encoder.from=outputs/run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_words_of_other_programs_lead_to_those_of_this_one(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    one_line(metarun(*words), told)


@pytest.mark.parametrize("no", ["", "0", "false"])
def test_no_traceback_is_a_value_too(no: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_TRACEBACK", no)
    one_line(metarun("algo=mmal"), "algo=mmal: there is no such choice")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: object) -> None:
        raise ValueError("a bug of metarun's")

    monkeypatch.setattr("metarun.runs.carry_out.run", bug)
    with pytest.raises(ValueError, match="a bug of metarun's"):
        metarun(*SINUSOID)


def test_process_of_its_own_exits_with_2() -> None:
    command = [sys.executable, "-m", "metarun", "algo=mmal"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "metarun: algo=mmal: there is no such choice; did you mean maml, imaml, fomaml?\n"
