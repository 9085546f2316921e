"""The table at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_stored(folder: Path) -> float:
    """Shows the result of a finished run; returns its validation score."""
    result = json.loads((folder / "result.json").read_text())
    show(folder, result, finished_before=True)
    return float(result.get("val/score", 0.0))


def show(folder: Path, result: dict[str, Any], finished_before: bool = False) -> None:
    """Prints the table of a result and where everything lies."""
    protocol = result["protocol"]
    task = protocol["test"]
    shape = f"{task['ways']}-way {task['shots']}-shot, {task['queries']} queries a class" if "test/acc" in result else f"{task['shots']}-shot"
    mode = "transductive" if protocol["transductive"] else "inductive"
    table = Table(title=f"{shape}; norm {protocol['norm']}, {mode}", title_justify="left")
    for column in ("", "value", "95% interval", "episodes"):
        table.add_column(column, justify="left" if not column else "right")
    for prefix in ("test", "untrained", "chance"):
        if f"{prefix}/acc" in result:
            interval = f"± {result[f'{prefix}/acc_ci95']:.2%}" if f"{prefix}/acc_ci95" in result else ""
            episodes = str(result.get(f"{prefix}/episodes", ""))
            table.add_row(f"{prefix} accuracy" if prefix != "chance" else prefix, f"{result[f'{prefix}/acc']:.2%}", interval, episodes)
        if f"{prefix}/mse" in result:
            after = result.get(f"{prefix}/after_inner_steps") or {"": {key: result[f"{prefix}/{key}"] for key in ("mse", "mse_ci95", "mse_median", "diverged")}}
            for step, numbers in after.items():
                when = f" after {step} steps" if step else ""
                episodes = f"{result[f'{prefix}/episodes']}, {numbers['diverged']} diverged"
                table.add_row(
                    f"{prefix} MSE{when} (median {numbers['mse_median']:.3f})", f"{numbers['mse']:.3f}", f"± {numbers['mse_ci95']:.3f}", episodes
                )
    if "train/steps" in result:
        table.caption = (
            f"{result['train/steps']} steps in {result['train/seconds']:.0f} s, {result['train/tasks_per_second']:.3g} tasks/s; "
            f"tested the weights of step {result['train/selected_step']}, chosen on validation"
        )
        table.caption_justify = "left"
    console = Console(soft_wrap=False)
    console.print(table)
    if finished_before:
        console.print("This run had finished before; resume=false starts over beside it.", highlight=False)
    print(f"results  {folder}\ncurves   tensorboard --logdir {folder}")
