"""What ``auto`` means for the images at hand; docs/defaults.md says what the rules rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omegaconf import DictConfig, OmegaConf

from ssl_samix.data.datamodule import DataModule, power_of_two
from ssl_samix.data.view_spec import JITTER

AUTO = "auto"
IMAGES_SEEN = 100_000  # by a run, with repetition: about two CPU minutes of 16 px
EPOCHS = (20, 200)  # fewest and most
WARMUP = 0.05  # share of the run
LARGEST_QUEUE = 65536  # keys, as in MoCo's paper for ImageNet
# Learning rates of SGD at a batch of 256 images, by method.
SGD_RATES = {"simclr": 0.5, "moco": 0.25}
OTHER_SGD_RATE = 0.12


def epochs(config: DictConfig, choices: dict[str, str], images: int) -> int:
    """Return as many epochs as show about 100,000 images: 20 to 200."""
    fewest, most = EPOCHS
    return min(most, max(fewest, round(IMAGES_SEEN / images)))


def warmup(config: DictConfig, choices: dict[str, str], images: int) -> float:
    """Return a twentieth of the run, in epochs."""
    return float(WARMUP * config.trainer.max_epochs)


def learning_rate(config: DictConfig, choices: dict[str, str], images: int) -> float:
    """Return the method's learning rate of SGD."""
    return SGD_RATES.get(choices.get("method", ""), OTHER_SGD_RATE)


def queue_size(config: DictConfig, choices: dict[str, str], images: int) -> int:
    """Return the largest power of two that is at most half the images."""
    return min(LARGEST_QUEUE, power_of_two(images / 2))


# In this order: later rules read what earlier ones have set.
RULES: dict[str, Callable[[DictConfig, dict[str, str], int], float]] = {
    "trainer.max_epochs": epochs,
    "optimizer.warmup_epochs": warmup,
    "optimizer.lr": learning_rate,
    "method.queue_size": queue_size,
}


def known_of(data: DataModule) -> dict[str, float]:
    """Return the values that a data module has chosen, by their keys."""
    chosen = {"data.batch_size": data.batch_size, "data.crop_min": data.crop_min}
    for view, spec in zip("ab", data.specs, strict=False):
        chosen |= {f"views.{view}.{name}": getattr(spec, name) for name in JITTER}
    return chosen


def resolve_auto(
    config: DictConfig, choices: dict[str, str], images: int, known: Mapping[str, float]
) -> dict[str, float]:
    """Replace ``auto`` in a configuration by values for these data.

    Args:
        config: Changed in place.
        choices: The choice made in each group.
        images: Number of training images.
        known: Values of keys that follow from the images, see ``known_of``.

    Returns:
        What was set, by its dotted key.
    """
    found: dict[str, float] = {}
    for key in (*known, *RULES):
        if OmegaConf.select(config, key) == AUTO:
            found[key] = known[key] if key in known else RULES[key](config, choices, images)
            OmegaConf.update(config, key, found[key])
    return found
