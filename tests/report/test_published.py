"""The published values that a report shows beside its own."""

from __future__ import annotations

import json

import yaml
from shell import ROOT

from metarun.report import published


def test_published_values_are_of_choices_that_exist_and_of_one_entry_each() -> None:
    entries = yaml.safe_load((ROOT / "metarun" / "report" / "published.yaml").read_text())
    keys = [
        json.dumps({key: entry[key] for key in sorted(entry) if key not in ("value", "source")}) for entry in entries
    ]
    assert len(set(keys)) == len(keys) > 38
    groups = {"algo", "data", "backbone", "encoder", "recipe", "unsupervised", "wrapper"}
    for entry in entries:
        assert entry["source"]
        assert {"data", "value"} <= entry.keys() <= {*groups, "ways", "shots", "task", "value", "source"}
        for group in groups & entry.keys():
            assert (ROOT / "conf" / group / f"{entry[group]}.yaml").is_file()
    choices = {"algo": "maml", "data": "omniglot", "backbone": "conv4", "recipe": "meta"}
    assert str(published.find(choices, {"ways": 20, "shots": 5})) == "98.9 ± 0.2 % (Finn et al. 2017, table 1)"
    assert published.find(choices, {"ways": 20, "shots": 4}) is None
    assert published.find({**choices, "backbone": "resnet12"}, {"ways": 20, "shots": 5}) is None
