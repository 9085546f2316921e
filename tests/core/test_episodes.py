"""Meta-batches: put together, divided and changed, each task with its own tensors and sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metarun.core import Batch, Episodes, MixedEpisodes, TaskShape, count_text, largest, least, together
from metarun.errors import UserError


def tasks(numbers: list[int], shots: int, unlabelled: int = 0) -> Episodes:
    """Tasks of two ways, of one query each, whose items are all the number of their task."""

    def items(count: int) -> Tensor:
        return torch.tensor(numbers)[:, None, None].expand(-1, count, 1).float()

    def labels(count: int) -> Tensor:
        return torch.arange(2).repeat_interleave(count).expand(len(numbers), -1)

    rest = items(unlabelled) if unlabelled else None
    return Episodes(items(2 * shots), labels(shots), items(2), labels(1), 2, unlabelled_x=rest)


def numbers_of(found: Episodes) -> list[float]:
    return found.query_x[:, 0, 0].tolist()


def test_episodes_say_how_many_images_each_way_has() -> None:
    y = torch.tensor([[0, 0, 0, 1, 2, 2]])
    batch = Episodes(y, y, y, y, 3, (3, 1, 2))
    assert batch.support_sizes == [3, 1, 2]
    assert batch.classes_in_turn().tolist() == [0, 3, 4, 1, 5, 2]
    assert next(batch.split(1)).shots == (3, 1, 2)
    assert replace(batch, shots=None).classes_in_turn().tolist() == [0, 2, 4, 1, 3, 5]


def test_queries_that_each_task_divides_have_sizes_in_one_task_alone() -> None:
    y = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    batch = Episodes(y, y, y, y, 2, divided=True)
    assert [one.query_sizes for one in batch.split(1)] == [[3, 1], [1, 3]]
    with pytest.raises(ValueError, match="have no sizes in common"):
        _ = batch.query_sizes


def test_tasks_of_one_shape_are_one_meta_batch() -> None:
    whole = together([tasks([0, 1], 3), tasks([2], 3)])
    assert isinstance(whole, Episodes)
    assert numbers_of(whole) == [0, 1, 2]


def test_tasks_of_several_shapes_keep_their_places() -> None:
    whole = together([tasks([0], 1), tasks([1, 2], 3), tasks([3], 1), tasks([4], 1, unlabelled=2)])
    assert isinstance(whole, MixedEpisodes)
    assert whole.n_tasks == 5
    assert whole.places == ((0, 3), (1, 2), (4,))
    assert [numbers_of(group) for group in whole.groups] == [[0, 3], [1, 2], [4]]
    assert [numbers_of(one) for one in whole.split(1)] == [[0], [1], [2], [3], [4]]  # in their order
    for places, group in whole.chunks(2):
        assert numbers_of(group) == list(places)
    doubled = whole.with_items(lambda x: 2 * x)
    assert [numbers_of(one) for one in doubled.split(1)] == [[0], [2], [4], [6], [8]]
    assert doubled.groups[2].unlabelled_x is not None
    assert (doubled.groups[2].unlabelled_x == 8).all()


@pytest.mark.parametrize("size", [None, 1, 2, 5, 9])
def test_chunks_are_all_tasks_in_their_order(size: int | None) -> None:
    batch = Batch(torch.arange(5.0), torch.arange(5), torch.zeros(5, dtype=torch.int64))
    for whole in (tasks([0, 1, 2, 3, 4], 1), batch):
        chunks = list(whole.chunks(size))
        assert [place for places, _ in chunks for place in places] == [0, 1, 2, 3, 4]
        assert all(len(places) == chunk.n_tasks <= (size or 5) for places, chunk in chunks)


def test_other_support_sets_say_their_sizes() -> None:
    y = torch.tensor([[0, 0, 1]])
    assert tasks([7], 1).with_support(torch.zeros(1, 3, 1), y).shots == (2, 1)
    assert tasks([7], 1).with_support(torch.zeros(1, 2, 1), y[:, 1:]).shots is None


def test_a_count_is_a_number_or_a_range() -> None:
    assert [(least(count), largest(count), count_text(count)) for count in (4, (2, 6))] == [
        (4, 4, "4"),
        (2, 6, "[2,6]"),
    ]


def test_a_task_of_one_size_has_numbers_and_another_names_its_key() -> None:
    assert TaskShape(5, 1, 15).numbers == (5, 1, 15)
    with pytest.raises(UserError, match=r"^task\.shots=\[1,3\]: .*; set it to one number$"):
        _ = TaskShape(5, (1, 3), 15).numbers
    with pytest.raises(UserError, match=r"^task\.unlabelled=2: .*; set it to 0$"):
        _ = TaskShape(5, 1, 15, unlabelled=2).numbers
    assert TaskShape(5, (1, 3), 15).describe() == {"ways": 5, "shots": [1, 3], "queries": 15}
