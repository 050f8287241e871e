"""``samix show-mixing``: write a picture of images mixed by a trained Mixer.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_samix.artifacts.hub import is_remote, local, short_name
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import compose
from ssl_samix.data.folder import FolderIndex, given_images, join_names
from ssl_samix.data.layout import is_there
from ssl_samix.errors import CheckpointError, ConfigError, DataError, check_range
from ssl_samix.files import expanded

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ssl_samix.artifacts.mixer import TrainedMixer

MOST_ROWS = 64
TRAIN_NO_MIXER = (
    "ssl_samix.mixup.objective.MixObjective",
    "ssl_samix.artifacts.mixer.PretrainedObjective",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShowMixingRequest:
    """Checked arguments of ``samix show-mixing``."""

    run: Path  # folder or file
    images: FolderIndex | None  # None: the run's own training images
    out: Path
    lams: list[float]
    rows: int
    seed: int


def parse_show_mixing(words: list[str]) -> ShowMixingRequest:
    """Return the checked request of ``key=value`` arguments.

    Raises:
        UserError: For the first error in them.
    """
    config, _ = compose("show_mixing", words)
    if config.run is None:
        raise ConfigError("show-mixing needs a trained Mixer: run=<run with mixup=samix>")
    lams = list(config.lams)
    if not lams:
        raise ConfigError("lams needs at least one ratio, such as [0.5]")
    for lam in lams:
        check_range("lams", lam, 0, 1)
    check_range("rows", config.rows, 1, MOST_ROWS)
    check_range("seed", config.seed, 0)
    run = local(str(config.run))
    _check_run(run, own_images=config.images is None)
    images = None if config.images is None else _at_least_two(str(config.images))
    beside = (run if run.is_dir() else run.parent) / "mixing.png"
    if is_remote(str(config.run)):  # not in the cache, into the current folder
        beside = Path(f"{short_name(config.run)}-mixing.png")
    out = beside if config.out is None else expanded(str(config.out))
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out={out}: the picture is a PNG, give it a name that ends in .png")
    return ShowMixingRequest(run, images, out, lams, config.rows, config.seed)


def _check_run(run: Path, own_images: bool) -> None:
    """Check by the run's configuration that it has a Mixer, and that its images exist."""
    if not run.exists():
        raise CheckpointError(f"run={run} does not exist: give a run folder or mixer.safetensors")
    if not run.is_dir() and own_images:
        raise ConfigError(f"run={run} is a file and names no images: give images=<folder>")
    if not run.is_dir() or not (own_images or RunFolder(run).config.exists()):
        return
    config, choices = RunFolder(run).load_config()
    if not config.mixup or config.mixup.get("_target_") in TRAIN_NO_MIXER:
        raise CheckpointError(f"{run} holds no Mixer: it is of a run with mixup={choices['mixup']}")
    name, root = config.data.name, config.data.root
    if own_images and not is_there(name, root):
        gone = f"not in {root} any more" if root else "not with it"
        raise DataError(f"the run's images are {gone}: give images=<folder>")


def _at_least_two(folder: str) -> FolderIndex:
    images = given_images(folder)
    if len(images.train.paths) < 2:
        raise DataError(f"images={folder} holds one image: mixing takes at least 2")
    return images


def show(request: ShowMixingRequest) -> Path:
    """Write the picture and return its path.

    Raises:
        UserError: If there is no Mixer, there are fewer than 2 images, or the picture cannot be
            written.
    """
    from ssl_samix.artifacts.mixer import load_mixer
    from ssl_samix.pictures import write_png

    mixer = load_mixer(request.run)
    if request.images is None:
        pixels = _own_images(request, mixer.image_size)
    else:
        for note in request.images.notes:
            _log.warning("%s", note)
        pixels = _decoded(request, request.images.train.paths, mixer.image_size)
    write_png(request.out, _painted(mixer, pixels, request))
    return request.out


def _own_images(request: ShowMixingRequest, size: int) -> Tensor:
    """Return training images of the run without augmentation, (N, 3, S, S) uint8."""
    from ssl_samix.data.datasets import load_splits
    from ssl_samix.training.mixed_pictures import fixed_images

    data = RunFolder(request.run).load_config()[0].data
    # memory_gb=0: images are decoded on demand, so only those shown take memory.
    splits = load_splits(data.name, data.root, size, data.limit, labels=data.labels, memory_gb=0)
    return fixed_images(splits.train, 2 * request.rows, request.seed)


def _decoded(request: ShowMixingRequest, paths: list[str], size: int) -> Tensor:
    """Return 2 x rows images, or all, decoded in random order, (N, 3, S, S) uint8."""
    import torch

    from ssl_samix.data.decode import decoded
    from ssl_samix.data.images import fit, resized_side
    from ssl_samix.data.sources import PathSource

    source, found, damaged = PathSource(paths), [], []
    generator = torch.Generator().manual_seed(request.seed)
    for i in torch.randperm(len(paths), generator=generator).tolist():
        image = decoded(source, i, 2 * resized_side(size))
        if isinstance(image, str):
            damaged.append(image)
            continue
        found.append(fit(image, size))
        if len(found) == 2 * request.rows:
            break
    if damaged:
        named = join_names(damaged)
        if len(found) < 2:
            raise DataError(f"of {len(paths)} images {len(found)} can be read: repair {named}")
        tried = len(damaged) + len(found)
        _log.warning(
            "%d of %d images cannot be read and are skipped: %s", len(damaged), tried, named
        )
    return torch.stack(found)


def _painted(mixer: TrainedMixer, pixels: Tensor, request: ShowMixingRequest) -> Image.Image:
    import torch

    from ssl_samix.data.views import normalize
    from ssl_samix.pictures import colours, greys, paint
    from ssl_samix.training.mixed_pictures import paired
    from ssl_samix.types import MixPlan

    mean, std = mixer.mean, mixer.std
    images = normalize(pixels, torch.tensor(mean), torch.tensor(std))
    own, other = paired(images, request.rows)
    every = torch.arange(len(own))
    header, columns = ["image", "partner"], [colours(i, mean, std) for i in (own, other)]
    for lam in request.lams:
        plan = MixPlan(torch.full((len(own),), float(lam)), every, every)
        mixed = mixer.mix(own, other, plan)
        header += [f"lam {lam:g}\nmask", f"lam {lam:g}\nmixture"]
        columns += [greys(mixed.mask), colours(mixed.images, mean, std)]
    return paint(header, list(zip(*columns, strict=True)))
