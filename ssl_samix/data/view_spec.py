"""Settings of augmented views: of one view, and of the views of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

from ssl_samix.errors import ConfigError, check_choice, check_range, nearest

SMALLEST_BLURRED = 64  # pixels; SimCLR's CIFAR recipe has no blur, arXiv 2002.05709, appendix B.9
PLACES = ("auto", "batched", "workers")
POLICIES = ("none", "randaugment", "trivialaugment")
HIGHEST = {  # upper bound of settings that may exceed 1
    "brightness": math.inf,
    "contrast": math.inf,
    "saturation": math.inf,
    "hue": 0.5,
    "pad": 0.5,
    "operations": 14,
    "magnitude": 30,
}
AUTO = "auto"
SMALL_IMAGE_JITTER = 0.5  # strength below `SMALLEST_BLURRED`, as SimCLR's for CIFAR-10 (B.9)
# What auto is for larger images: SimCLR's colour jitter of strength 1 (appendix A).
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
SMALL_IMAGE_CROP = 0.2  # what auto is for data.crop_min below `SMALLEST_BLURRED`
SMALL_SHARE = 3 / 7  # side of a small view: 96 of 224 px
MOST_SMALL = 32  # small views of an image
BLUR_SIGMA = (0.1, 2.0)  # pixels; SimCLR, appendix A, and everyone since


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """The settings of one view, in the order: crop, mirror, policy, colour jitter, grey, blur,
    solarize, and, on the normalised view, erasing.

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
        pad: If above 0, the crop is of the image's own size, out of the image with a mirrored
            border of this share of its side: the crop of the CIFAR recipes (4 of 32 px).
        policy: ``none``, ``randaugment`` (arXiv 1909.13719) or ``trivialaugment``
            (arXiv 2103.10158), torchvision's, image by image.
        operations: Of RandAugment, per image.
        magnitude: Of RandAugment, in [0, 30].
        erasing: Probability to fill a rectangle with noise (arXiv 1708.04896).

    Raises:
        ConfigError: If a value is not a number or out of its range.
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
    pad: float = 0.0
    policy: str = "none"
    operations: int = 2
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        """Raise for values out of range."""
        settings = asdict(self)
        check_choice("view setting policy", settings.pop("policy"), POLICIES)
        for name, value in settings.items():
            check_range(f"view setting {name}", value, 0.0, HIGHEST.get(name, 1.0))
        if self.crop_min == 0 or self.crop_min > self.crop_max:
            raise ConfigError(
                "view settings 'crop_min' and 'crop_max' must be 0 < crop_min <= crop_max <= 1, "
                f"got {self.crop_min} and {self.crop_max}"
            )


def smallest_crop(image_size: int, crop_min: float | Literal["auto"]) -> float:
    """Return ``data.crop_min`` for images of this size; see ``scaled``."""
    if crop_min == AUTO:
        return SMALL_IMAGE_CROP if image_size < SMALLEST_BLURRED else 0.0
    check_range("data.crop_min", crop_min, 0.0, 1.0)
    return float(crop_min)


def scaled(
    spec: ViewSpec,
    image_size: int,
    flip: bool = True,
    crop_min: float | Literal["auto"] = 0.0,
) -> ViewSpec:
    """Return ``spec`` fitted to the data.

    Args:
        spec: A recipe, written for 224 px photographs.
        image_size: Side of the views, in pixels; below `SMALLEST_BLURRED` nothing is blurred.
        flip: False if mirroring changes the meaning of an image, as of a digit.
        crop_min: Smallest area of a crop, if the data need more than photographs do: a quarter of
            a digit is another sign. ``auto``: 0.2 below 64 px, where less is a blur of a few
            pixels.
    """
    smallest = smallest_crop(image_size, crop_min)
    return replace(
        spec,
        crop_min=max(spec.crop_min, smallest),
        crop_max=max(spec.crop_max, smallest),
        blur=spec.blur if image_size >= SMALLEST_BLURRED else 0.0,
        flip=spec.flip if flip else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class SmallViews:
    """Settings of multi-crop's small views (SwAV, arXiv 2006.09882, section 3.2).

    Attributes:
        count: Number of small views; 0 for none.
        size: Their side in px; ``auto``: 3/7 of the image's, a multiple of 16 from 64 px on.
        crop_min: Smallest area of a crop, as a share of the image's.
        crop_max: Largest area.

    Raises:
        ConfigError: If a value is out of its range.
    """

    count: int = 0
    size: int | Literal["auto"] = "auto"
    crop_min: float = 0.05
    crop_max: float = 0.14

    def __post_init__(self) -> None:
        """Raise for values out of range."""
        check_range("views.small.count", self.count, 0, MOST_SMALL)
        check_range("views.small.crop_max", self.crop_max, 1e-3, 1)
        check_range("views.small.crop_min", self.crop_min, 1e-3, self.crop_max)

    def side(self, image_size: int) -> int:
        """Return the side in px of small views of images of ``image_size`` px."""
        if self.size == AUTO:
            step = 16 if image_size >= SMALLEST_BLURRED else 1  # the usual patch of a transformer
            return max(2, round(SMALL_SHARE * image_size / step) * step)
        check_range("views.small.size", self.size, 2, image_size)
        return int(self.size)


class Recipes:
    """Settings of all views of a batch, and where the views are computed.

    Args:
        views: The settings of each view, a `ViewSpec` or its fields; ``auto`` for those of the
            colour jitter is SimCLR's, half as strong below 64 px.
        device: Where they are computed: ``auto``, ``batched`` or ``workers`` (see `ViewMaker`).
        group: The key that holds ``device``, for the error.

    Raises:
        ConfigError: If a field is unknown, missing or out of its range.
    """

    small = SmallViews()

    def __init__(
        self, views: Sequence[ViewSpec | Mapping[str, Any]], device: str, group: str
    ) -> None:
        check_choice(f"{group}.device", device, PLACES)
        self.device = device
        self.views = [view if isinstance(view, ViewSpec) else _spec(view) for view in views]
        # Which settings follow the image size, per view.
        self.automatic = [
            [] if isinstance(view, ViewSpec) else [n for n in JITTER if view[n] == AUTO]
            for view in views
        ]

    def specs(
        self, image_size: int, flip: bool = True, crop_min: float | Literal["auto"] = 0.0
    ) -> tuple[ViewSpec, ...]:
        """Return a spec per view, `scaled` to ``image_size`` pixels and to the data."""
        strength = SMALL_IMAGE_JITTER if image_size < SMALLEST_BLURRED else 1.0
        return tuple(
            replace(
                scaled(spec, image_size, flip, crop_min),
                **{name: strength * JITTER[name] for name in names},  # type: ignore[arg-type]
            )
            for spec, names in zip(self.views, self.automatic, strict=True)
        )

    def small_specs(
        self, image_size: int, flip: bool = True, crop_min: float | Literal["auto"] = 0.0
    ) -> tuple[ViewSpec, ...]:
        """Return a spec per small view: that of the first view, with smaller crops."""
        smallest = smallest_crop(image_size, crop_min)
        spec = replace(
            self.specs(image_size, flip, crop_min)[0],
            crop_min=max(self.small.crop_min, smallest),
            crop_max=max(self.small.crop_max, smallest),
        )
        return (spec,) * self.small.count


class OneView(Recipes):
    """The one view of supervised training, by the fields of its `ViewSpec`."""

    def __init__(self, device: str = "auto", **settings: Any) -> None:
        super().__init__([settings], device, "augment")


class Views(Recipes):
    """The two views of a method, and small ones (multi-crop) by the fields of `SmallViews`."""

    def __init__(
        self,
        a: ViewSpec | Mapping[str, Any],
        b: ViewSpec | Mapping[str, Any],
        device: str = "auto",
        small: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__([a, b], device, "views")
        self.small = SmallViews(**(small or {}))


def _spec(settings: Mapping[str, Any]) -> ViewSpec:
    """Return a `ViewSpec` from its fields."""
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
    jitter = {name: value for name, value in JITTER.items() if settings[name] == AUTO}
    return ViewSpec(**{**settings, **jitter})
