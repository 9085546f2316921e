"""The files in a run's folder, and in that of a stage that is kept apart, and the folder of a report, each named once."""

from __future__ import annotations

RESULT = "result.json"  # the mark of a finished run
CONFIG = "config.yaml"
DATA = "data.json"  # what the data said of themselves at the first sitting
METRICS = "metrics.jsonl"
LOG = "metarun.log"
LAST = "last.pt"  # the whole state of a training, to go on from
BEST = "best.pt"  # the selected weights
CLOCK = "clock.txt"  # the second of each step of a training with a budget of seconds
SCORES = "test_scores.npz"
TASK = "test_task.png"  # the first test task, with what was predicted of it
CLASSIFIER = "classifier.pt"  # what learned a target
PREDICTIONS = "predictions.csv"
PAGE = "index.html"
LEARNING_CURVE = "learning_curve.png"  # over the training images of a target
CLASS_CURVE = "continual.png"  # over the classes that arrived

# Folders of what a stage has done so far, to go on from.
TARGET, CONTINUAL = "target", "continual"
OF_REPEATS = "predictions"  # beside the former: what each repeat predicted

REPORT = "report"  # in the folder around runs: the report over them

# Of a stage that is kept apart.
STAGE = "stage.json"  # its numbers, which mark it as finished
DEPENDS_ON = "content.json"  # all that its weights depend on


def scores_file(name: str) -> str:
    """The file with the score of every test episode, of one data set of several, or of the only one, which has no name."""
    return _of_set(SCORES, name)


def task_file(name: str) -> str:
    """The file with the picture of a test task, of one data set of several, or of the only one, which has no name."""
    return _of_set(TASK, name)


def _of_set(file: str, name: str) -> str:
    stem, _, ending = file.partition(".")
    return f"{stem}-{name}.{ending}" if name else file
