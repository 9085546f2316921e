"""The command `metarun recipe=report`, and what TensorBoard shows of the same runs."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import GENERATOR, make_run
from shell import SINUSOID, environment, metarun
from shell import result as stored_result
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from metarun.runs.logger import RunLogger


def test_command_needs_finished_runs(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "glyphs").mkdir(parents=True)
    (tmp_path / "outputs" / "glyphs" / "config.yaml").write_text("seed: 0\n")
    given = {
        "": "recipe=report: needs the folder of the runs to report on; add runs=outputs/NAME",
        f"runs={tmp_path}/outputs/glyps": (
            f"runs={tmp_path}/outputs/glyps: there is no such folder; did you mean {tmp_path}/outputs/glyphs?"
        ),
        f"runs={tmp_path}/outputs/glyphs": (
            f"runs={tmp_path}/outputs/glyphs: no finished test lies there, only 1 unfinished run"
        ),
    }
    for word, message in given.items():
        done = metarun("recipe=report", *([word] if word else []))
        assert (done.status, done.err, done.out) == (2, f"metarun: {message}\n", "")
    assert not list(tmp_path.rglob("report"))


def test_command_takes_several_folders_and_names_what_it_left_out(tmp_path: Path) -> None:
    for name in ("maml", "protonet"):
        make_run(tmp_path / name / "default", f"algo={name}", scores=GENERATOR.random(20), choices={"algo": name})
    (make_run(tmp_path / "maml" / "broken") / "result.json").write_text("{")
    done = metarun("recipe=report", f"runs=[{tmp_path}/maml,{tmp_path}/protonet]", f"outputs={tmp_path}")
    assert done.status == 0
    assert done.err.startswith(f"metarun: {tmp_path}/maml/broken/result.json: cannot be used (")
    assert done.err.count("\n") == 1
    assert re.search(r"│ maml +│ +1 │", done.out)
    assert re.search(r"│ protonet +│ +1 │", done.out)
    assert done.out.endswith(f"report   {tmp_path}/report/index.html\n")
    assert (tmp_path / "report" / "index.html").is_file()


def test_command_imports_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run", scores=[0.5, 1], curve=[0.1, 0.2])
    code = (
        "import sys; from metarun.cli import main\n"
        f"sys.argv = ['metarun', 'recipe=report', 'runs={tmp_path}']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(sorted({'torch', 'tensorboard', 'matplotlib.pyplot', 'scipy.stats'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("index.html\n[]\n")


def session_groups(logdir: Path) -> list[Any]:
    """What TensorBoard's hparams tab shows of a folder."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(logdir))))
    ctx = RequestContext()
    known, others = context.hparams_metadata(ctx, ""), context.hparams_from_data_provider(ctx, "", 1000)
    experiment = context.experiment_from_metadata(ctx, "", True, known, others)
    columns = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS], start_index=0, slice_size=100, col_params=columns
    )
    return list(list_session_groups.Handler(ctx, context, "", request).run().session_groups)


def test_toy_runs_from_the_command_to_the_report_and_to_tensorboard(tmp_path: Path) -> None:
    """Two methods, two seeds: the report's numbers are those of result.json, and the hparams tab shows the same runs."""
    for algo in ("maml", "fomaml"):
        for seed in (0, 1):
            words = [
                f"algo={algo}",
                *SINUSOID[1:],
                "train.validate_every=2",
                "train.validate_episodes=4",
                f"seed={seed}",
            ]
            assert metarun(*words, "name=toy", f"outputs={tmp_path}").status == 0
    done = metarun("recipe=report", f"runs={tmp_path}/toy")
    assert done.status == 0, done.err
    folders = sorted(path.parent for path in tmp_path.glob("toy/*/result.json"))
    assert len(folders) == 4
    with open(tmp_path / "toy" / "report" / "table.csv", newline="") as file:
        lines = {line["algo"]: line for line in csv.DictReader(file)}
    for algo in ("maml", "fomaml"):
        means = [stored_result(folder)["test/mse"] for folder in folders if folder.name.startswith(f"algo-{algo}_")]
        assert float(lines[algo]["mean"]) == pytest.approx(np.mean(means), rel=1e-12)
        assert lines[algo]["seeds"] == "0 1"
    best, other = sorted(lines.values(), key=lambda line: float(line["mean"]))
    assert (best["best"], best["pairs_over_episodes"], other["pairs_over_episodes"]) == ("1", "", "16")
    assert "| maml " in (tmp_path / "toy" / "report" / "table.md").read_text()
    sessions = {group.name: group for group in session_groups(tmp_path / "toy")}
    assert set(sessions) == {folder.name for folder in folders}
    for folder in folders:
        group = sessions[folder.name]
        assert group.hparams["seed"].number_value == int(re.search(r"seed-(\d)", folder.name)[1])
        metrics = {value.name.tag: value.value for value in group.metric_values}
        assert metrics["hparams/test"] == pytest.approx(stored_result(folder)["test/mse"], rel=1e-6)


def test_tensorboard_shows_runs_of_different_kinds(tmp_path: Path) -> None:
    """One trained only, with a setting that the other does not have: neither hides what the other has."""
    for name, settings, test, validation in (
        ("a", {"seed": 1, "algo.distance": "cosine", "train.patience": None, "resume": True}, None, 0.75),
        ("b", {"seed": 2, "algo.inner_lr": 0.5, "train.patience": 3, "resume": True}, 0.5, 0.625),
    ):
        logger = RunLogger(tmp_path / name)
        logger.hparams(settings, test, validation)
        logger.close()
        assert len(list((tmp_path / name).iterdir())) == 1
    first, second = sorted(session_groups(tmp_path), key=lambda group: str(group.name))
    assert first.hparams["algo.distance"].string_value == "cosine"
    assert second.hparams["algo.inner_lr"].number_value == 0.5
    assert first.hparams["resume"].string_value == "True"
    found = [{value.name.tag: value.value for value in group.metric_values} for group in (first, second)]
    assert found == [{"hparams/validation": 0.75}, {"hparams/test": 0.5, "hparams/validation": 0.625}]
