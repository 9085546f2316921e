"""Compares two versions of metarun bit for bit: short runs of every family of methods and of every recipe, in both.

Usage: python -m scripts.same_numbers COMMIT [RUN...]

The tree that this file lies in is compared with COMMIT, on one core, in a few minutes; RUN names some of the runs
alone, which brings those whose weights they take. A number of `result.json` that is not the same, or gone, is a
difference, and so is a tensor of a checkpoint or of the scores of a test. What an hour or a machine decides (seconds,
memory, versions, commits) is not compared, and no text is. The exit status is 1 if anything differs, 2 if a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The last words of keys whose values an hour or a machine decides, or the folder that a tree lies in.
NOT_COMPARED = {
    "seconds",
    "items_per_second",
    "tasks_per_second",
    "bytes",  # of an exported network, which holds the paths of its sources
    "ms_an_image",
    "peak_memory",
    "git_commit",
    "versions",
    "hardware",
    "metarun",
    "reused",
    "made_by",
}

SHORT = [
    "hardware=cpu",
    "hardware.threads=1",
    "train.steps=8",
    "train.tasks_per_step=2",
    "train.validate_every=4",
    "train.validate_episodes=8",
    "test.episodes=16",
    "test.baseline_episodes=4",
]
FOLDER = ["data=folder", "data.root=images", "data.image_size=16", "task.ways=3", "task.queries=2"]
IMAGES = [*FOLDER, "backbone.channels=8"]
MAML = ["algo=maml", "algo.inner_steps=2", "algo.test_inner_steps=3"]
PRETRAIN = ["pretrain.train.steps=8", "pretrain.train.tasks_per_step=16", "pretrain.train.validate_every=4"]
TARGET = ["target=digits", "target.train_images=[10,20]", "target.repeats=2", "target.test_images=200"]
PIXELS = [*FOLDER, "backbone=pixels", "train.steps=0"]

# What each run is called, and the words behind `metarun`; `checkpoint=` names a run that stands before it.
RUNS: dict[str, list[str]] = {
    "demo": ["train.steps=100", "test.episodes=200", "hardware=cpu", "hardware.threads=1"],
    # a family each
    "maml": [*SHORT, *IMAGES, *MAML],
    "mamlplusplus": [*SHORT, *IMAGES, "algo=mamlplusplus"],
    "anil": [*SHORT, *IMAGES, "algo=anil"],
    "metasgd": [*SHORT, *IMAGES, "algo=metasgd"],
    "metacurvature": [*SHORT, *IMAGES, "algo=metacurvature"],
    "imaml": [*SHORT, *IMAGES, "algo=imaml", "algo.inner_lr=0.1"],
    "protomaml": [*SHORT, *IMAGES, "algo=protomaml"],
    "cavia": [*SHORT, *IMAGES, "algo=cavia"],
    "leo": [*SHORT, *IMAGES, "algo=leo"],
    "reptile": [*SHORT, *IMAGES, "algo=reptile"],
    "sinusoid": [*SHORT, "algo=maml", "data=sinusoid", "backbone=mlp", "~preset"],
    "protonet": [*SHORT, *IMAGES, "algo=protonet", "test.unknown_ways=1"],
    "matchingnet": [*SHORT, *IMAGES, "algo=matchingnet"],
    "relationnet": [*SHORT, *IMAGES, "algo=relationnet"],
    "feat": [*SHORT, *IMAGES, "algo=feat"],
    "deepbdc": [*SHORT, *IMAGES, "algo=deepbdc"],
    "metaoptnet": [*SHORT, *IMAGES, "algo=metaoptnet"],
    "mann": [*SHORT, *IMAGES, "algo=mann"],
    "snail": [*SHORT, *IMAGES, "algo=snail"],
    "cnp": [*SHORT, "algo=cnp", "data=sinusoid", "backbone=mlp", "~preset"],
    "l2l": [*SHORT, *IMAGES, "algo=l2l"],
    "hsml": [*SHORT, *IMAGES, "algo=hsml"],
    "tim": [*SHORT, *PIXELS, "algo=tim"],
    "ptmap": [*SHORT, *PIXELS, "algo=ptmap"],
    "rfs": [*SHORT, *IMAGES, "algo=rfs", "train.tasks_per_step=16"],
    "few_labels": [*SHORT, *IMAGES, "algo=semi_protonet_masked", "task.unlabelled=2", "task.distractors=1"],
    "umtra": [*SHORT, *IMAGES, "algo=protonet", "unsupervised=umtra"],
    "metamix": [*SHORT, *IMAGES, *MAML, "wrapper=metamix"],
    "ats": [*SHORT, *IMAGES, "algo=anil", "wrapper=ats", "train.tasks_per_step=4"],
    "varied": [*SHORT, *IMAGES, "algo=protonet", "task.ways=[2,3]", "task.shots=[1,2]"],
    # a recipe each
    "train": [*SHORT, *IMAGES, "recipe=train"],
    "test": ["recipe=test", "checkpoint=maml", "task.shots=2", "test.episodes=16"],
    "continual": [*SHORT, *IMAGES, "recipe=continual", "algo=oml", "continual.images=2", "continual.test_images=2"],
    "test_continual": ["recipe=test_continual", "checkpoint=continual", "continual.orders=3"],
    "pretrain_meta": [*SHORT, *IMAGES, *PRETRAIN, "recipe=pretrain_meta"],
    "pretrain_meta_transfer": [*SHORT, *IMAGES, *PRETRAIN, *TARGET, "recipe=pretrain_meta_transfer"],
    "distill": [*SHORT, *IMAGES, *PRETRAIN, "recipe=distill", "train.tasks_per_step=16"],
    "transfer": [*SHORT, *IMAGES, *TARGET, "recipe=transfer", "transfer.steps=5", "train.tasks_per_step=16"],
    "tradaboost": [*SHORT, *TARGET, "recipe=transfer", "data=digits", "transfer=tradaboost", "task.ways=2", "backbone.channels=8"],
    "logistic_regression": [*SHORT, *IMAGES, *TARGET, "recipe=transfer", "transfer=logistic_regression"],
    "meta_transfer": [*SHORT, *IMAGES, *TARGET, *MAML, "recipe=meta_transfer", "transfer.steps=5"],
    "target_only": [*SHORT[:2], *TARGET, "recipe=target_only", "backbone.channels=8", "transfer.steps=5"],
    "domain_adaptation": [*SHORT, "recipe=domain_adaptation", "data=digits", "target=digits", "backbone.channels=8"],
    "predict": ["recipe=predict", "checkpoint=protonet", "support=images/test", "images=images/val"],
    "export": ["recipe=export", "checkpoint=protonet", "support=images/test", "format=torch"],
}  # fmt: skip


# Carries out what a line of its input says, and answers with a line: what went wrong, if anything did.
WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what a run prints is no answer
import metarun
for line in sys.stdin:
    words, outputs = json.loads(line)
    problem = ""
    try:
        metarun.run(*words, outputs=outputs)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    print(json.dumps(problem), file=answers, flush=True)
"""


@dataclass
class Made:
    """What a run in one tree came to.

    Attributes:
        numbers: The numbers of `result.json`, by key.
        digests: The digest of the values of each file of tensors or arrays, by its name in the run folder.
        problem: Why there is none of this; an empty string where the run succeeded.
        seconds: That it took.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers in JSON values, each with its path; what an hour or a machine decides is left out."""
    if key.rpartition("/")[2].rpartition(".")[2] in NOT_COMPARED:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from numbers(inner, f"{key}[{place}]")
    elif isinstance(value, bool | int | float):
        yield key, value


def digest_of(value: Any, digest: Any) -> None:
    """Feeds tensors, arrays and plain values to a digest, entry by entry, in the order of their names."""
    import numpy as np
    import torch

    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            if str(name) not in NOT_COMPARED:
                digest.update(str(name).encode())
                digest_of(value[name], digest)
    elif isinstance(value, list | tuple):
        for inner in value:
            digest_of(inner, digest)
    elif isinstance(value, torch.Tensor):
        digest_of(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), digest)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())


def digests(outputs: Path) -> dict[str, str]:
    """The digest of each file of tensors or arrays, and of each table of predictions, in the folders below `outputs`.

    The names of these folders end in digests, of paths too, which are left out.
    """
    import numpy as np
    import torch

    found = {}
    for path in sorted(outputs.rglob("*")):
        digest = hashlib.sha256()
        if path.suffix == ".pt":
            digest_of(torch.load(path, map_location="cpu", weights_only=True), digest)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                digest_of(dict(arrays), digest)
        elif path.suffix == ".csv":
            digest.update(path.read_bytes().replace(str(outputs.parents[1]).encode(), b""))
        else:
            continue
        home, stem, *below = path.relative_to(outputs).parts
        name = stem.rpartition("-")[0] if home == "stages" else ""
        found["/".join(filter(None, (name, *below)))] = digest.hexdigest()
    return found


def make_images(folder: Path, classes: int = 5, each: int = 12, side: int = 16) -> None:
    """Class folders of small images below `train`, `val` and `test`: a colour for each class, and noise."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(classes):
            place = folder / split / f"{split}{number}"
            place.mkdir(parents=True)
            colour = generator.integers(60, 200, 3)
            for image in range(each):
                pixels = colour + generator.integers(-60, 60, (side, side, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{image}.png")


def extract(commit: str, folder: Path, root: Path = ROOT) -> None:
    """Puts the files of a commit of the clone `root` into a folder; nothing is left in git that a kill could leave behind.

    Raises:
        ValueError: The clone has no such commit.
    """
    done = subprocess.run(["git", "-C", str(root), "archive", "--format=tar", commit], capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


class Tree:
    """A process with the code of one tree, which carries out runs one after the other: `import torch` takes longer than most runs.

    Args:
        code: The tree.
        work: The folder that all its runs share. Paths in words are below it, so that a path in a result is that of the other
            tree, too.
    """

    def __init__(self, code: Path, work: Path) -> None:
        self.work = work
        own = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "METARUN_CACHE": str(work / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=work,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def carry_out(self, name: str, words: Sequence[str]) -> Made:
        """What `metarun words...` comes to."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        began = time.perf_counter()
        given = [*(at_work(self.work, word) for word in words), "name=made"]
        try:
            self.process.stdin.write(json.dumps([given, f"runs/{name}"]) + "\n")
            self.process.stdin.flush()
            problem = json.loads(self.process.stdout.readline() or '"its process ended"')
        except BrokenPipeError:
            problem = "its process ended"
        seconds = time.perf_counter() - began
        folder = run_folder(self.work, name)
        if problem or folder is None:
            return Made(problem=problem or "it left no result.json", seconds=seconds)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return Made(dict(numbers(result)), digests(self.work / "runs" / name), seconds=seconds)


def run_folder(work: Path, name: str) -> Path | None:
    """The folder of a run that has a result; None where there is none."""
    return next((path.parent for path in (work / "runs" / name).glob("made/*/result.json")), None)


def at_work(work: Path, word: str) -> str:
    """`checkpoint=RUN` with the folder that RUN has in `work`, from there; any other word as it is."""
    key, _, name = word.partition("=")
    folder = run_folder(work, name) if key == "checkpoint" else None
    return word if folder is None else f"{key}={folder.relative_to(work).as_posix()}"


def chosen(names: Iterable[str]) -> dict[str, list[str]]:
    """The runs with these names, and those whose weights they take, in their order; all runs where none is named."""
    wanted = set(names) or set(RUNS)
    for name, words in reversed(RUNS.items()):  # what a run takes weights of stands before it
        if name in wanted:
            wanted |= {word.partition("=")[2] for word in words if word.startswith("checkpoint=")}
    return {name: words for name, words in RUNS.items() if name in wanted}


def differences(before: Made, now: Made) -> list[str]:
    """What is not the same in a run of two trees, a line each; what only the second has is none."""
    if before.problem or now.problem:
        return [f"{which}: {made.problem}" for which, made in (("before", before), ("now", now)) if made.problem]
    lines = []
    for had, has in ((before.numbers, now.numbers), (before.digests, now.digests)):
        for key, value in had.items():
            if key not in has:
                lines.append(f"{key}: gone")
            elif repr(has[key]) != repr(value):  # NaN is NaN, and 1 is not 1.0
                lines.append(f"{key}: {value} is now {has[key]}")
    return lines


def compare(root: Path, commit: str, runs: Mapping[str, Sequence[str]], shown: int = 5) -> int:
    """Carries the runs out in both trees, and prints a table.

    Args:
        root: The clone whose working tree is compared.
        commit: What it is compared with.
        runs: The words of each run, by name.
        shown: The lines of a run's differences that are printed.

    Returns:
        The exit status.
    """
    bad = failed = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="metarun-same-numbers-"))
        codes, works = [Path(folder, "tree"), root], [Path(folder, side) for side in ("before", "now")]
        extract(commit, codes[0], root)
        for work in works:
            make_images(work / "images")
        trees = [stack.enter_context(Tree(code, work)) for code, work in zip(codes, works, strict=True)]
        print(f"| run | numbers | files | {commit}, s | here, s | same |\n| --- | --- | --- | --- | --- | --- |")
        for name, words in runs.items():
            before, now = (tree.carry_out(name, words) for tree in trees)
            lines = differences(before, now)
            bad += bool(lines)
            failed += bool(before.problem or now.problem)
            counts = f"{len(before.numbers)} | {len(before.digests)} | {before.seconds:.1f} | {now.seconds:.1f}"
            print(f"| {name} | {counts} | {'NO' if lines else 'yes'} |", flush=True)
            for line in lines[:shown]:
                print(f"    {line}")
            if len(lines) > shown:
                print(f"    and {len(lines) - shown} more", flush=True)
    print(
        f"{len(runs) - bad} of {len(runs)} runs are the same to the last bit" + (f"; {failed} failed" if failed else "")
    )
    return 2 if failed else 1 if bad else 0


def main(words: Iterable[str] | None = None, root: Path = ROOT) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.same_numbers", description=str(__doc__).split("\n")[0])
    parser.add_argument("commit", help="what this tree is compared with, such as main")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"only these: {', '.join(RUNS)}")
    given = parser.parse_args(None if words is None else list(words))
    if unknown := sorted(set(given.runs) - set(RUNS)):
        parser.error(f"{unknown[0]}: there is no such run; there are {', '.join(RUNS)}")
    try:
        return compare(root, given.commit, chosen(given.runs))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
