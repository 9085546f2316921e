"""Networks of libraries as backbones: their features, their weights from files and addresses, and what is said of misfits."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import inspect
import logging
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import block, build, compose, double, episodes, toy_images
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from metarun import optional as peers
from metarun.backbones.conv4 import Conv4
from metarun.backbones.pretrained import Pretrained
from metarun.backbones.resnet12 import ResNet12
from metarun.backbones.vit import ViT
from metarun.backbones.weights import load_backbone, load_tensors, read_tensors
from metarun.config import check, task_of
from metarun.config.folder import CONF
from metarun.engine import checkpoint
from metarun.errors import UserError
from metarun.inference.blueprint import Blueprint
from metarun.ops.draws import drawing
from metarun.ops.tasks import over_tasks

GREY, COLOUR = (1, 28, 28), (3, 20, 24)
SMALL = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def models() -> Any:
    """torchvision.models"""
    peers.torchvision()
    return importlib.import_module("torchvision.models")


@pytest.fixture(scope="module")
def timm(models: Any) -> Any:
    return importlib.import_module("timm")


@pytest.fixture
def file(models: Any, tmp_path: Path) -> Path:
    """Weights of torchvision's network SMALL, in its format."""
    path = tmp_path / "small.pth"
    torch.save(models.shufflenet_v2_x0_5().state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "metarun"]


# What the networks compute


@pytest.mark.parametrize(
    ("name", "features", "norm", "parts", "size"),
    [
        (SMALL, 1024, "running", 5, 224),
        ("torchvision:googlenet", 1024, "running", 12, 224),  # with heads of its own for training
        ("torchvision:swin_t", 768, "none", 9, 224),
        ("timm:test_resnet", 96, "running", 6, 160),
        ("timm:test_vit", 64, "none", 8, 160),
    ],
)
def test_features_of_any_image(name: str, features: int, norm: str, parts: int, size: int) -> None:
    backbone = Pretrained(input_shape=GREY, name=name)
    assert (backbone.features, backbone.norm, len(backbone.blocks), backbone.image_size) == (
        features,
        norm,
        parts,
        size,
    )
    assert backbone.training
    for training in (True, False):
        backbone.train(training)
        assert backbone(torch.rand(2, *GREY), n_support=1).shape == (2, features)
    owned = {id(value) for part in backbone.blocks for value in part.parameters()}
    free = [path for path, value in backbone.named_parameters() if id(value) not in owned]
    assert all(path.endswith(("cls_token", "pos_embed")) for path in free)
    x = torch.rand(3, *GREY)
    torch.testing.assert_close(backbone(x)[:1], backbone(x[:1]), rtol=1e-3, atol=1e-4)  # inductive


@pytest.mark.parametrize("input_shape", [GREY, COLOUR])
def test_images_are_brought_to_what_the_network_expects(input_shape: tuple[int, ...], models: Any) -> None:
    transforms = importlib.import_module("torchvision.transforms.functional")
    backbone = Pretrained(input_shape=input_shape, name=SMALL, image_size=16).eval()
    x = torch.rand(2, *input_shape)
    resized = transforms.resize(x, [16, 16], antialias=True).expand(-1, 3, -1, -1)
    expected = transforms.normalize(resized, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    torch.testing.assert_close(backbone(x), backbone.network(expected), rtol=1e-4, atol=1e-5)
    backbone.channels_last = True
    torch.testing.assert_close(backbone(x), backbone.network(expected), rtol=1e-4, atol=1e-5)
    backbone.standardized = True
    torch.testing.assert_close(backbone(x), backbone.network(resized), rtol=1e-4, atol=1e-5)


def test_timm_s_own_mean_and_positions_for_another_size(timm: Any) -> None:
    backbone = Pretrained(input_shape=GREY, name="timm:vit_tiny_patch16_224", image_size=32)
    assert backbone.mean.flatten().tolist() == backbone.deviation.flatten().tolist() == [0.5] * 3
    assert backbone.network.pos_embed.shape == (1, 1 + 4, 192)


def test_the_yaml_looks_whether_pixels_are_standardized() -> None:
    path = Path(CONF) / "backbone" / "pretrained.yaml"
    assert path.read_text().startswith("# ")
    config = OmegaConf.load(path)
    signature = inspect.signature(get_class(config._target_).__init__).parameters
    for data, expected in (("glyphs", False), ("folder", True)):
        root = ["data.root=/nowhere"] if data == "folder" else []
        config = compose(f"data={data}", *root, "backbone=pretrained", f"backbone.name={SMALL}")
        check(config)
        assert config.backbone.standardized is expected
        defaults = {
            key: value.default for key, value in signature.items() if key not in ("self", "input_shape", "name")
        }
        rest = {key: value for key, value in config.backbone.items() if key not in ("_target_", "name", "from")}
        assert rest == {**defaults, "standardized": expected}
    with pytest.raises(UserError, match=r"^backbone.name: must be given"):
        check(compose("backbone=pretrained"))


@pytest.mark.parametrize("normalized", [True, False])
def test_without_a_source_the_yaml_looks_at_the_target(normalized: bool) -> None:
    """The network's own normalisation is not applied to pixels that the target has normalised already."""
    words = ["target=digits", f"target.data.normalize={normalized}", "backbone=pretrained", f"backbone.name={SMALL}"]
    for data in ("data=glyphs", "data=digits"):
        alone = compose(data, "recipe=target_only", *words)
        check(alone)
        assert alone.backbone.standardized is normalized
        after_source = compose(data, "recipe=transfer", *words)
        assert after_source.backbone.standardized is (data == "data=digits")


@pytest.mark.parametrize(
    ("algo", "name"), [("protonet", "timm:test_resnet"), ("maml", "timm:test_resnet"), ("anil", SMALL)]
)
def test_methods_train_on_it(algo: str, name: str) -> None:
    config = compose(
        f"algo={algo}", "backbone=pretrained", f"backbone.name={name}", "backbone.image_size=32", "task.queries=2"
    )
    check(config)
    source = toy_images()
    algorithm = build(config, source)
    loss, _ = algorithm.loss(episodes(source, task_of(config, "train"), 2), 0)
    loss.backward()
    assert all(value.grad is not None for value in algorithm.backbone.parameters())
    assert not algorithm.transductive


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_what_libraries_draw_in_training_is_known(rate: float, timm: Any) -> None:
    from timm.layers import DropBlock2d, DropPath, PatchDropout
    from torchvision.ops import DropBlock2d as OfTorchvision
    from torchvision.ops import StochasticDepth

    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x)[0]

    Attention.__name__ = "MultiheadAttention"
    parts = [
        nn.Dropout(rate),
        nn.AlphaDropout(rate),
        DropPath(rate),
        StochasticDepth(rate, "row"),
        Attention(4, 1, rate),
    ]
    for part in [*parts, PatchDropout(rate), DropBlock2d(rate), OfTorchvision(rate, 3)]:
        x = torch.randn(2, 4, 4, 4) if isinstance(part, DropBlock2d | OfTorchvision) else torch.randn(2, 4, 4)
        before = torch.get_rng_state()
        part.train()(x)
        moved = not torch.equal(torch.get_rng_state(), before)
        assert bool(drawing(nn.Sequential(part))) is moved is bool(rate), part


def test_a_library_is_imported_where_it_is_asked_for() -> None:
    code = "import sys, metarun.backbones.pretrained; sys.exit(bool({'torchvision', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Weights from files


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "safetensors"])
def test_a_file_of_torchvision_s(form: str, models: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metarun")
    network = models.shufflenet_v2_x0_5().eval()
    path, state = tmp_path / "weights.pth", network.state_dict()
    if form == "nested":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    elif form == "safetensors":
        path = tmp_path / "weights.safetensors"
        importlib.import_module("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    backbone = Pretrained(
        input_shape=COLOUR, name=SMALL, weights=str(path), checksum=sha256(path), standardized=True
    ).eval()
    x = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(network.fc(backbone(x)), network(x))
    n = len(state)
    left = "fc.bias, fc.weight" if form == "safetensors" else "fc.weight, fc.bias"
    assert lines(caplog) == [f"backbone.weights={path}: loaded {n - 2} of {n} tensors; left out {left}"]


def test_a_file_of_timm_s_and_one_without_a_head(timm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metarun")
    network, x = timm.create_model("test_vit").eval(), torch.rand(2, 3, 160, 160)
    torch.save(network.state_dict(), tmp_path / "with.pth")
    backbone = Pretrained(
        input_shape=COLOUR, name="timm:test_vit", weights=str(tmp_path / "with.pth"), standardized=True
    )
    torch.testing.assert_close(network.head(backbone.eval()(x)), network(x))
    torch.save(backbone.network.state_dict(), tmp_path / "without.pth")
    again = Pretrained(
        input_shape=COLOUR, name="timm:test_vit", weights=str(tmp_path / "without.pth"), standardized=True
    )
    assert torch.equal(again.eval()(x), backbone(x))
    assert [line.split(": ")[1] for line in lines(caplog)] == [
        "loaded 78 of 80 tensors; left out head.weight, head.bias",
        "loaded 78 of 78 tensors",
    ]


def test_old_files_lack_a_counter_that_nothing_reads(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "metarun")
    state = {name: value for name, value in torch.load(file).items() if not name.endswith("num_batches_tracked")}
    torch.save(state, file)
    Pretrained(input_shape=GREY, name=SMALL, weights=str(file))
    assert "; not in the file: conv1.1.num_batches_tracked, " in lines(caplog)[0]
    assert lines(caplog)[0].endswith(f" and {56 - 6} more")


def misfit(timm: Any, path: Path, kind: str) -> tuple[str, str]:
    """A network and a file that is not its; returns the network, and what is said of them."""
    if kind == "names":
        torch.save(timm.create_model("test_vit").state_dict(), path)
        return (
            "timm:test_resnet",
            r"has no conv1.0.weight; its first tensor is cls_token; 0 of the network's \d+ tensors fit$",
        )
    if kind == "deeper":
        torch.save(timm.create_model("resnet34").state_dict(), path)
        return (
            "timm:resnet18",
            r"has a layer1.2.conv1.weight \(64, 64, 3, 3\), which this network has not; 120 of .* 120 tensors fit$",
        )
    if kind == "channels":
        torch.save(timm.create_model("resnet18", in_chans=1).state_dict(), path)
        expected = r"conv1.weight is \(64, 1, 7, 7\) in the file and \(64, 3, 7, 7\) in this network, that is for images or maps "
        return "timm:resnet18", expected + r"of 1 channels, not 3; 119 of the network's 120 tensors fit$"
    if kind == "list":
        torch.save([torch.ones(1)], path)
        return "timm:test_resnet", rf"{path} holds no weights by name \(a state_dict\)$"
    if kind == "code":
        torch.save(nn.Linear(1, 1), path)
        return (
            "timm:test_resnet",
            rf"{path} holds Python objects beside its tensors \(torch.nn.modules.linear.Linear\), ",
        )
    path.write_bytes(b"PK")
    return "timm:test_resnet", rf"{path} cannot be read; it is truncated, or no file of weights$"


@pytest.mark.parametrize("kind", ["names", "deeper", "channels", "list", "code", "truncated"])
def test_a_file_that_does_not_fit(kind: str, timm: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    name, message = misfit(timm, path, kind)
    with pytest.raises(UserError, match=rf"^backbone.weights={path}: {message}") as error:
        Pretrained(input_shape=GREY, name=name, weights=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.SAFETENSORS", "weights.bin", "weights"])
def test_a_file_of_safetensors_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    save_file = importlib.import_module("safetensors.torch").save_file
    save_file({"a.weight": torch.ones(2)}, tmp_path / name)
    assert list(read_tensors(tmp_path / name, "x")) == ["a.weight"]
    torch.save({"b": torch.ones(1)}, tmp_path / "other.safetensors")
    assert list(read_tensors(tmp_path / "other.safetensors", "x")) == ["b"]
    whole = (tmp_path / name).read_bytes()
    for part in (whole[:-4], whole[:9], whole[:3], b""):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(UserError, match=f"^x: {tmp_path / name} cannot be read; it is truncated"):
            read_tensors(tmp_path / name, "x")


def test_a_program_of_torchscript_is_called_one(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(
        UserError, match=r"net.pt is a TorchScript program, .* torch.save\(torch.jit.load\(FILE\).state_dict"
    ):
        read_tensors(tmp_path / "net.pt", "x")
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.jit.load(tmp_path / "net.pt").state_dict(), tmp_path / "own.pt")
    assert set(read_tensors(tmp_path / "own.pt", "x")) == {"weight", "bias"}


# Weights by address and by name


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_an_address_is_fetched_once(file: Path, root: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(file.parent))

        def log_message(self, *message: Any) -> None:
            asked.append(self.path)

    digest = sha256(file)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/{file.name}"
            for _ in range(2):
                backbone = Pretrained(input_shape=GREY, name=SMALL, weights=address, checksum=digest.upper())
        finally:
            server.shutdown()
            thread.join()
    assert asked == [f"/{file.name}"]
    assert torch.equal(backbone.network.conv1[0].weight, torch.load(file)["conv1.0.weight"])
    kept = root / "weights" / digest[:16] / file.name
    kept.write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=rf"{kept} is another file than the one meant \(SHA-256 \w+, expected {digest}\)$"
    ):
        Pretrained(input_shape=GREY, name=SMALL, weights=address, checksum=digest)


def test_an_address_with_another_file(file: Path, root: Path) -> None:
    with pytest.raises(
        UserError, match=r"^download of file://\S+small.pth brought another file than the published one"
    ):
        Pretrained(input_shape=GREY, name=SMALL, weights=file.as_uri(), checksum="0" * 64)
    assert [path.suffix for path in root.rglob("*") if path.is_file()] in ([], [".lock"])


def test_torchvision_s_weights_by_name(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that it has fetched already, so that nothing is asked of the network."""
    caplog.set_level(logging.INFO, "metarun")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights, network = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1, models.shufflenet_v2_x0_5()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / weights.url.rsplit("/", 1)[1])
    for named in ("pretrained", "IMAGENET1K_V1"):
        backbone = Pretrained(input_shape=GREY, name=SMALL, weights=named)
        assert torch.equal(backbone.network.conv5[0].weight, network.conv5[0].weight)
        assert f"{lines(caplog)[-1]}" == f"backbone.weights={named}: torchvision loaded its {weights}; left out fc"
    (folder / weights.url.rsplit("/", 1)[1]).unlink()
    monkeypatch.setattr("torch.hub.urlopen", lambda *_: (_ for _ in ()).throw(OSError("no route to host\nat all")))
    with pytest.raises(
        UserError, match=rf"{weights} of {SMALL} cannot be had \(no route to host\); .* backbone.weights=PATH$"
    ):
        Pretrained(input_shape=GREY, name=SMALL, weights="pretrained")


def test_timm_s_weights_by_tag(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    make = timm.create_model

    def create(name: str, **settings: Any) -> nn.Module:
        asked.append((name, settings.pop("pretrained", False)))
        return make(name, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    for name, weights in (("test_resnet", "pretrained"), ("resnet18", "a1_in1k"), ("resnet18.a2_in1k", "pretrained")):
        Pretrained(input_shape=GREY, name=f"timm:{name}", weights=weights, image_size=32)
    Pretrained(input_shape=GREY, name="timm:test_resnet")
    assert asked == [
        ("test_resnet", True),
        ("resnet18.a1_in1k", True),
        ("resnet18.a2_in1k", True),
        ("test_resnet", False),
    ]
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("offline\nreally")))
    with pytest.raises(
        UserError, match=r"^backbone.weights: the weights resnet18 of timm:resnet18 cannot be had \(offline\)"
    ):
        Pretrained(input_shape=GREY, name="timm:resnet18", weights="pretrained")


def test_a_blueprint_names_the_weights_whose_images_are_expected(monkeypatch: pytest.MonkeyPatch, timm: Any) -> None:
    """Mean and deviation are no weights, so that a file of these does not bring them."""
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **settings: make(name, **settings))
    words = ["backbone=pretrained", "backbone.name=timm:vit_small_patch16_224", "backbone.image_size=32"]
    config = compose("algo=protonet", *words, "backbone.weights=dino")
    algorithm = build(config, toy_images())
    kept = Blueprint.stored(Blueprint.of(config, "algo", algorithm).describe(), Path("result.json")).learner()
    for backbone in (algorithm.backbone, kept.backbone):
        assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # the default weights' is 0.5


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "resnet50"},
            r"backbone.name=resnet50: must be torchvision:NAME, timm:NAME or metarun:NAME, such as torchvision:resnet50, ",
        ),
        ({"name": "torchvision:resnet5"}, r"no such image classifier; did you mean .*resnet50"),
        ({"name": "torchvision:squeezenet1_0"}, "does not end in a linear classifier that could be taken off"),
        ({"name": "timm:resnett18"}, r"timm has no such network; did you mean .*resnet18"),
        ({"name": "timm:resnet18.a7_in1k"}, r"^backbone.name=timm:resnet18.a7_in1k: .*a7_in1k"),
        ({"input_shape": (2, 28, 28)}, "takes images of 1 or 3 channels, but the data have 2"),
        ({"input_shape": (7,)}, "pretrained needs images.* vectors of 7; try backbone=mlp"),
        ({"image_size": 0}, "backbone.image_size=0: must be at least 1"),
        (
            {"name": "torchvision:maxvit_t", "image_size": 100},
            "backbone.image_size=100: torchvision:maxvit_t does not take such",
        ),
        (
            {"name": "torchvision:vit_b_16", "image_size": 100},
            r"^backbone.image_size=100: torchvision:vit_b_16 does not take such images \(Input shape indivisible by patch size!\)$",
        ),
        (
            {"name": "timm:test_vit", "image_size": 100},
            r"^backbone.image_size=100: timm:test_vit does not take such images ",
        ),
        ({"norm": "batch"}, f"backbone.norm=batch: {SMALL} has the normalisation .*; use backbone.norm=running"),
        ({"norm": "bach"}, r"did you mean batch\?"),
        ({"checksum": "12"}, "backbone.checksum=12: must be the 64 hexadecimal digits"),
        (
            {"weights": "https://example.org/w.pth"},
            "https://example.org/w.pth: an address needs backbone.checksum=SHA256",
        ),
        ({"weights": "IMAGENET1K_V9"}, r"no such file, nor weights of that name; did you mean IMAGENET1K_V1\?"),
        ({"weights": "nowhere.pth"}, f"nor weights of that name; {SMALL} has IMAGENET1K_V1$"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Pretrained(**{"input_shape": GREY, "name": SMALL, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "missing"), [("timm:resnet18", "timm"), (SMALL, "torchvision")])
def test_a_library_that_is_not_there(name: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    extra = re.escape(f"{missing} is not installed: pip install 'metarun[{missing}]'")
    with pytest.raises(UserError, match=f"^backbone.name={name}: {extra}$"):
        Pretrained(input_shape=GREY, name=name)


@pytest.mark.parametrize(
    ("name", "broken"), [("timm:resnet18", "timm"), ("timm:resnet18", "torchvision"), (SMALL, "torchvision")]
)
def test_a_library_that_cannot_be_imported(
    name: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(broken, tmp_path, monkeypatch)
    told = f"{broken} cannot be imported (blocked): pip install 'metarun[{name.partition(':')[0]}]'"
    with pytest.raises(UserError, match=f"^backbone.name={name}: {re.escape(told)}$"):
        Pretrained(input_shape=GREY, name=name)


def test_safetensors_that_cannot_be_imported_are_no_truncated_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    importlib.import_module("safetensors.torch").save_file({"a": torch.zeros(1)}, weights)
    block("safetensors", tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"^key: safetensors cannot be imported \(blocked\): pip install 'metarun\[timm\]'$"
    ):
        read_tensors(weights, "key")


def test_methods_that_reach_into_blocks_are_refused() -> None:
    backbone = Pretrained(input_shape=GREY, name="timm:test_resnet", image_size=32)
    for ask in (lambda: backbone.widths, lambda: backbone(torch.rand(1, *GREY), activation_hook=lambda number, x: x)):
        with pytest.raises(
            UserError, match=r"changes activations within blocks.*; use backbone=conv4, resnet12 or vit$"
        ):
            ask()
    config = compose("algo=cavia", "backbone=pretrained", "backbone.name=timm:test_resnet", "backbone.image_size=32")
    with pytest.raises(UserError, match="changes activations within blocks"):
        build(config, toy_images())
    with pytest.raises(UserError, match=r"set hardware.vectorize=false$"):
        over_tasks(backbone, torch.rand(2, 3, *GREY), vectorize=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x.int(), "is of torch.int32"),
        (lambda x: x.to(torch.int8), "is of torch.int8"),
        (lambda x: x.to(torch.complex64), "is of torch.complex64"),
        (lambda x: x.to_sparse(), "is of torch.sparse_coo"),
        (lambda x: x.to("meta"), "has no values"),
    ],
)
def test_weights_of_another_kind_of_number_are_refused(change: Any, told: str) -> None:
    """Torch copies whole numbers and the real parts of complex ones, of which another network would become."""
    network = nn.Linear(2, 3)
    before = network.weight.clone()
    state = {**network.state_dict(), "weight": change(torch.ones(3, 2))}
    wanted = (
        f"^here: weight {told} in the file, and this network's is of torch.float32; 1 of the network's 2 tensors fit$"
    )
    with pytest.raises(UserError, match=wanted):
        load_tensors(network, state, "here")
    assert torch.equal(network.weight, before)


# Weights of metarun's own runs


def saved(backbone: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    checkpoint.save(path, {"model": {"head.weight": torch.ones(2), **state}, "step": 1, "score": 0.5})


@pytest.mark.parametrize(
    "make",
    [
        lambda size: Conv4(input_shape=(1, size, size), channels=8, norm="running"),
        lambda size: ResNet12(input_shape=(1, size, size), widths=[4, 4, 8, 8], norm="running"),
        lambda size: ViT(input_shape=(1, size, size), patch_size=4, width=16, depth=2, heads=2),
        lambda size: Pretrained(input_shape=(1, size, size), name="timm:test_resnet", image_size=32),
    ],
)
def test_weights_of_a_run_for_images_of_another_size(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "metarun")
    trained, backbone = make(16), make(32)
    for value in trained.parameters():
        value.data.normal_()
    saved(trained, tmp_path / "run" / "best.pt")
    for place in (tmp_path / "run", str(tmp_path / "run" / "best.pt")):
        load_backbone(backbone, place)
        n = len(backbone.state_dict())
        assert lines(caplog)[-1] == f"backbone.from={place}: loaded {n} of {n} tensors"
    for name, value in trained.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name])


def conv4(channels: int = 1, norm: str = "running", width: int = 8) -> Conv4:
    return Conv4(input_shape=(channels, 16, 16), channels=width, norm=norm)


@pytest.mark.parametrize(
    ("trained", "backbone", "message"),
    [
        (
            conv4(1),
            conv4(3),
            r"blocks.0.conv.weight is \(8, 1, 3, 3\) in the file and \(8, 3, 3, 3\) .* of 1 channels, not 3; 23 of",
        ),
        (
            conv4(width=4),
            conv4(),
            r"blocks.0.conv.weight is \(4, 1, 3, 3\) in the file and \(8, 1, 3, 3\) in this network; 0 of",
        ),
        (
            conv4(norm="batch"),
            conv4(),
            r"has no blocks.0.norm.running_mean; .* with another backbone.norm than running; 16 of",
        ),
        (
            conv4(),
            conv4(norm="group"),
            r"has a blocks.0.norm.running_mean \(8,\), which this network has not; 16 of .* 16 tensors",
        ),
        (
            conv4(),
            ViT(input_shape=(1, 16, 16), patch_size=4, width=16, depth=1),
            "has no class_token; its first tensor is blocks.0.conv.weight; 0 of the network's 17 tensors fit$",
        ),
    ],
)
def test_weights_of_another_run(trained: nn.Module, backbone: Any, message: str, tmp_path: Path) -> None:
    saved(trained, tmp_path / "best.pt")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=rf"^backbone.from={tmp_path}: {message}") as error:
        load_backbone(backbone, tmp_path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_no_run_there(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            load_backbone(conv4(), path)
        return str(error.value)

    for place in (tmp_path, tmp_path / "x"):
        assert message(place).startswith(f"backbone.from={place}: there is no such run folder or file")
    checkpoint.save(tmp_path / "best.pt", {"model": {"head.weight": torch.ones(2)}})
    assert message(tmp_path).endswith("best.pt holds no backbone; its first tensor is head.weight")
    (tmp_path / "best.pt").write_bytes(b"PK")
    assert "truncated" in message(tmp_path)


# The vision transformer


def test_a_block_is_timm_s(timm: Any) -> None:
    """An independent one, with the same weights."""
    block = ViT(input_shape=GREY, width=24, heads=3, depth=1).blocks[0].double()
    for value in block.parameters():
        nn.init.normal_(value, std=0.3)
    reference = importlib.import_module("timm.models.vision_transformer").Block(24, 3, qkv_bias=True).double()
    names = {"qkv": "attn.qkv", "out": "attn.proj", "hidden": "mlp.fc1", "back": "mlp.fc2"}
    pairs = [(*name.split("."), value) for name, value in block.state_dict().items()]
    reference.load_state_dict({f"{names.get(layer, layer)}.{name}": value for layer, name, value in pairs})
    tokens = torch.randn(5, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), reference(tokens), rtol=1e-9, atol=1e-9)


def test_patches_are_a_convolution_and_places_differ() -> None:
    vit = ViT(input_shape=(3, 12, 20), patch_size=4, width=16, depth=1)
    x = torch.rand(2, 3, 12, 20)
    kernel = vit.embed.weight.view(16, 3, 4, 4)
    expected = nn.functional.conv2d(x, kernel, vit.embed.bias, stride=4).flatten(2).mT
    torch.testing.assert_close(vit.embed(vit.patches(x)), expected)
    assert vit.places.shape == (3 * 5, 16)
    assert torch.pdist(vit.places).min() > 0.1
    assert torch.equal(vit.places[1], ViT(input_shape=(3, 8, 8), patch_size=4, width=16, depth=1).places[1])
    assert "places" not in vit.state_dict()


@pytest.mark.parametrize("readout", ["class", "mean"])
def test_what_is_read_out(readout: str) -> None:
    vit = ViT(input_shape=GREY, width=16, depth=2, readout=readout)
    seen: list[Tensor] = []
    vit.last_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = vit(torch.rand(3, *GREY), n_support=2)
    assert features.shape == (3, vit.features)
    torch.testing.assert_close(features, seen[0][:, 0] if readout == "class" else seen[0][:, 1:].mean(1))


def test_methods_change_the_hidden_units_of_its_blocks() -> None:
    vit = ViT(input_shape=GREY, width=16, depth=3)
    shapes: list[tuple[int, ...]] = []

    def record(number: int, x: Tensor) -> Tensor:
        shapes.append((number, *x.shape))
        return x

    x = torch.rand(2, *GREY)
    assert torch.equal(vit(x, activation_hook=record), vit(x))
    assert shapes == [(number, 2, vit.widths[number], 17) for number in range(3)]
    assert vit.widths == [64, 64, 64]
    assert not torch.equal(vit(x, activation_hook=lambda number, x: x + 1), vit(x))


def test_second_order_through_attention() -> None:
    """MAML's gradient against finite differences by a loop, and the same by vmap, under which torch's layer norm is not."""
    config = compose("algo=maml", "backbone=vit", "backbone.patch_size=8", "backbone.width=8", "backbone.heads=2")
    config.backbone.depth, config.algo.inner_steps, config.task.ways, config.task.queries = 1, 1, 2, 1
    config.algo.inner_lr = 0.3
    source = toy_images()
    algorithm = build(config, source).double()
    values = list(algorithm.parameters())
    for value in values:
        nn.init.normal_(value, std=0.5)
    batch = double(episodes(source, task_of(config, "train"), 2))
    gradients = torch.autograd.grad(algorithm.loss(batch, 0)[0], values)
    directions = [torch.randn_like(value) for value in values]

    @torch.no_grad()
    def moved(size: float) -> float:
        for value, direction in zip(values, directions, strict=True):
            value += size * direction
        with torch.enable_grad():
            loss = algorithm.loss(batch, 0)[0].item()
        for value, direction in zip(values, directions, strict=True):
            value -= size * direction
        return loss

    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert abs(slope) > 0.01
    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-6)
    algorithm.vectorize = True
    vmapped = torch.autograd.grad(algorithm.loss(batch, 0)[0], values)
    for one, other in zip(gradients, vmapped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_shape": (1, 32, 32)}, r"backbone.patch_size=7: does not divide images of 32×32; try 2, 4, 8, 16$"),
        ({"input_shape": (5,)}, "vit needs images"),
        ({"width": 30}, "backbone.width=30: must be divisible by backbone.heads=4, and by 4"),
        ({"depth": 0}, "backbone.depth=0: must be at least 1"),
        ({"readout": "max"}, "backbone.readout=max: is not one of class, mean"),
        ({"norm": "batch"}, "backbone.norm=batch: a vision transformer has layer norms alone; use backbone.norm=none"),
    ],
)
def test_mistakes_of_the_transformer_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViT(**{"input_shape": GREY, **settings})


def test_the_transformer_lets_no_image_see_another() -> None:
    algorithm = build(compose("algo=protonet", "backbone=vit", "backbone.patch_size=4"), toy_images())
    assert not algorithm.transductive
    assert sum(value.numel() for value in ViT(input_shape=GREY).parameters()) == 1_196_416
