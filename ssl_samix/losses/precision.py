"""Losses are computed in float32, whatever autocast does around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def full_precision(loss: Loss) -> Loss:
    """Switch autocast off inside ``loss`` and give it its floating-point tensors as float32.

    Autocast would turn a product of float32 tensors into bfloat16: differences of similarities
    divided by a small temperature need more than its 8 bits.
    """

    @wraps(loss)
    def in_float32(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return loss(query.float(), *map(_float32, arguments), **settings)

    return in_float32  # type: ignore[return-value]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
