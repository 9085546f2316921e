"""The smallest files in the formats of torchvision's and learn2learn's data sets: all their classes, few and small images."""

from __future__ import annotations

import bz2
import csv
import io
import json
import pickle
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

SIDE = 8
_noise = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    """Random pixels, uint8."""
    return _noise.integers(0, 256, shape, np.uint8)


def draw(path: Path, *, grey: bool = False) -> Path:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(SIDE, SIDE) if grey else noise(SIDE, SIDE, 3)).save(path)
    return path


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def dump(path: Path, content: Any) -> None:
    write(path, pickle.dumps(content))


def mat(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, content)


def class_names(module: str) -> list[Any]:
    """All classes of learn2learn's data set."""
    found = import_module(f"learn2learn.vision.datasets.{module}").SPLITS
    return [name for split, names in found.items() if split != "all" for name in names]


def idx(path: Path, values: np.ndarray) -> None:
    kind = {"u": 8, "i": 12}[values.dtype.kind]
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    write(path, bytes([0, 0, kind, values.ndim]) + sizes + values.tobytes())


# learn2learn


def mini_imagenet(root: Path) -> None:
    for mode, classes in {"train": 64, "validation": 16, "test": 20}.items():
        members = {f"n{mode}{number}": [number, classes + number] for number in range(classes)}
        images = noise(2 * classes, SIDE, SIDE, 3)
        dump(root / f"mini-imagenet-cache-{mode}.pkl", {"image_data": images, "class_dict": members})


def tiered_imagenet(root: Path) -> None:
    for mode, classes in {"train": 351, "val": 97, "test": 160}.items():
        images = []
        for _ in range(classes):
            file = io.BytesIO()
            Image.fromarray(noise(SIDE, SIDE, 3)).save(file, "PNG")
            images.append(np.frombuffer(file.getvalue(), np.uint8))
        dump(root / "tiered-imagenet" / f"{mode}_images_png.pkl", images)
        dump(root / "tiered-imagenet" / f"{mode}_labels.pkl", {"label_specific": np.arange(classes)[::-1].copy()})


def fc100(root: Path) -> None:
    for mode, classes in {"train": 60, "val": 20, "test": 20}.items():
        labels = [2 * number for number in range(classes)] * 2
        dump(root / f"FC100_{mode}.pickle", {"data": noise(len(labels), SIDE, SIDE, 3), "labels": labels})


def cifarfs(root: Path) -> None:
    folder = root / "cifarfs" / "cifar100"
    for mode, classes in {"train": 64, "val": 16, "test": 20}.items():
        names = [f"{mode}_{number}" for number in range(classes)]
        write(folder / "splits" / "bertinetto" / f"{mode}.txt", "\n".join(names))
        for name in names:
            for number in range(2):
                draw(folder / "data" / name / f"{number}.png")


def cu_birds200(root: Path) -> None:
    for name in class_names("cu_birds200"):
        draw(root / "cubirds200" / "CUB_200_2011" / "images" / name / "1.jpg")
        draw(root / "cubirds200" / "CUB_200_2011" / "images" / name / "2.jpg", grey=True)


def fgvc_aircraft(root: Path) -> None:
    folder = root / "fgvc_aircraft" / "fgvc-aircraft-2013b" / "data"
    labels = [(f"{number:07}", name) for number, name in enumerate(class_names("fgvc_aircraft"))]
    for number, _ in labels:
        draw(folder / "images" / f"{number}.jpg")
    dump(folder / "labels.pkl", labels)


def vgg_flower102(root: Path) -> None:
    for number in range(1, 205):
        draw(root / "vgg_flower102" / "jpg" / f"image_{number:05}.jpg")
    mat(root / "vgg_flower102" / "imagelabels.mat", labels=np.arange(204) % 102 + 1)


def describable_textures(root: Path) -> None:
    for name in class_names("describable_textures"):
        for number in range(2):
            draw(root / "describable_textures" / "dtd" / "images" / name / f"{name}_{number}.jpg")


def quickdraw(root: Path) -> None:
    (root / "quickdraw").mkdir()
    for name in class_names("quickdraw"):
        np.save(root / "quickdraw" / f"{name}.npy", noise(2, 28 * 28))


def fgvc_fungi(root: Path) -> None:
    categories = [int(name[:4]) for name in class_names("fgvc_fungi")]
    for file, chosen in {"train": categories[::2], "val": categories[1::2]}.items():
        images = [{"id": category, "file_name": f"images/{category}.jpg"} for category in chosen]
        annotations = [{"image_id": category, "category_id": category} for category in chosen]
        write(root / "fgvc_fungi" / f"{file}.json", json.dumps({"images": images, "annotations": annotations}))
    for category in categories:
        draw(root / "fgvc_fungi" / "images" / f"{category}.jpg")


def omniglot(root: Path) -> None:
    for part, characters in {"background": 964, "evaluation": 659}.items():
        write(root / "omniglot-py" / f"images_{part}.zip", "compared by its checksum alone")
        for number in range(characters):
            draw(root / "omniglot-py" / f"images_{part}" / f"{part}{number % 9}" / f"c{number:03}" / "1.png", grey=True)


# torchvision


def mnist(name: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for part, count in {"train": 20, "t10k": 10}.items():
            idx(root / name / "raw" / f"{part}-images-idx3-ubyte", noise(count, SIDE, SIDE))
            idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))

    return make


def qmnist(root: Path) -> None:
    for part, count in {"train": 20, "test": 10}.items():
        labels = np.zeros((count, 8), ">i4")
        labels[:, 0] = np.arange(count) % 10
        idx(root / "QMNIST" / "raw" / f"qmnist-{part}-images-idx3-ubyte", noise(count, SIDE, SIDE))
        idx(root / "QMNIST" / "raw" / f"qmnist-{part}-labels-idx2-int", labels)


def emnist(root: Path) -> None:
    for split, first, classes in (("balanced", 0, 47), ("letters", 1, 26)):
        for part in ("train", "test"):
            path = root / "EMNIST" / "raw" / f"emnist-{split}-{part}"
            idx(Path(f"{path}-images-idx3-ubyte"), noise(classes, SIDE, SIDE))
            idx(Path(f"{path}-labels-idx1-ubyte"), np.arange(first, first + classes).astype(np.uint8))


def cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        dump(folder / name, {"data": noise(10, 3072), "labels": list(range(10))})
    dump(folder / "batches.meta", {"label_names": [f"thing {number}" for number in range(10)]})


def cifar100(root: Path) -> None:
    for name in ("train", "test"):
        dump(root / "cifar-100-python" / name, {"data": noise(100, 3072), "fine_labels": list(range(100))})
    dump(root / "cifar-100-python" / "meta", {"fine_label_names": [f"thing {99 - number}" for number in range(100)]})


def svhn(root: Path) -> None:
    for part in ("train", "test"):
        mat(root / f"{part}_32x32.mat", X=noise(SIDE, SIDE, 3, 10), y=np.arange(1, 11)[:, None])


def stl10(root: Path) -> None:
    for part in ("train", "test"):
        write(root / "stl10_binary" / f"{part}_X.bin", noise(10, 3, 96, 96).tobytes())
        write(root / "stl10_binary" / f"{part}_y.bin", bytes(range(1, 11)))
    write(root / "stl10_binary" / "unlabeled_X.bin", noise(3, 3, 96, 96).tobytes())
    write(root / "stl10_binary" / "class_names.txt", "\n".join(f"thing{number}" for number in range(10)))


def usps(root: Path) -> None:
    for name in ("usps.bz2", "usps.t.bz2"):
        lines = []
        for label in range(1, 11):
            values = " ".join(f"{place}:{value / 128 - 1}" for place, value in enumerate(noise(256), 1))
            lines.append(f"{label} {values}")
        write(root / name, bz2.compress("\n".join(lines).encode()))


def semeion(root: Path) -> None:
    rows = np.concatenate([noise(10, 256) // 128, np.eye(10)], axis=1)
    write(root / "semeion.data", "\n".join(" ".join(map(str, row)) for row in rows))


def fer2013(root: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["emotion", "pixels", "Usage"])
    for usage in ("Training", "PublicTest", "PrivateTest"):
        for label in range(7):
            table.writerow([label, " ".join(map(str, noise(48 * 48))), usage])
    write(root / "fer2013" / "fer2013.csv", text.getvalue())


def gtsrb(root: Path) -> None:
    folder = root / "gtsrb" / "GTSRB"
    lines = ["Filename;Width;Height;ClassId"]
    for number in range(43):
        draw(folder / "Training" / f"{number:05}" / "1.ppm")
        draw(folder / "Final_Test" / "Images" / f"{number:05}.ppm")
        lines.append(f"{number:05}.ppm;{SIDE};{SIDE};{42 - number}")
    write(root / "gtsrb" / "GT-final_test.csv", "\n".join(lines))


def folders(top: str, classes: Iterable[str], file: str = "{}.jpg", count: int = 2) -> Callable[[Path], None]:
    """One folder a class below `top`."""

    def make(root: Path) -> None:
        for number, name in enumerate(classes, 1):
            for image in range(1, count + 1):
                draw(root / top / name / file.format(image, number))

    return make


def caltech101(root: Path) -> None:
    names = ["BACKGROUND_Google", *(f"thing{number}" for number in range(101))]
    folders("caltech101/101_ObjectCategories", names, "image_{:04}.jpg")(root)


def dtd(root: Path) -> None:
    for split in ("train", "val", "test"):
        names = [f"kind{number:02}/{split}.jpg" for number in range(47)]
        write(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "\n".join(names))
        for name in names:
            draw(root / "dtd" / "dtd" / "images" / name)


def country211(root: Path) -> None:
    for split in ("train", "valid", "test"):
        folders(f"country211/{split}", [f"C{number}" for number in range(211)], count=1)(root)


def imagenette(root: Path) -> None:
    from torchvision.datasets import Imagenette

    for split in ("train", "val"):
        folders(f"imagenette2/{split}", Imagenette._WNID_TO_CLASS, "{}.JPEG")(root)


def flowers102(root: Path) -> None:
    for number in range(1, 307):
        draw(root / "flowers-102" / "jpg" / f"image_{number:05}.jpg")
    mat(root / "flowers-102" / "imagelabels.mat", labels=np.arange(306) % 102 + 1)
    thirds = np.arange(1, 307).reshape(3, 102)
    mat(root / "flowers-102" / "setid.mat", trnid=thirds[0], valid=thirds[1], tstid=thirds[2])


def aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    for level, count in {"variant": 100, "family": 70}.items():
        names = [f"Type {number:02}" for number in range(count)]
        write(folder / {"variant": "variants.txt", "family": "families.txt"}[level], "\n".join(names))
        for split in ("train", "val", "test"):
            lines = [f"{split}{number} {names[number % count]}" for number in range(100)]
            write(folder / f"images_{level}_{split}.txt", "\n".join(lines))
    for split in ("train", "val", "test"):
        for number in range(100):
            draw(folder / "images" / f"{split}{number}.jpg")


def oxford_pets(root: Path) -> None:
    for split in ("trainval", "test"):
        names = [f"pet{chr(97 + number // 26)}{chr(97 + number % 26)}_{split}" for number in range(37)]
        lines = [f"{name} {label} 1 1" for label, name in enumerate(names, 1)]
        write(root / "oxford-iiit-pet" / "annotations" / f"{split}.txt", "\n".join(lines))
        for name in names:
            draw(root / "oxford-iiit-pet" / "images" / f"{name}.jpg")


def stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    for split, path in {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}.items():
        rows = [(f"{number:05}.jpg", number) for number in range(1, 197)]
        mat(folder / path, annotations=np.array(rows, [("fname", object), ("class", object)]))
        for name, _ in rows:
            draw(folder / f"cars_{split}" / name)
    mat(folder / "devkit" / "cars_meta.mat", class_names=np.array([f"Car {n}" for n in range(196)], object))


def food101(root: Path) -> None:
    names = [f"dish{number:03}" for number in range(101)]
    for split in ("train", "test"):
        write(root / "food-101" / "meta" / f"{split}.json", json.dumps({name: [f"{name}/{split}"] for name in names}))
        folders("food-101/images", names, f"{split}.jpg", count=1)(root)


def sun397(root: Path) -> None:
    names = [f"/{chr(97 + number % 26)}/place{number}" for number in range(397)]
    write(root / "SUN397" / "ClassName.txt", "\n".join(names))
    for name in names:
        draw(root / "SUN397" / name[1:] / "sun_a.jpg")


# What writes a data set, and how many images that are.
WRITERS: dict[tuple[str, str], tuple[Callable[[Path], None], int]] = {
    ("learn2learn", "CIFARFS"): (cifarfs, 200),
    ("learn2learn", "CUBirds200"): (cu_birds200, 400),
    ("learn2learn", "DescribableTextures"): (describable_textures, 94),
    ("learn2learn", "FC100"): (fc100, 200),
    ("learn2learn", "FGVCAircraft"): (fgvc_aircraft, 100),
    ("learn2learn", "FGVCFungi"): (fgvc_fungi, 1394),
    ("learn2learn", "FullOmniglot"): (omniglot, 1623),
    ("learn2learn", "MiniImagenet"): (mini_imagenet, 200),
    ("learn2learn", "Quickdraw"): (quickdraw, 690),
    ("learn2learn", "TieredImagenet"): (tiered_imagenet, 608),
    ("learn2learn", "VGGFlower102"): (vgg_flower102, 204),
    ("torchvision", "CIFAR10"): (cifar10, 60),
    ("torchvision", "CIFAR100"): (cifar100, 200),
    ("torchvision", "Caltech101"): (caltech101, 202),
    ("torchvision", "Caltech256"): (
        folders(
            "caltech256/256_ObjectCategories", [f"{number:03}.thing" for number in range(1, 258)], "{1:03}_{0:04}.jpg"
        ),
        514,
    ),
    ("torchvision", "Country211"): (country211, 633),
    ("torchvision", "DTD"): (dtd, 141),
    ("torchvision", "EMNIST"): (emnist, 94),
    ("torchvision", "EuroSAT"): (folders("eurosat/2750", [f"Land{number}" for number in range(10)]), 20),
    ("torchvision", "FER2013"): (fer2013, 21),
    ("torchvision", "FGVCAircraft"): (aircraft, 300),
    ("torchvision", "FashionMNIST"): (mnist("FashionMNIST"), 30),
    ("torchvision", "Flowers102"): (flowers102, 306),
    ("torchvision", "Food101"): (food101, 202),
    ("torchvision", "GTSRB"): (gtsrb, 86),
    ("torchvision", "Imagenette"): (imagenette, 40),
    ("torchvision", "KMNIST"): (mnist("KMNIST"), 30),
    ("torchvision", "MNIST"): (mnist("MNIST"), 30),
    ("torchvision", "Omniglot"): (omniglot, 1623),
    ("torchvision", "OxfordIIITPet"): (oxford_pets, 74),
    ("torchvision", "QMNIST"): (qmnist, 30),
    ("torchvision", "SEMEION"): (semeion, 10),
    ("torchvision", "STL10"): (stl10, 20),
    ("torchvision", "SUN397"): (sun397, 397),
    ("torchvision", "SVHN"): (svhn, 20),
    ("torchvision", "StanfordCars"): (stanford_cars, 392),
    ("torchvision", "USPS"): (usps, 20),
}
