"""What a run learned as files that other programs run, compared with what they were made of."""

from __future__ import annotations

import functools
import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hydra.utils import get_class
from PIL import Image
from shell import done, killed_at_files, make_images, metarun, one_line
from torch import Tensor
from torch.export import Dim
from torch.onnx._internal.exporter._registration import ONNXRegistry

import metarun.export as metarun_export
from metarun.algos.deepbdc import DeepBDC
from metarun.algos.protonet import ProtoNet
from metarun.backbones.conv4 import Conv4
from metarun.backbones.vit import ViT
from metarun.core import Algorithm, Backbone, Batch, Spec
from metarun.data.decoding import read
from metarun.errors import UserError
from metarun.export import exported, graphs
from metarun.export.exported import Exported, Input
from metarun.inference.preprocessing import Preprocessing
from metarun.target.base import Own, TargetMethod
from metarun.target.features import LinearProbe, LogisticRegression, NearestCentroid
from metarun.target.finetuning import FineTuning
from metarun.target.prompts import LoRA, Prompts

WAYS, SHAPE = 3, (1, 16, 16)
ALONE = """
import sys
import numpy, onnxruntime
for line in sys.stdin:
    folder = line.removesuffix("\\n")
    session = onnxruntime.InferenceSession(f"{folder}/file.onnx")
    with numpy.load(f"{folder}/inputs.npz") as given:
        found = session.run(None, {name: given[name] for name in given.files})[0]
    numpy.save(f"{folder}/outputs.npy", found)
    assert not {"torch", "metarun"} & set(sys.modules)
    print("done", flush=True)
"""
SCRIPT = (Path(metarun_export.__file__).parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
METHODS = [
    "protonet.ProtoNet", "matchingnet.MatchingNet", "relationnet.RelationNet", "dn4.DN4", "feat.FEAT", "simpleshot.SimpleShot",
    "r2d2.R2D2", "metaoptnet.MetaOptNet", "maml.MAML", "anil.ANIL", "protomaml.ProtoMAML", "cavia.CAVIA", "baseline.Baseline",
    "leo.LEO", "metasgd.MetaSGD",
]  # fmt: skip
COMPARING = [*METHODS[:4], "feat.FEAT", "r2d2.R2D2"]  # queries with the support set, without inner steps
# CAVIA's usual steps from these weights give scores of hundreds, whose rounding would exceed what a file may differ by.
SETTINGS: dict[str, dict[str, Any]] = {"baseline.Baseline": {"head_epochs": 5}, "cavia.CAVIA": {"inner_lr": 0.1}}


@pytest.fixture(scope="module", autouse=True)
def operations() -> Iterator[None]:
    """What torch's converter reads in the source text of every operation that it knows, for each file anew, is here read once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def prepare(x: Tensor) -> Tensor:
    return (x.float() - 100) / 60


class Conv2(Conv4):
    """The first two blocks of Conv4, to which a graph of two more would only add the same operations again."""

    def __init__(self, norm: str) -> None:
        super().__init__(SHAPE, channels=8, norm=norm)
        del self.blocks[2:]
        del self.widths[2:]
        self.features = 8 * 4 * 4


def learner(name: str, norm: str, backbone: Backbone | None = None, **settings: Any) -> Algorithm:
    """A method on a small network, with weights and averages that are not those of the start."""
    torch.manual_seed(0)
    if backbone is None:
        # DN4 adds up the similarities of all positions: of larger maps their rounding would exceed what a file may differ by.
        backbone = Conv4(SHAPE, channels=8, norm=norm) if name == "dn4.DN4" else Conv2(norm)
    built: Algorithm = get_class(f"metarun.algos.{name}")(
        backbone, Spec(SHAPE, "classification", WAYS, None, 2), **settings
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in built.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=draw))
        for key, value in built.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                value.add_(torch.rand(value.shape, generator=draw))
    return built.eval()


def examples() -> Batch:
    """Classes of unequal sizes."""
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    return Batch(prepare(torch.from_numpy(pixels(len(y), 5))), y, torch.zeros_like(y))


def exported_classifier(
    method: TargetMethod, form: str = "onnx", temperature: float = 1.7
) -> tuple[exported.Exported, Any]:
    torch.manual_seed(0)
    function = graphs.of_classifier(method.fit(examples(), WAYS).eval(), prepare, temperature)
    images = Input("images", "batch", Dim("batch", min=1), SHAPE)
    told = {"classes": ["a", "b", "c"]}
    return exported.export(function, [images], [pixels(100)], form, told, temperature), function


Alone = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """What onnxruntime says of each of some inputs of a file, in a process without torch or metarun that serves all tests."""
    with subprocess.Popen(
        [sys.executable, "-c", ALONE], env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(content: bytes, folder: Path, *inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert process.stdin is not None
            assert process.stdout is not None
            (folder / "file.onnx").write_bytes(content)
            found = []
            for given in inputs:
                np.savez(folder / "inputs.npz", **given)
                print(folder, file=process.stdin, flush=True)
                assert process.stdout.readline() == "done\n"
                found.append(np.load(folder / "outputs.npy"))
            return found

        yield run


def close(alone: Alone, content: bytes, function: Any, folder: Path) -> None:
    """The file agrees with the function on other images, and on one alone: no image knows the others."""
    images = pixels(100, 9)
    with torch.no_grad():
        wanted = function(torch.from_numpy(images)).numpy()
    assert wanted.std(0).max() > 3e-4  # not the same for all, by more than the tolerance
    found, first = alone(content, folder, {"images": images}, {"images": images[:1]})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(first, wanted[:1], atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_a_fixed_support_set_is_a_classifier_that_onnxruntime_runs_alone(
    name: str, alone: Alone, tmp_path: Path
) -> None:
    made, function = exported_classifier(Own(learner(name, "batch", **SETTINGS.get(name, {}))))
    close(alone, made.content, function, tmp_path)


@pytest.mark.parametrize("norm", ["running", "group", "support", "none"])  # with batch they are exported above
@pytest.mark.parametrize("name", ["maml.MAML", "relationnet.RelationNet"])  # the second has norms of its own, too
def test_every_norm_is_exported(name: str, norm: str, alone: Alone, tmp_path: Path) -> None:
    made, function = exported_classifier(Own(learner(name, norm)))
    close(alone, made.content, function, tmp_path)


sgd = functools.partial(torch.optim.SGD, lr=0.05)


TARGETS: dict[str, tuple[type[TargetMethod], dict[str, Any]]] = {
    "all": (FineTuning, {"optimizer": sgd, "steps": 3, "batch_size": 4}),
    "linear_probe": (LinearProbe, {"steps": 5}),
    "logistic_regression": (LogisticRegression, {}),
    "nearest_centroid": (NearestCentroid, {}),
    "lora": (LoRA, {"optimizer": sgd, "steps": 3, "batch_size": 4}),
}


@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("way", TARGETS)
def test_a_classifier_of_a_target_is_exported(way: str, form: str, alone: Alone, tmp_path: Path) -> None:
    cls, settings = TARGETS[way]
    made, function = exported_classifier(cls(learner("protonet.ProtoNet", "batch"), **settings), form)
    if form == "onnx":
        close(alone, made.content, function, tmp_path)
        return
    loaded = torch.export.load(io.BytesIO(made.content)).module()
    images = torch.from_numpy(pixels(7, 9))
    torch.testing.assert_close(loaded(images), function(images), atol=1e-4, rtol=0)


def test_a_program_takes_images_with_channels_last_in_memory() -> None:
    """As a library reads them from a file: the views of what DeepBDC does with feature maps need the other order."""
    shape = (3, 16, 16)
    torch.manual_seed(0)
    method = Own(DeepBDC(Conv4(shape, channels=8, norm="running"), Spec(shape, "classification", WAYS, None, 2)).eval())
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, *shape), dtype=np.uint8))
    known = Batch(prepare(images[:6]), torch.arange(WAYS).repeat_interleave(2), torch.zeros(6, dtype=torch.int64))
    function = graphs.of_classifier(method.fit(known, WAYS).eval(), prepare)
    made = exported.export(
        function, [Input("images", "batch", Dim("batch", min=1), shape)], [images.numpy()], "torch", {}
    )
    last = images.numpy().transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    np.testing.assert_allclose(made.run(last), function(images).numpy(), atol=1e-4)


@pytest.mark.parametrize("way", ["own", "all", "lora", "prompts"])
def test_a_transformer_is_exported(way: str, alone: Alone, tmp_path: Path) -> None:
    """Its class token, and prompts, are joined to the tokens of any number of images."""
    network = ViT(SHAPE, patch_size=4, width=16, depth=2, heads=2)
    on = learner("protonet.ProtoNet", "none", network)
    cls, settings = {**TARGETS, "prompts": (Prompts, TARGETS["lora"][1])}.get(way, (Own, {}))
    made, function = exported_classifier(cls(on, **settings))
    close(alone, made.content, function, tmp_path)


def test_a_support_set_that_is_fixed_is_computed_once() -> None:
    """Neither its images nor the steps on it are in the file."""
    made, _ = exported_classifier(Own(learner("maml.MAML", "support", inner_steps=5)))
    graph = onnx.load_from_string(made.content).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 2  # the network, once


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        *(("running", name) for name in COMPARING),
        ("support", "protonet.ProtoNet"),  # of features
        ("support", "relationnet.RelationNet"),  # of feature maps, and in the method's own network
    ],
)
def test_a_method_without_a_support_set_takes_one_along(name: str, norm: str, alone: Alone, tmp_path: Path) -> None:
    function = graphs.of_learner(learner(name, norm), prepare, WAYS)
    shots = Dim("shots", min=1)
    inputs = [
        Input("support_images", "3*shots", WAYS * shots, SHAPE),
        Input("support_labels", "3*shots", WAYS * shots, (), "int64"),
        Input("images", "batch", Dim("batch", min=1), SHAPE),
    ]
    made = exported.export(function, inputs, [pixels(6), np.arange(3).repeat(2), pixels(20)], "onnx", {})
    given = [
        {"support_images": pixels(3 * shot, 7), "support_labels": np.arange(3).repeat(shot), "images": pixels(9, 8)}
        for shot in (1, 4)  # other than those that it was traced with
    ]
    for sets, found in zip(given, alone(made.content, tmp_path, *given), strict=True):
        with torch.no_grad():
            wanted = function(*map(torch.from_numpy, sets.values())).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_method_that_does_otherwise_with_one_shot_is_refused_without_a_support_set(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    """A graph has what the method did with the number of rows with which it was traced, and nobody would see it of another."""
    _, images = run
    words = ["algo=deepbdc", "data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2",
             "train.steps=0", "test.episodes=4", "test.baseline_episodes=0", f"data.root={images}", f"outputs={tmp_path}"]  # fmt: skip
    done(*words, "name=made")
    (found,) = tmp_path.glob("made/*/result.json")
    command = ["recipe=export", f"checkpoint={found.parent}", f"outputs={tmp_path}", "format=torch"]
    told = "(3 support_images; it was traced with 6): what the method does depends on this number; support=FOLDER"
    one_line(metarun(*command), "DeepBDC cannot be exported", told)


def test_a_graph_of_one_number_of_images_is_refused() -> None:
    def of_many(images: Tensor) -> Tensor:
        shares = images.flatten(1).float().mean(1, keepdim=True) / 255
        both = torch.cat([shares, 1 - shares], 1)
        return both if images.shape[0] > 1 else both.flip(1)

    images = Input("images", "batch", Dim("batch", min=1), SHAPE)
    told = r"differ from those of recipe=predict .* \(1 images; it was traced with 100\): what the method does depends on this number$"
    with pytest.raises(UserError, match=told):
        exported.export(of_many, [images], [pixels(100)], "onnx", {})


def test_a_file_that_disagrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*parts: Any) -> Any:
        content, run = right(*parts)
        return content, lambda *arrays: run(*arrays) + np.float32(2e-4)

    right = exported.FORMATS["onnx"]
    monkeypatch.setitem(exported.FORMATS, "onnx", off)
    method = NearestCentroid(learner("protonet.ProtoNet", "running"))
    with pytest.raises(
        UserError, match=r"differ from those of recipe=predict by up to 0\.0002, and 0\.0001 is allowed"
    ):
        exported_classifier(method)  # by a temperature above 1, which magnifies no rounding
    assert exported_classifier(method, temperature=0.4)[0].difference == pytest.approx(2e-4, rel=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of ProtoNet on folders, and these folders."""
    root = tmp_path_factory.mktemp("run")
    images = make_images(root / "images")
    outcome = metarun(
        "algo=protonet", "data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2",
        "train.task.ways=4", "train.steps=2", "train.validate_every=2", "train.validate_episodes=4", "test.episodes=6",
        "test.baseline_episodes=0", f"data.root={images}", f"outputs={root}", "name=made",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (found,) = root.glob("made/*/result.json")
    return found.parent, images


@pytest.mark.parametrize("with_support", [True, False])
def test_a_file_is_held_against_what_predict_says(
    with_support: bool, run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not against the function that it was made of, whose way from pixels to the network may be another one."""
    folder, images = run
    usual = Preprocessing.inputs
    monkeypatch.setattr(Preprocessing, "inputs", lambda self, pixels, device: usual(self, pixels // 2, device))
    support = [f"support={images}"] if with_support else []
    outcome = metarun("recipe=export", f"checkpoint={folder}", *support, "format=torch", f"outputs={tmp_path}")
    one_line(outcome, "the file's probabilities differ from those of recipe=predict by up to 0.")


def test_the_command_writes_files_that_say_what_they_are(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, images = run
    command = ["recipe=export", f"checkpoint={folder}", f"support={images}", "int8=true", f"outputs={tmp_path}"]
    outcome = metarun(*command)
    assert outcome.status == 0, outcome.err
    (stored,) = tmp_path.glob("exports/*/result.json")
    numbers = json.loads(stored.read_text())
    assert numbers["export/classes"] == sorted(numbers["export/classes"])
    for name in ("classifier.onnx", "classifier.int8.onnx"):
        told = numbers["export/files"][name]
        assert told["bytes"] == (stored.parent / name).stat().st_size
        assert told["parameters"] > 0
        assert told["ms_an_image"] > 0
        assert 0 <= told["acc"] <= 1
        assert name in outcome.out
    assert numbers["export/files"]["classifier.onnx"]["largest_difference"] <= 1e-4
    model = onnx.load(stored.parent / "classifier.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["classes"] == numbers["export/classes"]
    assert shlex.split(metadata["command"]) == ["metarun", *command]
    assert metadata["image_size"] == 16
    assert metadata["channels"] == 3
    assert metadata["inputs"] == [{"name": "images", "dtype": "uint8", "shape": ["batch", 3, 16, 16]}]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    photos = sorted(map(str, images.glob("*/*/*.png")))[:4]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(stored.parent / "classifier.onnx"), *photos],
        check=True,
        capture_output=True,
        text=True,
    )
    for line, photo in zip(ran.stdout.splitlines(), photos, strict=True):
        assert line.startswith(photo)
        assert any(f" {name} " in line for name in metadata["classes"])
    before = (stored.parent / "classifier.onnx").read_bytes()
    again = metarun(*command)
    assert again.status == 0
    assert "nothing was computed" in again.out
    assert (stored.parent / "classifier.onnx").read_bytes() == before
    (stored.parent / "classifier.onnx").unlink()
    again = metarun(*command)
    assert again.status == 0
    assert "nothing was computed" not in again.out
    assert (stored.parent / "classifier.onnx").is_file()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_the_script_of_the_readme_gives_a_file_the_pixels_that_metarun_reads(
    mode: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of transparent images too, which are laid on white whatever colour they hide."""
    told = {"channels": str(channels), "image_size": "16", "classes": '["a", "b"]'}
    given: list[np.ndarray] = []

    class Session:
        def __init__(self, path: str) -> None:
            assert path == "file.onnx"

        def get_modelmeta(self) -> SimpleNamespace:
            return SimpleNamespace(custom_metadata_map=told)

        def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            given.append(inputs["images"])
            return [np.array([[0.25, 0.75]])]

    values = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    image = Image.fromarray(values).convert("RGB" if mode == "P" else mode).convert(mode)
    image.save(tmp_path / "image.png", **({"transparency": 5} if mode == "P" else {}))
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    monkeypatch.setattr(sys, "argv", ["script.py", "file.onnx", str(tmp_path / "image.png")])
    runpy.run_path(str(tmp_path / "script.py"))
    assert given[0].dtype == np.uint8
    np.testing.assert_array_equal(given[0], read(tmp_path / "image.png", 16, channels).pixels[None])


def test_a_kill_at_any_file_leaves_a_command_that_ends_the_same(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = run
    made = Exported(b"a network", lambda *_: np.zeros((1, 3)), 7, 0.0, 0.001)
    monkeypatch.setattr(exported, "export", lambda *_: made)
    words = ["recipe=export", f"checkpoint={folder}", f"support={images}", f"outputs={tmp_path}", "name=made"]
    outcome, kills = killed_at_files(*words)
    assert outcome.status == 0, outcome.err
    assert kills >= 3
    (stored,) = tmp_path.glob("made/*/result.json")
    assert (stored.parent / "classifier.onnx").read_bytes() == made.content
    assert json.loads(stored.read_text())["export/files"]["classifier.onnx"]["bytes"] == len(made.content)
    assert not list(stored.parent.glob(".*.writing"))


def test_images_that_were_learned_from_and_those_that_cannot_be_read_are_told(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = run
    made = Exported(b"a network", lambda x: np.eye(3)[np.zeros(len(x), int)], 7, 0.0, 0.001)
    monkeypatch.setattr(exported, "export", lambda *_: made)
    others = Path(shutil.copytree(images / "train", tmp_path / "others"))
    shutil.copy(images / "test" / "test0" / "0.png", others / "train0" / "new.png")
    (others / "train0" / "torn.png").write_bytes(b"no image")
    command = ["recipe=export", f"checkpoint={folder}", f"support={images}", f"outputs={tmp_path}"]
    outcome = done(*command, f"images={images / 'train'}")
    assert (
        "24 of the images: examples that it learned from, or copies of these, left out of the accuracy" in outcome.out
    )
    assert "; accuracy" not in outcome.out
    outcome = metarun(*command, f"images={others}")
    assert outcome.status == 1
    assert "; accuracy 100.00% of 1 labelled images\n24 of the images: examples" in outcome.out
    assert "torn.png: " in outcome.out
    told = "images: 1 of 26 cannot be read, each with its reason in result.json; files were compared on the others"
    assert told in outcome.said[-1]


def test_files_may_be_named_on_standard_input(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for predictions; and what is read once is not there for another time."""
    folder, images = run
    made = Exported(b"a network", lambda x: np.eye(3)[np.zeros(len(x), int)], 7, 0.0, 0.001)
    monkeypatch.setattr(exported, "export", lambda *_: made)
    command = [
        "recipe=export",
        f"checkpoint={folder}",
        f"support={images}",
        "images=-",
        f"outputs={tmp_path}",
        "name=made",
    ]
    (tmp_path / "images").mkdir()
    others = shutil.copytree(images / "test" / "test0", tmp_path / "images" / "train0")
    asked = sorted(map(str, others.iterdir()))
    for names in (asked, asked[:3]):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(names)))
        assert f" of {len(names)} labelled images\n" in done(*command).out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    outcome = metarun(*command[:-1], "name=empty")
    assert (outcome.status, outcome.said) == (2, ["metarun: images=-: names no file"])
    assert not (tmp_path / "empty").exists()


def test_what_is_compared_without_images_is_what_was_learned_from(run: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a divided folder the training images; of a table the images that it names, and not the table."""
    folder, images = run
    known = sorted((images / "train").glob("*/*.png"))
    table = shutil.copytree(images / "train", tmp_path / "copy") / "support.csv"
    lines = [f"{path.parent.name}/{path.name},{path.parent.name}" for path in known]
    table.write_text("\n".join(["file,label", *lines]))
    for number, support in enumerate((images, table)):
        outputs = tmp_path / str(number)
        outcome = metarun(
            "recipe=export", f"checkpoint={folder}", f"support={support}", "format=torch", f"outputs={outputs}"
        )
        assert outcome.status == 0, outcome.err
        (stored,) = outputs.glob("exports/*/result.json")
        (told,) = json.loads(stored.read_text())["export/files"].values()
        assert told["of"] == "examples that it learned from"
        assert told["labelled"] == len(known)


def test_a_transductive_learner_is_refused_without_a_support_set_too(run: tuple[Path, Path], tmp_path: Path) -> None:
    _, images = run
    words = ["algo=soft_k_means", "data=folder", "data.image_size=16", "backbone.channels=4", "task.ways=3", "task.queries=2",
             "train.steps=0", "test.episodes=4", "test.baseline_episodes=0", f"data.root={images}", f"outputs={tmp_path}"]  # fmt: skip
    assert metarun(*words, "name=made").status == 0
    (found,) = tmp_path.glob("made/*/result.json")
    outcome = metarun("recipe=export", f"checkpoint={found.parent}", f"outputs={tmp_path}")
    assert outcome.status == 2
    assert "depends on the others, which a file cannot keep" in outcome.said[-1]


@pytest.mark.parametrize(
    ("words", "ways"),
    [([], 3), (["test.task.ways=2"], 2), (["task.ways=5"], 5), (["task.ways=5", "test.task.ways=4"], 4)],
)
def test_a_file_without_a_support_set_has_the_ways_of_the_tests_and_not_those_of_the_training(
    words: list[str], ways: int, run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    made = Exported(b"a network", lambda *_: np.zeros((1, ways)), 7, 0.0, 0.001)
    monkeypatch.setattr(exported, "export", lambda *_: made)
    command = ["recipe=export", f"checkpoint={folder}", f"outputs={tmp_path}", *words]
    outcome = done(*command)
    assert f"ways     {ways}, of which" in outcome.out
    (stored,) = tmp_path.glob("exports/*/result.json")
    numbers = json.loads(stored.read_text())
    assert numbers["export/ways"] == ways
    assert numbers["export/takes"][0]["shape"] == [f"{ways}*shots", 3, 16, 16]
    stored.write_text(json.dumps({key: value for key, value in numbers.items() if key != "export/ways"}))
    assert "nothing was computed" not in done(*command).out  # an earlier version took those of the training
    assert "nothing was computed" in done(*command).out


@pytest.mark.parametrize("words", [["test.task.ways=[2,3]"], ["task.ways=1"]])
def test_a_file_has_one_number_of_ways(words: list[str], run: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = metarun("recipe=export", f"checkpoint={run[0]}", f"outputs={tmp_path}", *words)
    one_line(outcome, "test.task.ways=", "give that number")


def test_the_printed_commands_run(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, images = run
    for extra in (["format=onnx"], [f"support={images}", "format=torch"]):
        outcome = metarun("recipe=export", f"checkpoint={folder}", f"outputs={tmp_path}", *extra)
        assert outcome.status == 0, outcome.err
        (line,) = [line for line in outcome.out.splitlines() if line.startswith("try it")]
        command = line.removeprefix("try it").strip().replace("python", sys.executable, 1)
        shown = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
        assert "[[" in shown


def test_bad_input_is_one_line_and_leaves_nothing(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = run
    command = ["recipe=export", f"checkpoint={folder}", f"outputs={tmp_path}"]
    assert "onnx" in metarun(*command, "format=onx").err
    assert "use format=onnx" in metarun(*command, f"support={images}", "format=torch", "int8=true").err
    assert "images" in metarun(*command, f"images={images}").err
    with monkeypatch.context() as patched:
        patched.setattr(ProtoNet, "couples_queries", True)
        said = metarun(*command, f"support={images}").err
        assert "a file cannot keep; ProtoNet is transductive, algo=simpleshot, say, is not" in said
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = metarun(*command, f"support={images}")
    assert outcome.status == 2
    assert "pip install 'metarun[export]'" in outcome.err
    assert not list(tmp_path.iterdir())
