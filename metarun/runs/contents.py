"""The files in a run's folder, each named once."""

from __future__ import annotations

RESULT = "result.json"  # the mark of a finished run
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LAST = "last.pt"  # the whole state of a training, to go on from
BEST = "best.pt"  # the selected weights
CLASSIFIER = "classifier.pt"  # what learned a target
PREDICTIONS = "predictions.csv"
