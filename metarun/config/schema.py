"""The schema of a run: every key that a config can have, its type, its range and its meaning. It imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from metarun.config.task_schema import SIZES, Noise, Task, TestTaskChange, TrainTaskChange
from metarun.config.types import (
    Doc,
    Example,
    FilePath,
    Ge,
    Given,
    Interval,
    Len,
    NameOrPath,
    PositiveFloat,
    PositiveInt,
    Seed,
    Unit,
)

MOST_EPISODES = 10_000_000  # days of work; a score of each is held in memory


@dataclass
class TrainSettings:
    """Meta-training: a budget in steps, or in seconds of training if `max_seconds` comes first."""

    steps: Annotated[int, Ge(0), Unit("steps"), Doc("The length of training; 0 tests the method untrained.")] = 1000
    max_seconds: (
        Annotated[float, Ge(0), Unit("seconds"), Doc("The time after which training ends early; null is no limit.")]
        | None
    ) = None
    tasks_per_step: Annotated[
        int, Ge(1), Unit("tasks, or images"), Doc("The batch of a step: tasks, of a method on ordinary batches images.")
    ] = 1
    task: TrainTaskChange = field(default_factory=TrainTaskChange)
    noise: Noise = field(default_factory=Noise)
    optimizer: Annotated[
        dict[str, Any], Given(("params",)), Doc("The optimiser of the outer loop; `optimizer=` chooses one.")
    ] = field(default_factory=dict)
    schedule: Annotated[
        dict[str, Any], Given(("optimizer",)), Doc("The course of the learning rate; `schedule=` chooses one.")
    ] = field(default_factory=dict)
    clip_norm: (
        Annotated[float, Ge(0), Doc("The largest norm of all gradients together; null clips no norm.")] | None
    ) = None
    clip_value: Annotated[float, Ge(0), Doc("The largest size of each gradient; null clips no value.")] | None = None
    validate_every: Annotated[int, Ge(1), Unit("steps"), Doc("The steps from one validation to the next.")] = 200
    validate_episodes: Annotated[
        int, Interval(ge=1, le=MOST_EPISODES), Unit("episodes"), Doc("The episodes of a validation.")
    ] = 100
    validate_on: Annotated[
        str,
        Literal["episodes", "images"],
        Example(beside="algo=baseline"),
        Doc("Validation by episodes of the validation classes, or by held-out images of the training classes."),
    ] = "episodes"
    patience: (
        Annotated[
            int,
            Ge(1),
            Unit("validations"),
            Doc("Early stopping: training ends after so many validations without a better one; null never."),
        ]
        | None
    ) = None
    log_every: Annotated[int, Ge(1), Unit("steps"), Doc("The steps from one line of metrics to the next.")] = 20
    save_every: (
        Annotated[int, Ge(1), Unit("steps"), Doc("The steps from one checkpoint to the next; null goes by time.")]
        | None
    ) = None
    save_seconds: Annotated[
        float, Ge(0), Unit("seconds"), Doc("The time from one checkpoint to the next, where steps do not say it.")
    ] = 60.0


OF_ONE_SET = Annotated[
    int | None, Ge(1), Doc("Of the tasks of this data set alone, where they differ from the others' (`test.task`).")
]


@dataclass
class Usual:
    """What a preset sets for parts that were not chosen: a choice of `schedule=`, or the setting itself, comes before it."""

    schedule: Annotated[
        dict[str, Any],
        Given(("optimizer",)),
        Doc("The schedule where none is chosen."),
    ] = field(default_factory=lambda: {"_target_": "metarun.engine.schedules.Constant"})
    downsample: Annotated[
        str, Literal["pool", "stride"], Doc("How Conv4 halves the resolution where nothing else is said.")
    ] = "pool"


@dataclass
class TestSettings:
    """Meta-testing, once, of the weights that were best on validation."""

    episodes: Annotated[
        int,
        Interval(ge=2, le=MOST_EPISODES),
        Unit("episodes"),
        Doc("The test episodes that the result is a mean over."),
    ] = 1000
    baseline_episodes: Annotated[
        int,
        Interval(ge=0, le=MOST_EPISODES),
        Unit("episodes"),
        Doc("The test episodes of the same method untrained; 0 leaves it out."),
    ] = 200
    unknown_ways: Annotated[
        int,
        Ge(0),
        Unit("classes"),
        Doc(
            "The classes of a further test whose queries are in no support set, to tell unknown images; 0 leaves it out."
        ),
    ] = 0
    views: Annotated[
        int,
        Interval(ge=1, le=1000),
        Unit("copies"),
        Example(beside="augment=standard"),
        Doc(
            "The copies of a test task whose probabilities are averaged: the task itself, and others with its images changed by "
            "`augment`. Training is changed by it too. Unknown classes are told, and predictions made, without copies."
        ),
    ] = 1
    task: TestTaskChange = field(default_factory=TestTaskChange)
    data: Annotated[
        dict[str, Any],
        Given(beside=dict.fromkeys(SIZES, OF_ONE_SET), many=True),
        Doc(
            "The data sets to test on, each in a test of its own: test.data=[omniglot,caltech101]; none is the test classes of "
            "what is trained on. test.data.NAME has the settings of one, and ways, shots and queries of its tasks."
        ),
    ] = field(default_factory=dict)


@dataclass
class ContinualSettings:
    """Test classes that arrive one after the other, for recipes with such a stage."""

    classes: (
        Annotated[int, Ge(2), Unit("classes"), Doc("The classes of a sequence; null is all classes of the test split.")]
        | None
    ) = None
    images: Annotated[
        int, Ge(1), Unit("images a class"), Doc("The images of a class that are learned, one by one.")
    ] = 15
    test_images: Annotated[int, Ge(1), Unit("images a class"), Doc("The images of a class that are tested on.")] = 5
    orders: Annotated[int, Ge(2), Unit("orders"), Doc("The orders of the classes that the result is a mean over.")] = 10
    points: Annotated[
        int, Ge(1), Unit("points"), Doc("The points of the curve over classes, evenly spaced up to the last class.")
    ] = 10
    rates: Annotated[
        list[PositiveFloat],
        Len(1),
        Example("[0.01, 0.001]"),
        Doc("Learning rates of the online head; the best on sequences of validation classes is taken."),
    ] = field(default_factory=lambda: [0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001])
    optimizer: Annotated[str, Literal["adam", "sgd"], Doc("What moves the online head, an image a step.")] = "adam"


@dataclass
class PretrainSettings:
    """The method that trains the backbone before the run's own does, in recipes with such a stage."""

    algo: Annotated[dict[str, Any], Given(("backbone", "spec")), Doc("The method of the pretraining.")] = field(
        default_factory=dict
    )
    train: TrainSettings = field(default_factory=TrainSettings)
    backbone: Annotated[dict[str, Any], Doc("The settings that the pretraining requires of the run's backbone.")] = (
        field(default_factory=dict)
    )


@dataclass
class TargetSettings:
    """Where what was learned is put to use: small labelled subsets of a data set, and test images apart from them."""

    data: Annotated[dict[str, Any], Given(), Doc("The target's data set; `target=` chooses one.")] = field(
        default_factory=dict
    )
    train_images: Annotated[
        Any,
        PositiveInt | Annotated[list[PositiveInt], Len(1)] | None,
        Unit("images"),
        Doc("The labelled images of a subset: a number, a list for a learning curve ([5, 10, 20]), or null for all."),
    ] = None
    test_images: (
        Annotated[int, Ge(1), Unit("images"), Doc("The test images of a repeat, a stratified draw; null is all.")]
        | None
    ) = None
    min_images: Annotated[
        int, Ge(0), Unit("images"), Doc("The fewest images of a class; classes with fewer are left out.")
    ] = 0
    repeats: Annotated[
        int,
        Ge(1),
        Unit("subsets"),
        Doc("The subsets of each size, each of a new division if the data have no test part."),
    ] = 10
    subset_seed: Annotated[
        Seed,
        Doc("The seed of the subsets. It is not the run's, so that all runs meet the same subsets."),
    ] = 0


@dataclass
class HardwareSettings:
    """Where and how it is computed."""

    device: Annotated[
        str, Literal["auto", "cpu", "cuda", "mps"], Doc("The device; auto takes CUDA where there is one, else the CPU.")
    ] = "auto"
    autocast: (
        Annotated[str, Literal["bfloat16"], Doc("The type of mixed precision; null computes in float32.")] | None
    ) = None
    tf32: Annotated[bool, Doc("Whether float32 products on CUDA may round to 10 bits of mantissa.")] = False
    channels_last: (
        Annotated[bool, Doc("The memory order of images between layers; null takes the one that is faster.")] | None
    ) = None
    processes: (
        Annotated[
            int,
            Interval(ge=1, le=1024),
            Doc(
                "The processes that share the tasks of a step; null: one a core, but at most 8, for long trainings on a CPU, else 1."
            ),
        ]
        | None
    ) = None
    threads: (
        Annotated[
            int,
            Interval(ge=1, le=1024),
            Doc("The threads of a CPU operation; null shares the cores out among the processes."),
        ]
        | None
    ) = None
    vectorize: (
        Annotated[
            bool,
            Doc(
                "Tasks by vmap; null does so on CUDA and for backbones without convolutions, but for backbone.norm=running and methods "
                "that cannot."
            ),
        ]
        | None
    ) = None
    record: (
        Annotated[
            bool, Doc("Gradients from a traced step, on CUDA from a CUDA graph; null: on CPUs, where no bit changes.")
        ]
        | None
    ) = None
    task_chunk: (
        Annotated[
            int, Ge(1), Unit("tasks"), Doc("The tasks whose graph is held at once; null is 1 in a loop, all by vmap.")
        ]
        | None
    ) = None


@dataclass
class RecipeSettings:
    """The stages of a run, in order: a `metarun.stages.Stage` each, as a node or as the dotted path of its class."""

    stages: Annotated[list[Any], Doc("The stages, in order: nodes, or dotted paths of classes.")] = MISSING
    source: Annotated[
        bool,
        Doc("Whether a source (`data=`) is trained on; without one the backbone starts untrained on the target."),
    ] = True
    run: Annotated[str, Doc("The function that carries the config out.")] = "metarun.runs.carry_out.run"


ENCODING = {
    "dtype": Annotated[str, Literal["float16", "float32"], Doc("The type that vectors are kept in.")],
    "views": Annotated[
        int,
        Interval(ge=1, le=100),
        Unit("vectors an item"),
        Doc("The vectors of an item: its own, and those of changed copies, among which training draws."),
    ],
    "batch_size": Annotated[
        int | None,
        Ge(1),
        Unit("items"),
        Doc("The items that are encoded together; null is 16 on a CPU and 256 on a GPU."),
    ],
    "transform": Annotated[
        str,
        Literal["un", "l2n", "cl2n"],
        Doc("What is done to vectors: nothing, unit length, or the training items' mean taken off and unit length."),
    ],
    "from": Annotated[
        FilePath | None,
        Example("outputs/RUN", beside="encoder=run"),
        Doc("The run whose trained backbone encodes, with `encoder=run`."),
    ],
    "saw": Annotated[
        str | None, Doc("What the encoder was pretrained on; null is what a library says of its own weights.")
    ],
}


ENCODING_DEFAULTS = {"dtype": "float16", "views": 1, "batch_size": None, "transform": "un", "saw": None}


BACKBONE_FROM = Annotated[FilePath | None, Doc("A run whose trained backbone this one starts from; null starts anew.")]


@dataclass
class Config:
    """A run."""

    algo: Annotated[dict[str, Any], Given(("backbone", "spec")), Doc("The method; `algo=` chooses one.")] = field(
        default_factory=dict
    )
    data: Annotated[dict[str, Any], Given(), Doc("The data set that is trained on; `data=` chooses one.")] = field(
        default_factory=dict
    )
    unsupervised: Annotated[
        dict[str, Any],
        Given(("source",)),
        Doc("How training tasks are made without labels, if they are; `unsupervised=` chooses a way."),
    ] = field(default_factory=dict)
    backbone: Annotated[
        dict[str, Any],
        Given(("input_shape",), {"from": BACKBONE_FROM}),
        Doc("The network that the method trains; `backbone=` chooses one."),
    ] = field(default_factory=lambda: {"from": None})
    encoder: Annotated[
        dict[str, Any],
        Given(("origin",), ENCODING, ENCODING_DEFAULTS),
        Example(beside="encoder=efficientnet_lite0"),
        Doc("What turns the items of the data sets into vectors, once; `encoder=` chooses one."),
    ] = field(default_factory=dict)
    wrapper: Annotated[
        dict[str, Any],
        Given(("method", "validation")),
        Doc("What changes the training of the method, or its tasks, if anything."),
    ] = field(default_factory=dict)
    augment: Annotated[dict[str, Any], Given(), Doc("Random changes of training images; `augment=` chooses them.")] = (
        field(default_factory=dict)
    )
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    transfer: Annotated[
        dict[str, Any], Given(("learner", "source")), Doc("How the target is learned; `transfer=` chooses a way.")
    ] = field(default_factory=dict)
    task: Task = field(default_factory=Task)
    train: TrainSettings = field(default_factory=TrainSettings)
    test: TestSettings = field(default_factory=TestSettings)
    continual: ContinualSettings = field(default_factory=ContinualSettings)
    # Behind `train.schedule`, which may stand for its own and is what was typed.
    usual: Usual = field(default_factory=Usual)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    name: (
        Annotated[str, Doc("The folder below `outputs` that the run lies in, no path; null is <data>-<algo>.")] | None
    ) = None
    seed: Annotated[Seed, Doc("The seed of weights, tasks and every other draw.")] = 0
    resume: Annotated[
        bool, Doc("Whether the same command goes on with its run, or shows its result; false starts over beside it.")
    ] = True
    checkpoint: (
        Annotated[
            FilePath,
            Doc("The run folder or weights that `recipe=test` tests, and `predict` and `export` use."),
            Example(beside="recipe=test"),
        ]
        | None
    ) = None
    items: (
        Annotated[
            NameOrPath,
            Doc(
                "What `recipe=predict` classifies: images as `images` names them, or texts: a file with one in each line, a table, "
                "JSON lines, a folder of .txt files, or - for one a line on stdin."
            ),
            Example(beside="recipe=predict checkpoint=outputs/RUN"),
        ]
        | None
    ) = None
    images: (
        Annotated[
            NameOrPath,
            Doc(
                "The images that `recipe=predict` classifies: a file, a folder, a pattern, or - for a list of paths on stdin. "
                "`recipe=export` compares its files on them."
            ),
            Example(beside="recipe=predict checkpoint=outputs/RUN"),
        ]
        | None
    ) = None
    support: (
        Annotated[
            FilePath,
            Doc(
                "Examples of the classes for `recipe=predict` and `export`: class folders, or a table of file and label; null: the run's."
            ),
            Example(beside="recipe=export checkpoint=outputs/RUN"),
        ]
        | None
    ) = None
    unknown: (
        Annotated[
            str,
            Doc(
                "Which images are of no known class: off, auto by the run's threshold, max_probability, energy or "
                "prototype_distance by its threshold for that certainty, or the least probability of a known one; null is off."
            ),
            Example(beside="recipe=predict checkpoint=outputs/RUN"),
        ]
        | None
    ) = None
    format: Annotated[
        str,
        Literal["onnx", "torch"],
        Doc("The file that `recipe=export` writes: ONNX for onnxruntime, or a program of torch.export for PyTorch."),
        Example(beside="recipe=export checkpoint=outputs/RUN"),
    ] = "onnx"
    int8: Annotated[
        bool,
        Doc("Whether `recipe=export` writes the ONNX file with weights in eight bits too."),
        Example(beside="recipe=export checkpoint=outputs/RUN"),
    ] = False
    runs: Annotated[
        Any,
        FilePath | list[FilePath] | None,
        Doc("The folder of runs, or a list of folders, that `recipe=report` reports on and `recipe=runs` lists."),
        Example(beside="recipe=report"),
    ] = None
    outputs: Annotated[FilePath, Doc("The folder that run folders lie in.")] = "outputs"
