"""What a view is made of: the recipe of one view, and the two of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from ssl_samix.errors import ConfigError, check_range, nearest

SMALLEST_BLURRED = 64  # pixels; SimCLR's CIFAR recipe has no blur, arXiv 2002.05709, appendix B.9
BLUR_SIGMA = (0.1, 2.0)  # pixels; SimCLR, appendix A, and everyone since


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """The recipe of one view: crop, mirror, colour jitter, grey, blur, solarize, in this order.

    Attributes:
        crop_min: Smallest area of a crop, as a share of the image's, in (0, 1].
        crop_max: Largest area of a crop, at least ``crop_min``, at most 1.
        flip: Probability to mirror left and right.
        jitter: Probability of the colour jitter, whose four operations come in random order.
        brightness: Its factor is uniform in [max(0, 1 - brightness), 1 + brightness].
        contrast: Likewise.
        saturation: Likewise.
        hue: The turn of the hue is uniform in [-hue, hue] turns; at most 0.5.
        grayscale: Probability to drop the colours.
        blur: Probability of a Gaussian blur, standard deviation uniform in `BLUR_SIGMA` pixels.
        solarize: Probability to invert the values above the middle.

    Raises:
        ConfigError: If a value is no number or out of its range.
    """

    crop_min: float
    crop_max: float = 1.0
    flip: float = 0.5
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur: float
    solarize: float

    def __post_init__(self) -> None:
        """Refuse values that make no view."""
        highest = {"brightness": math.inf, "contrast": math.inf, "saturation": math.inf, "hue": 0.5}
        for name, value in asdict(self).items():
            check_range(f"view setting {name}", value, 0.0, highest.get(name, 1.0))
        if self.crop_min == 0 or self.crop_min > self.crop_max:
            raise ConfigError(
                "view settings 'crop_min' and 'crop_max' must be 0 < crop_min <= crop_max <= 1, "
                f"got {self.crop_min} and {self.crop_max}"
            )


def scaled(spec: ViewSpec, image_size: int, flip: bool = True, crop_min: float = 0.0) -> ViewSpec:
    """Return ``spec`` fitted to the data.

    Args:
        spec: A recipe, written for 224 px photographs.
        image_size: Side of the views, in pixels; below `SMALLEST_BLURRED` nothing is blurred.
        flip: False where a mirrored image is another thing, such as a digit.
        crop_min: Smallest area of a crop that still shows the thing, where the data need more than
            photographs do: a quarter of a digit is another sign.
    """
    check_range("data.crop_min", crop_min, 0.0, 1.0)
    return replace(
        spec,
        crop_min=max(spec.crop_min, crop_min),
        crop_max=max(spec.crop_max, crop_min),
        blur=spec.blur if image_size >= SMALLEST_BLURRED else 0.0,
        flip=spec.flip if flip else 0.0,
    )


class Views:
    """The two views of a method.

    Args:
        a: The first view's recipe, a `ViewSpec` or its fields.
        b: The second view's.

    Raises:
        ConfigError: If a field is unknown, missing or out of its range.
    """

    def __init__(self, a: ViewSpec | Mapping[str, Any], b: ViewSpec | Mapping[str, Any]) -> None:
        """Check and keep both recipes."""
        self.a = a if isinstance(a, ViewSpec) else _spec(a)
        self.b = b if isinstance(b, ViewSpec) else _spec(b)

    def specs(
        self, image_size: int, flip: bool = True, crop_min: float = 0.0
    ) -> tuple[ViewSpec, ViewSpec]:
        """Return both recipes, `scaled` to ``image_size`` pixels and to what the data bear."""
        first, second = (scaled(spec, image_size, flip, crop_min) for spec in (self.a, self.b))
        return first, second


def _spec(settings: Mapping[str, Any]) -> ViewSpec:
    """Build a recipe from its fields."""
    known = [field.name for field in fields(ViewSpec)]
    needed = [field.name for field in fields(ViewSpec) if field.default is MISSING]
    if not isinstance(settings, Mapping):
        raise ConfigError(f"a view must have the settings {', '.join(needed)}, got {settings!r}")
    for name in settings:
        if name not in known:
            raise ConfigError(nearest(str(name), known, "view setting"))
    missing = [name for name in needed if name not in settings]
    if missing:
        raise ConfigError(f"a view lacks the settings {', '.join(missing)}")
    return ViewSpec(**settings)
