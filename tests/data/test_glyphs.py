"""The built-in characters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from metarun.core import TaskShape
from metarun.data import glyphs
from metarun.data.glyphs import Glyphs
from metarun.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def source() -> Glyphs:
    """The data set, of the session's cache: whichever test comes first has it built, by the code of today."""
    return Glyphs()


def test_has_1000_characters_of_10_scripts_20_times(source: Glyphs) -> None:
    table = source.table
    assert len(table.names) == len(set(table.names)) >= 1000
    assert len(set(table.groups)) >= 10
    assert (table.sizes == 20).all()
    assert table.images.shape == (20 * len(table.names), 1, 28, 28)
    assert all(name.startswith(f"{group}/U+") for name, group in zip(table.names, table.groups, strict=True))
    assert "Greek/U+03A9" in table.names


def test_pictures_are_light_on_dark_and_all_different(source: Glyphs) -> None:
    images = np.asarray(source.table.images)[:, 0]
    assert np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]]) == 0
    assert (images.max(axis=(1, 2)) > 200).mean() > 0.99
    ink = (images > 127).mean(axis=(1, 2))
    assert ink.min() > 0.002
    assert ink.max() < 0.7
    assert len({image.tobytes() for image in images}) == len(images)


def test_splits_share_no_script(source: Glyphs) -> None:
    scripts = {split: {source.table.groups[c] for c in classes} for split, classes in source.splits.items()}
    assert sorted(np.concatenate(list(source.splits.values()))) == list(range(len(source.table.names)))
    assert sum(map(len, scripts.values())) == len(set().union(*scripts.values()))
    for split, least in (("train", 600), ("val", 100), ("test", 150)):
        assert len(source.splits[split]) >= least
        assert len(scripts[split]) >= 3


def test_no_two_characters_look_the_same(source: Glyphs) -> None:
    codes = [int(name.rpartition("+")[2], 16) for name in source.table.names]
    drawings = glyphs.draw_characters(glyphs.font_files()[:4], set(codes))
    # Averaged over blocks of 4 x 4 pixels, that is seen from afar.
    plain = np.stack([ink[0] for ink in drawings.values()]).reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4))
    likeness = np.corrcoef(plain.reshape(len(plain), -1))
    np.fill_diagonal(likeness, 0)
    assert len(plain) > 1000
    assert likeness.max() < 0.95

    kept = set(map(chr, codes))
    assert kept & set("AΑА") == {"A"}  # not the Greek and the Cyrillic letter
    assert len(kept & set("oOоОοΟօⵔ")) == 1
    for pair in ("sS", "xX", "zZ", "wW", "vV"):
        assert len(kept & set(pair)) == 1


def test_drawing_is_deterministic_and_a_matter_of_one_character() -> None:
    fonts = glyphs.font_files()
    some = [ord(character) for character in "AΑbgΩЖשᐁع"]

    def draw(_: int) -> list[tuple[str, str, bytes]]:
        return [(name, group, images.tobytes()) for name, group, images in glyphs.build(fonts, 20, some)]

    first = draw(0)
    assert [name for name, _, _ in first][:2] == ["Latin/U+0041", "Latin/U+0062"]
    assert len(first) == len(some) - 1  # the Greek alpha is an A
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(draw, range(2))) == [first, first]
    ink = glyphs.draw_characters(fonts, [ord("g")])[ord("g")]
    alone = glyphs.render(ord("g"), ink, 28)
    assert alone.shape == (20, 1, 28, 28)
    assert (alone == glyphs.render(ord("g"), ink, 28)).all()
    assert (alone != glyphs.render(ord("h"), ink, 28)).any()  # each character has jitter of its own


def test_second_use_opens_the_table(source: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(glyphs, "build", build)
    images = source.table.images
    assert isinstance(images, np.memmap)
    assert Glyphs(rotations=True).table.fingerprint == source.table.fingerprint
    with pytest.raises(AssertionError, match="built again"):
        Glyphs(image_size=37)  # as no other test has them


def test_episodes_within_a_script(source: Glyphs) -> None:
    owner = {
        image.tobytes(): source.table.groups[row // 20] for row, image in enumerate(np.asarray(source.table.images))
    }

    def scripts(within: bool) -> list[set[str]]:
        source.within_group = within
        episodes = source.sampler("test", TaskShape(5, 1, 1), 0, CPU)(0, 40)
        x = (episodes.support_x * 255).round().to(torch.uint8).numpy()
        return [{owner[image.tobytes()] for image in task} for task in x]

    assert all(len(found) == 1 for found in scripts(True))
    assert len(set().union(*scripts(True))) > 1
    assert any(len(found) > 1 for found in scripts(False))


def test_nearest_pixels_are_no_solution_but_no_chance_either(source: Glyphs) -> None:
    episodes = source.sampler("test", TaskShape(20, 1, 1), 0, CPU)(0, 200)
    distances = torch.cdist(episodes.query_x.flatten(2), episodes.support_x.flatten(2))
    accuracy = (distances.argmin(dim=2) == episodes.query_y).float().mean().item()
    assert 0.15 < accuracy < 0.45


def test_user_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.image_size=4: must be at least 8"):
        Glyphs(image_size=4)
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"DejaVuSans\.ttf of matplotlib is missing"):
        Glyphs()
