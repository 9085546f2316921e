"""Checks metarun on a machine with a CUDA GPU, part by part, and writes one JSON.

Each part is a process of its own with a time limit, so that one that fails, hangs or takes the device down ends no other;
the JSON says why it failed. All parts together keep to a budget of seconds. With --dry-run every part runs in miniature on
the CPU, where a GPU is not asked for anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.runs import contents
from metarun.runs.result import TASKS_PER_SECOND, TEST_ACCURACY, TRAIN_SECONDS, TRAIN_STEPS, half_of

ROOT = Path(__file__).parents[1]
SECONDS = 470  # of all parts together: below eight minutes
TAIL = 12  # lines of a failed part's output that the JSON keeps
# How far the loss of a step may lie from that in double precision, and the least cosine between the two gradients.
AGREE = {"float32": (1e-3, 0.9999), "tf32": (1e-2, 0.99), "bfloat16": (3e-2, 0.8)}


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: What it is called in the JSON.
        title: What it does.
        limit: The seconds after which it is ended.
        work: Does it, for a dry run or in earnest, and returns JSON values.
    """

    name: str
    title: str
    limit: float
    work: Callable[[bool], dict[str, Any]]


def machine(dry: bool) -> dict[str, Any]:
    """What it runs on; raises `RuntimeError` where there is no GPU."""
    import torch

    from metarun.runs import provenance

    found: dict[str, Any] = {"versions": provenance.versions(), "cpus": os.cpu_count(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_bytes": properties.total_memory}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    elif not dry:
        raise RuntimeError("torch finds no CUDA device here; --dry-run does without")
    return found


def tests(dry: bool) -> dict[str, Any]:
    """The tests that need a GPU; a dry run only collects them."""
    words = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/engine/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", *(["--collect-only"] if dry else []), *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    lines = (ended.stdout + ended.stderr).splitlines()
    if ended.returncode:
        raise RuntimeError("\n".join(lines[-TAIL:]))
    return {"tests": next((line for line in reversed(lines) if "test" in line or "passed" in line), "")}


def maml(dry: bool, steps: int = 1, queries: int = 15, device: Any = None) -> tuple[Any, Any, Any]:
    """A MAML learner on conv4, a meta-batch of random tasks, and the hardware for it, all on the device."""
    import torch

    from metarun.config import task_of
    from metarun.config.folder import CONF
    from metarun.core import Episodes
    from metarun.data.source import NoData
    from metarun.engine.distributed import World
    from metarun.engine.hardware import choose
    from metarun.stages.learning import build_algorithm

    import hydra  # isort: skip

    class Drawings(NoData):
        input_shape: tuple[int, ...] = (1, 28, 28)

    words = ["~preset", "algo=maml", "backbone=conv4", f"algo.inner_steps={steps}", f"task.queries={queries}",
             f"algo.inner_lr={0.5 if steps == 1 else 0.01}", f"hardware={'cpu' if dry else 'cuda'}", "hardware.record=false"]  # fmt: skip
    words += ["backbone.channels=4"] if dry else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", overrides=words)
    algorithm = build_algorithm(config, Drawings(), task_of(config, "train"))
    hardware = choose(config.hardware, algorithm, World())
    hardware.place(algorithm).train()
    tasks, draw = 2 if dry else 32, torch.Generator().manual_seed(0)

    def items(each: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(tasks, 5 * each, 1, 28, 28, generator=draw).to(hardware.device)
        return x, torch.arange(5, device=hardware.device).repeat_interleave(each).expand(tasks, -1).contiguous()

    return algorithm, Episodes(*items(1), *items(queries), ways=5), hardware


def gradients(algorithm: Any, episodes: Any, hardware: Any) -> tuple[float, Any]:
    """The loss of a step, and all its gradients as one vector in double precision."""
    import torch

    from metarun.engine.gradients import gradient_step

    sums = gradient_step(algorithm, episodes, 0, 1.0, 0, hardware)
    found = torch.cat([value.grad.double().flatten() for value in algorithm.parameters() if value.grad is not None])
    return float(sums["loss"]), found


def precision(dry: bool) -> dict[str, Any]:
    """A step in single precision, TF32 and bfloat16 beside the same step in double precision."""
    import copy
    from dataclasses import replace

    import torch

    from metarun.engine.hardware import allow_tf32

    algorithm, episodes, hardware = maml(dry, queries=2 if dry else 15)
    exact = copy.deepcopy(algorithm).double()
    doubled = episodes.with_tensors(
        tensor.double() if tensor.is_floating_point() else tensor for tensor in episodes.named_tensors.values()
    )
    loss, right = gradients(exact, doubled, hardware)
    found: dict[str, Any] = {"float64": {"loss": loss}}
    kinds = {"float32": hardware, "bfloat16": replace(hardware, autocast_dtype=torch.bfloat16)}
    if not dry:
        kinds["tf32"] = hardware
    for name, where in kinds.items():
        allow_tf32(name == "tf32")
        own, gradient = gradients(algorithm, episodes, where)
        cosine = float(torch.cosine_similarity(gradient, right, dim=0))
        found[name] = {
            "loss": own,
            "loss_difference": abs(own - loss),
            "gradient_cosine": cosine,
            "allowed": AGREE[name],
        }
    allow_tf32(False)
    wrong = [
        name
        for name in kinds
        if not (found[name]["loss_difference"] <= AGREE[name][0] and found[name]["gradient_cosine"] >= AGREE[name][1])
    ]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)} lies too far from double precision: {json.dumps(found)}")
    return found


def compiled(compute: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Callable[[], None]]:
    """As `cuda_graph`, by inductor: what `TracedStep` takes as its capture."""
    import torch

    faster = torch.compile(compute)
    outputs = tuple(value.clone() for value in faster())

    def replay() -> None:
        for held, value in zip(outputs, faster(), strict=True):
            held.copy_(value)

    return outputs, replay


def again(compute: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Callable[[], None]]:
    """In place of a CUDA graph on a CPU: each replay computes anew into the same memory."""
    outputs = tuple(compute())

    def replay() -> None:
        for held, value in zip(outputs, compute(), strict=True):
            held.copy_(value)

    return outputs, replay


def ways(dry: bool) -> dict[str, Any]:
    """The ways to compute a step: what `Hardware.traced` is for each."""
    from metarun.engine.cuda_graph import cuda_graph
    from metarun.engine.traced_step import TracedStep

    found: dict[str, Any] = {
        "plain": None,
        "recorded": TracedStep(None),
        "captured": TracedStep(again if dry else cuda_graph),
    }
    return found if dry else {**found, "compiled": TracedStep(compiled)}


def cuda_graph(dry: bool) -> dict[str, Any]:
    """The gradient of a captured step beside that of the plain one, on the tasks it was captured on and on others."""
    from dataclasses import replace

    algorithm, episodes, hardware = maml(dry, queries=2 if dry else 15)
    captured = replace(hardware, traced=ways(dry)["captured"])
    other = episodes.with_tensors(
        tensor.flip(0) * 0.5 if tensor.is_floating_point() else tensor for tensor in episodes.named_tensors.values()
    )
    found = {}
    for name, tasks in (("first", episodes), ("other", other)):
        _, right = gradients(algorithm, tasks, hardware)
        _, gradient = gradients(algorithm, tasks, captured)
        found[name] = float((gradient - right).abs().max() / right.abs().max())
    if not captured.traced.in_use:
        raise RuntimeError("the step could not be captured, and went on plainly")
    if max(found.values()) > 1e-4:
        raise RuntimeError(f"the captured step gives another gradient: {found}")
    return {"gradient_difference": found}


def maml_rates(dry: bool) -> dict[str, Any]:
    """Tasks a second of MAML by each way to compute a step, in alternating rounds; the ratio is to the plain step."""
    import torch

    from metarun.engine.gradients import gradient_step

    found: dict[str, Any] = {}
    shapes = [(1, 1)] if dry else [(1, 15), (1, 1), (5, 15), (5, 1)]
    for steps, queries in shapes:
        from dataclasses import replace

        algorithm, episodes, hardware = maml(dry, steps, queries)
        sides: dict[str, Any] = {}
        told: dict[str, Any] = {}

        def once(where: Any, algorithm: Any = algorithm, episodes: Any = episodes) -> None:
            float(gradient_step(algorithm, episodes, 0, 1.0, 0, where)["loss"])

        for name, traced in ways(dry).items():
            sides[name] = replace(hardware, traced=traced)
            began = time.perf_counter()
            try:
                once(sides[name])
                once(sides[name])
            except Exception as error:  # of a compiler, say: the others are still measured
                told[name] = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
                del sides[name]
                continue
            told[name] = {"first_seconds": time.perf_counter() - began, "rates": []}
        for _ in range(1 if dry else 5):
            for name, where in sides.items():
                began, count = time.perf_counter(), 0
                while not count or (not dry and time.perf_counter() - began < 0.7):
                    once(where)
                    count += 1
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                told[name]["rates"].append(count * episodes.n_tasks / (time.perf_counter() - began))
        for name in sides:
            told[name]["tasks_per_second"] = statistics.median(told[name]["rates"])
            told[name]["ratio"] = told[name]["tasks_per_second"] / statistics.median(told["plain"]["rates"])
        found[f"{steps} steps, {queries} queries"] = told
    return found


def learn2learn(dry: bool) -> dict[str, Any]:
    """Two lines of `scripts.benchmark` on the GPU: MAML without the data, against learn2learn where it is there."""
    lines = ("compute_maml_q15", "compute_maml_5steps_q1")
    if dry:  # whether the command knows these lines
        told = subprocess.run(
            [sys.executable, "-m", "scripts.benchmark", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if missing := [line for line in lines if line not in told.stdout]:
            raise RuntimeError(f"scripts.benchmark has no line {', '.join(missing)}")
        return {"lines": list(lines)}
    from metarun import optional
    from metarun.errors import UserError

    try:
        optional.learn2learn()
    except UserError as error:
        return {"error": str(error)}
    target = Path(tempfile.mkdtemp()) / "benchmark.json"
    command = [sys.executable, "-m", "scripts.benchmark", "--hardware", "cuda", "record=true", "--rounds", "3", "--seconds", "1",
               "--json", str(target), "--only", *lines]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if ended.returncode:  # the JSON of a line whose sides differ has its error in place of rates
        raise RuntimeError("\n".join((ended.stdout + ended.stderr).splitlines()[-TAIL:]))
    measured: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))["lines"]
    return measured


def encoding(dry: bool) -> dict[str, Any]:
    """Images a second of a ResNet-12 as a backbone of ours, and of learn2learn's where it is there; 84x84, the same batch."""
    import torch

    from metarun.backbones.resnet12 import ResNet12

    device = torch.device("cpu" if dry else "cuda")
    side, count = 84, 2 if dry else 256
    x = torch.rand(count, 3, side, side, device=device)
    # Running averages, as learn2learn's has: the statistics of a batch would be more work.
    ours = ResNet12((3, side, side), norm="running").to(device).eval()
    networks: dict[str, Any] = {"ours": lambda: ours(x, count)}
    found: dict[str, Any] = {"images": count, "side": side}
    try:
        from metarun import optional

        optional.learn2learn()
        models = importlib.import_module("learn2learn.vision.models")
        peer = models.ResNet12Backbone().to(device).eval()
        networks["learn2learn"] = lambda: peer(x)
    except Exception as error:
        found["learn2learn"] = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
    for _ in range(1 if dry else 3):
        for name, network in networks.items():
            with torch.no_grad():
                network()
                began, times = time.perf_counter(), 0
                while not times or (not dry and time.perf_counter() - began < 1.0):
                    network()
                    times += 1
                    if not dry:
                        torch.cuda.synchronize()
            rate = times * count / (time.perf_counter() - began)
            found.setdefault(name, {"rates": []})["rates"].append(rate)
    for name in networks:
        found[name]["images_per_second"] = statistics.median(found[name]["rates"])
    return found


def omniglot(dry: bool) -> dict[str, Any]:
    """Omniglot MAML, trained for two minutes; a dry run trains on scikit-learn's digits for two steps."""
    with tempfile.TemporaryDirectory() as outputs:
        words = ["algo=maml", f"outputs={outputs}"]
        if dry:
            words += ["data=digits", "task.ways=2", "task.queries=2", "train.steps=2", "train.validate_episodes=2", "test.episodes=4",
                      "test.baseline_episodes=2", "backbone.channels=4", "hardware=cpu"]  # fmt: skip
        else:
            words += ["data=omniglot", "hardware=cuda", "hardware.record=true", "train.max_seconds=120", "train.steps=1000000",
                      "train.tasks_per_step=32", "train.validate_every=500", "train.validate_episodes=200", "test.episodes=1000",
                      "test.baseline_episodes=0", "task.queries=5", "algo.inner_lr=0.5", "train.optimizer.lr=0.003"]  # fmt: skip
        ended = subprocess.run(
            [sys.executable, "-m", "metarun", *words], cwd=outputs, capture_output=True, text=True, encoding="utf-8"
        )
        results = list(Path(outputs).rglob(contents.RESULT))
        if ended.returncode or not results:
            raise RuntimeError("\n".join((ended.stdout + ended.stderr).splitlines()[-TAIL:]))
        whole = json.loads(results[0].read_text(encoding="utf-8"))
    names = (
        TEST_ACCURACY,
        half_of(TEST_ACCURACY),
        TRAIN_STEPS,
        TRAIN_SECONDS,
        TASKS_PER_SECOND,
        "protocol",
        "peak_memory",
    )
    return {name: whole[name] for name in names if name in whole}


PARTS = (
    Part("machine", "what it runs on", 30, machine),
    Part("tests", "the tests that need a GPU", 75, tests),
    Part("precision", "TF32 and bfloat16 beside double precision", 35, precision),
    Part("cuda_graph", "the CUDA graph beside the plain step", 35, cuda_graph),
    Part("omniglot", "Omniglot MAML for two minutes", 165, omniglot),
    Part("maml_rates", "MAML: plain, recorded, captured, compiled", 75, maml_rates),
    Part("learn2learn", "MAML against learn2learn", 60, learn2learn),
    Part("encoding", "ResNet-12 on images against learn2learn", 40, encoding),
)


def carry_out(part: Part, dry: bool, seconds: float) -> dict[str, Any]:
    """Runs a part in a process of its own; what it found, or why it failed."""
    began = time.monotonic()
    command = [sys.executable, "-m", "scripts.gpu_check", "--part", part.name, *(["--dry-run"] if dry else [])]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)  # of its own session, with what it started
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    spent = round(time.monotonic() - began, 1)
    if timed_out:
        return {"ok": False, "seconds": spent, "reason": f"ended after {seconds:.0f} s", "output": lines[-TAIL:]}
    found = next((line for line in reversed(lines) if line.startswith("{")), "")
    if process.returncode or not found:
        reason = next((line for line in reversed(lines) if line.strip()), f"exit status {process.returncode}")
        return {"ok": False, "seconds": spent, "reason": reason, "output": lines[-TAIL:]}
    return {"ok": True, "seconds": spent, **json.loads(found)}


def check(parts: Sequence[Part], dry: bool, seconds: float, target: Path) -> dict[str, Any]:
    """Runs the parts one after the other within a budget of seconds; `target` has all that was found so far at any time."""
    result: dict[str, Any] = {"dry_run": dry, "budget_seconds": seconds, "parts": {}}
    target.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for number, part in enumerate(parts, 1):
        left = end - time.monotonic()
        print(f"{number}/{len(parts)} {part.title}", file=sys.stderr, flush=True)
        if left < 5:
            found: dict[str, Any] = {
                "ok": False,
                "seconds": 0.0,
                "reason": "not begun: the budget of seconds was spent",
            }
        else:
            found = carry_out(part, dry, min(part.limit, left))
        result["parts"][part.name] = found
        result["seconds"] = round(seconds - (end - time.monotonic()), 1)
        result["ok"] = all(each["ok"] for each in result["parts"].values())
        unfinished = target.with_name(f"{target.name}.unfinished")
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, target)
        print(f"    {'ok' if found['ok'] else 'failed: ' + found['reason']} ({found['seconds']} s)", file=sys.stderr)
    return result


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where a part failed."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every part in miniature, on the CPU")
    parser.add_argument("--json", type=Path, default=Path("outputs/gpu_check.json"), help="outputs/gpu_check.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all parts together ({SECONDS})")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.part:
        part = next(part for part in PARTS if part.name == given.part)
        try:
            print(json.dumps(part.work(given.dry_run)))
        except RuntimeError as error:
            print(error)
            return 1
        return 0
    result = check([part for part in PARTS if part.name in given.only], given.dry_run, given.seconds, given.json)
    print(f"written to {given.json}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
