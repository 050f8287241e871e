"""Values of ``auto`` for a data set; docs/defaults.md has the evidence for the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omegaconf import DictConfig, OmegaConf

from ssl_samix.data.datamodule import DataModule, power_of_two
from ssl_samix.data.view_spec import JITTER
from ssl_samix.errors import ConfigError
from ssl_samix.models.resnet import RESNETS

AUTO = "auto"
IMAGES_SEEN = 100_000  # per run, with repetition: about two CPU minutes at 16 px
EPOCHS = (20, 200)  # minimum and maximum
MIXTURE_SIZE, SHRUNK_FROM = 0.67, 24  # of the views' side; px, of the views
WARMUP = 0.05  # fraction of the run
LARGEST_QUEUE = 65536  # keys, as in MoCo's paper for ImageNet
# Learning rates of SGD at batch size 256, by method.
SGD_RATES = {"simclr": 0.5, "moco": 0.25}
OTHER_SGD_RATE = 0.12
# No rate that was tried is good enough with every policy; a value to start from.
UNTUNED = {"swav": 0.5, "dino": 0.5}


def epochs(config: DictConfig, choices: dict[str, str], images: int) -> int:
    """Return the epochs that process about 100,000 images in total, between 20 and 200."""
    fewest, most = EPOCHS
    return min(most, max(fewest, round(IMAGES_SEEN / images)))


def warmup(config: DictConfig, choices: dict[str, str], images: int) -> float:
    """Return the warm-up length in epochs, 5% of the run."""
    return float(WARMUP * config.trainer.max_epochs)


def learning_rate(config: DictConfig, choices: dict[str, str], images: int) -> float:
    """Return the SGD learning rate of the method.

    Raises:
        ConfigError: If there is none for this method.
    """
    method = choices.get("method", "")
    if method in UNTUNED:
        raise ConfigError(
            f"there is no automatic learning rate for method={method}: set optimizer.lr, "
            f"{UNTUNED[method]} to start with"
        )
    return SGD_RATES.get(method, OTHER_SGD_RATE)


def queue_size(config: DictConfig, choices: dict[str, str], images: int) -> int:
    """Return the largest power of two that is at most half the number of images."""
    return min(LARGEST_QUEUE, power_of_two(images / 2))


def mixture_size(config: DictConfig, choices: dict[str, str], images: int) -> float:
    """Return 2/3 for mixtures beside the views of a ResNet, which takes any size, else 1.

    Views that are known to be smaller than 24 px stay whole: a Mixer gains nothing there.
    """
    beside = "method" in choices and config.mixup.placement != "replace"
    side = config.data.image_size
    large = side == AUTO or side >= SHRUNK_FROM
    return MIXTURE_SIZE if beside and large and config.backbone.name in RESNETS else 1.0


# The order matters: later rules read values that earlier ones have set.
RULES: dict[str, Callable[[DictConfig, dict[str, str], int], float]] = {
    "trainer.max_epochs": epochs,
    "optimizer.warmup_epochs": warmup,
    "optimizer.lr": learning_rate,
    "method.queue_size": queue_size,
    "mixup.size": mixture_size,
}


def known_of(data: DataModule) -> dict[str, float]:
    """Return the values chosen by a data module, by key."""
    chosen = {"data.batch_size": data.batch_size, "data.crop_min": data.crop_min}
    for view, spec in zip("ab", data.specs, strict=False):
        chosen |= {f"views.{view}.{name}": getattr(spec, name) for name in JITTER}
    if data.small_size is not None:
        chosen["views.small.size"] = data.small_size
    return chosen


def resolve_auto(
    config: DictConfig, choices: dict[str, str], images: int, known: Mapping[str, float]
) -> dict[str, float]:
    """Replace ``auto`` in a configuration by values for a data set.

    Args:
        config: Configuration; modified in place.
        choices: The chosen name in each group.
        images: Number of training images.
        known: Values determined by the images, by key; see ``known_of``.

    Returns:
        The values that were set, by dotted key.
    """
    found: dict[str, float] = {}
    for key in (*known, *RULES):
        if OmegaConf.select(config, key) == AUTO:
            found[key] = known[key] if key in known else RULES[key](config, choices, images)
            OmegaConf.update(config, key, found[key])
    return found
