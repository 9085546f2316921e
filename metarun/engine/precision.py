"""What a number format costs on a CPU: most compute bfloat16 without instructions of their own for it."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

TRIALS = 3
SLOW = 1.5  # a warning tells of a format that takes so many times as long as float32
CHANNELS, SIDE = 64, 14  # the convolution that is timed has these, as one of a small network


def cost(device: torch.device, autocast: torch.dtype | None) -> str:
    """Says in a sentence what mixed precision costs here; nothing where it is as fast as float32, or not asked for.

    Args:
        device: Where it is computed; the formats of a GPU are taken to be fast.
        autocast: The type of mixed precision.
    """
    if autocast is None or device.type != "cpu" or (times := times_as_slow(autocast)) < SLOW:
        return ""
    name = str(autocast).removeprefix("torch.")
    return (
        f"hardware.autocast={name}: a convolution takes {times:.0f} times as long on this CPU as in float32; hardware=cpu is faster "
        "here, and its numbers are those of another precision"
    )


def times_as_slow(dtype: torch.dtype) -> float:
    """Times a convolution on the CPU: how many times as long as in float32 it takes this process, the quickest of three in each.

    Args:
        dtype: The format.

    Returns:
        Below 1 where the format is faster.
    """
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    shapes = (2, CHANNELS, SIDE, SIDE), (CHANNELS, CHANNELS, 3, 3)
    image, weight = (torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for shape in shapes)
    taken = []
    with torch.inference_mode():
        for _ in range(TRIALS + 1):  # the first compiles
            began = time.perf_counter()
            F.conv2d(image, weight, padding=1)
            taken.append(time.perf_counter() - began)
    return min(taken[1:])
