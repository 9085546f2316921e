"""The keys of `result.json`, each named once.

A number of a test has the key `KIND/MEASURE`: `test/acc`, `target/mse_ci95`. Of a test on several data sets that is the mean over
the sets, and the number of one has the key `KIND/SET/MEASURE`: `test/omniglot/acc`, `untrained/omniglot/acc_ci95`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarun import files
from metarun.errors import UserError
from metarun.ops.measures import ACCURACY, CI95, CONFUSION, ERROR, MEDIAN_ERROR
from metarun.runs import contents
from metarun.text import shown_path

DAMAGED = "delete it, and the run's own command tests again and writes it"  # what to do about one
MOST_NUMBERS = 2**28  # of one image; more are damage, and one such image takes the machine's memory

# Kinds: what a number was measured on or with.
TRAIN = "train"  # the last training stage; an earlier one has its name in this place
VALIDATION = "val"  # the validation tasks or images, on which weights are chosen
TEST = "test"  # episodes of the test classes
UNTRAINED = "untrained"  # the same episodes, with the weights drawn from the seed
BEFORE_TRAINING = (
    "before_training"  # the same, before any training of this run, with the pretrained weights that the backbone brings
)
CHANCE = "chance"  # a guess
TARGET = "target"  # the target's test images
CHECKPOINT = "checkpoint"  # the weights that were given

BASELINES = {UNTRAINED: "untrained", BEFORE_TRAINING: "before meta-training"}  # as tables name them

# Measures.
ERRORS = (ERROR, MEDIAN_ERROR)  # infinite where predictions are no numbers
MEASURES = (ACCURACY, ERROR)
EPISODES = "episodes"
AFTER_INNER_STEPS = "after_inner_steps"
CURVES = "curves"
POINTS = "points"  # where the points of the curves lie, `at`, and what they are, `name`; absent where they are counted
CONTINUAL = "continual"  # of a test on classes that arrive one after the other
VALIDATION_ACCURACY, VALIDATION_ERROR = f"{VALIDATION}/{ACCURACY}", f"{VALIDATION}/{ERROR}"
VALIDATION_MEDIAN = f"{VALIDATION}/{MEDIAN_ERROR}"  # of the episodes of a validation
SCORE = f"{VALIDATION}/score"  # of the selected weights, higher is better; absent where nothing was chosen

# Numbers of a training.
TRAIN_STEPS = f"{TRAIN}/steps"
TRAIN_SECONDS = f"{TRAIN}/seconds"
TASKS_PER_SECOND = f"{TRAIN}/tasks_per_second"
ITEMS_PER_SECOND = f"{TRAIN}/items_per_second"  # in its place, of a training on batches of labelled items
SELECTED_STEP = f"{TRAIN}/selected_step"  # of the best weights

# Numbers of a meta-test.
TEST_ACCURACY, TEST_ERROR = f"{TEST}/{ACCURACY}", f"{TEST}/{ERROR}"
TEST_EPISODES = f"{TEST}/{EPISODES}"
TEST_MEDIAN = f"{TEST}/{MEDIAN_ERROR}"
TEST_DIVERGED = f"{TEST}/diverged"  # how many episodes did, see `ops.metrics.regression_summary`
TEST_CURVES, TEST_POINTS = f"{TEST}/{CURVES}", f"{TEST}/{POINTS}"
TEST_AFTER_INNER_STEPS = f"{TEST}/{AFTER_INNER_STEPS}"
WORST_CLASS = "worst_class_acc"  # the mean over the episodes of the accuracy of the class that fared worst
FIFTH_PERCENTILE = "acc_p05"  # of the episodes
UNKNOWN = "unknown"  # of a test with queries of unknown classes
SETS = "sets"  # under `test/`: the data sets that were tested on, each described; in the protocol how each was
CALIBRATION = "calibration"  # of a test: the temperature, and scores of the probabilities with and without it
OF_SINGLE_IMAGES = "of_single_images"  # a temperature and thresholds for them, where episodes are predicted otherwise

# Numbers of a target, of the largest training subsets unless it is the curve.
TARGET_ACCURACY = f"{TARGET}/{ACCURACY}"
TARGET_CURVE = (
    f"{TARGET}/curve"  # a point for each size of training subsets: measures, `train_images`, `test_images`, `over`
)
TARGET_CONFUSION = f"{TARGET}/{CONFUSION}"
TARGET_TEST_IMAGES = f"{TARGET}/test_images"
TARGET_OVER = f"{TARGET}/over"  # what the interval is over
TARGET_AGREE = f"{TARGET}/agree"  # whether the repeats all agree: then it is over the test images of one
TARGET_INTERVAL = f"{TARGET}/interval"  # the same in words
TARGET_CLASSES = f"{TARGET}/classes"
TARGET_CHANCE = f"{TARGET}/chance"  # the share of the commonest class
TARGET_DIVISION = f"{TARGET}/division"  # where the test images come from
TARGET_COPIES = (
    f"{TARGET}/copied_test_images"  # of each repeat: the test images with the same pixels as a training image
)
TARGET_PREDICTIONS = f"{TARGET}/predictions"
TARGET_CLASSIFIER = f"{TARGET}/classifier"
TARGET_VALUES = f"{TARGET}/values"  # of a kept result: the accuracies [sizes][repeats]
TARGET_SECONDS = f"{TARGET}/seconds"

# Of the weights that were given.
CHECKPOINT_STEP = f"{CHECKPOINT}/step"
CHECKPOINT_DIGEST = f"{CHECKPOINT}/sha256"
CHECKPOINT_DATA = f"{CHECKPOINT}/data"  # the data of their run that a test of theirs was not on

# What the run was.
PROTOCOL, DATA, CONTENT, CHOICES, COMMAND, STAGES = "protocol", "data", "target/data", "choices", "command", "stages"
OVERRIDES = "overrides"  # as they were typed
GIT_COMMIT = "git_commit"
NOTHING = "nothing"  # in the protocol: what an encoder of drawn weights was pretrained on
SEEN = "seen"  # in the protocol: which images each training stage saw
SELECTED_BY = "selected_by"  # in the protocol
NOT_TRAINED = "no selection: nothing was trained"  # of the weights, under `selected_by`
VALIDATED_ONCE = "no selection: validated once, after the last step"
TRANSDUCTIVE = "transductive"  # in the protocol: whether a prediction depends on other queries; see `mode`
MADE_BY = "made_by"  # in a checkpoint, and in the result of its training: the digest of all that this depends on
SECONDS = "seconds"  # that the run took, of its last sitting
FILES = "files"  # the SHA-256 of files that were written with these numbers, by name
LEARNER = "learner"  # what `metarun.load` builds it from


def stored(folder: Path) -> dict[str, Any]:
    """Reads the result of the finished run in a folder.

    Raises:
        UserError: Its file is damaged.
    """
    return restored(files.read_json(folder / contents.RESULT, DAMAGED))


def restored(values: dict[str, Any]) -> dict[str, Any]:
    """A result as it was before JSON, which has null for an infinite error, with the results of all steps in it."""
    return {
        name: restored(value)
        if isinstance(value, dict)
        else math.inf
        if value is None and name.rpartition("/")[2] in ERRORS
        else value
        for name, value in values.items()
    }


OF_CONFIGS = ("--config-dir", "--config-path", "--config-name")  # the options by which Hydra finds configs


def begun(found: dict[str, Any]) -> str:
    """What a further command on a run begins with: `metarun`, and where its own command found its configs.

    Nothing else is taken from the command: others may have written the result, and what is printed here is pasted.

    Args:
        found: Its result; one of an earlier version may not say which words are overrides, and then no option is known.
    """
    command, overrides = found.get(COMMAND), found.get(OVERRIDES)
    if not isinstance(command, str) or not isinstance(overrides, list):
        return "metarun"
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        return "metarun"
    options = words[1 : len(words) - len(overrides)]
    pairs = [options[at : at + 2] for at, word in enumerate(options[:-1]) if word in OF_CONFIGS]
    return shlex.join(["metarun", *(word for pair in pairs for word in pair)])


def intact(folder: Path, found: dict[str, Any]) -> bool:
    """Whether the files of a finished run that its result tells of are those that were written with it.

    Args:
        folder: The run's.
        found: Its result; one of an earlier version tells of none.

    Raises:
        UserError: One of them cannot be read.
    """
    told = found.get(FILES, {})
    try:
        return isinstance(told, dict) and all(
            (folder / name).is_file() and files.sha256(folder / name) == digest for name, digest in told.items()
        )
    except OSError as error:
        raise files.unread(Path(error.filename or folder), error, DAMAGED) from error


def learner(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the result of a run says of its learner, where it has the parts that every such has.

    Args:
        folder: The run's.
        found: Its result.

    Raises:
        UserError: A part is missing, or is of another type.
    """
    told = found[LEARNER]

    def part(whole: Any, name: str) -> Any:
        return whole.get(name) if isinstance(whole, dict) else None

    network = part(part(told, "blueprint"), "backbone")
    if not isinstance(part(network, "_target_"), str) or not isinstance(part(told, "preprocessing"), dict):
        raise UserError(f"{shown_path(folder / contents.RESULT)}: is damaged (its {LEARNER} lacks a part); {DAMAGED}")
    return dict(told)


def check_reading(values: dict[str, Any], dimensions: int) -> None:
    """Raises `ValueError` for values of a file that say how images are read, and that no data set has of items of so many dimensions."""
    size, channels, shape = values["image_size"], values["channels"], values["input_shape"]
    if not all(type(number) is int and 0 < number < 2**16 for number in (size, *shape)) or len(shape) != dimensions:
        raise ValueError(f"images of {size} pixels as {shape}")
    if type(channels) is not int or channels not in (1, 3):
        raise ValueError(f"images of {channels} channels")
    if max(channels * size**2, math.prod(shape)) > MOST_NUMBERS:
        raise ValueError(f"images of {size} pixels as {shape}")
    numbers = [*values["mean"], *values["deviation"], *(values["values"] or ())]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("a mean, a deviation or a range that is no finite number")
    if {len(values["mean"]), len(values["deviation"])} - {1, channels} or min(values["deviation"]) <= 0:
        raise ValueError(f"a mean and a deviation of other than {channels} channels")
    if values["values"] and (len(values["values"]) != 2 or values["values"][0] >= values["values"][1]):
        raise ValueError(f"a range of {values['values']}, which is not two numbers of which the second is larger")
    if not isinstance(values["inverted"], bool):
        raise ValueError(f"inverted {values['inverted']}, which is neither true nor false")


def key(kind: str, measure: str) -> str:
    """Writes the key of a measure, such as `test/acc`."""
    return f"{kind}/{measure}"


def mode(result: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The part of the protocol that says how queries were predicted, `transductive` and `assumes_balanced_queries`.

    Args:
        result: What `result.json` holds.
        kind: What was tested: `TARGET`, of which a run that has a meta-test too says it apart, or `TEST`.
    """
    protocol: Mapping[str, Any] = result[PROTOCOL]
    own: Mapping[str, Any] = protocol.get(TARGET, protocol) if kind == TARGET else protocol
    return own


def half_of(number: str) -> str:
    """Writes the key of half of a number's 95% interval, such as `test/acc_ci95`."""
    return f"{number}{CI95}"


def lost_of(number: str) -> str:
    """Writes the key of how many tasks have no finite value of a measure, such as `test/mae_not_finite`."""
    return f"{number}_not_finite"


def of_set(kind: str, name: str) -> str:
    """The kind of a number of one data set of several; of the only one, which has no name, the kind itself."""
    return f"{kind}/{name}" if name else kind


def of_one(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes from a result what a test on one of its data sets alone would have."""
    own: dict[str, Any] = {}
    for kind in (TEST, *BASELINES, CHANCE):
        begins = f"{of_set(kind, name)}/"
        own |= {
            key(kind, each.removeprefix(begins)): value for each, value in result.items() if each.startswith(begins)
        }
    protocol = result[PROTOCOL]
    told = protocol[SETS][name]
    return {
        **{each: value for each, value in result.items() if each.partition("/")[0] not in (TEST, *BASELINES, CHANCE)},
        **own,
        DATA: result[key(TEST, SETS)][name],
        PROTOCOL: {**protocol, "split": None, TEST: told["task"]},
    }


def tested(result: Mapping[str, Any]) -> str | None:
    """The key of the run's main test number, of a meta-test before one of a target; None for a run without a test."""
    kinds = ((kind, measure) for kind in (TEST, TARGET) for measure in MEASURES)
    return next((found for kind, measure in kinds if (found := key(kind, measure)) in result), None)
