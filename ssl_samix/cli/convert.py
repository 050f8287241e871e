"""``samix convert``: convert other projects' checkpoints to encoder and Mixer files.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.errors import CheckpointError, ConfigError, check_choice, check_range
from ssl_samix.files import expanded, make_folder

if TYPE_CHECKING:
    from ssl_samix.artifacts.openmixup import Checkpoint

KINDS = ("openmixup",)
NETWORKS = ("q", "k")
UPSAMPLING = ("bilinear", "nearest")
Channels = tuple[float, float, float]
# image_size, mean and std of OpenMixup's configurations, by the stem and the number of classes.
# They normalise CIFAR-10 and CIFAR-100 with the same numbers.
CIFAR = (32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))
PHOTOGRAPHS = (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = {10: CIFAR, 100: CIFAR, 200: (64, *PHOTOGRAPHS[1:])}  # 200: Tiny ImageNet


@dataclass(frozen=True)
class ConvertRequest:
    """Checked arguments of ``samix convert``; None: read from the file or a default.

    Attributes:
        path: The checkpoint.
        out: The folder to write.
        network: Network that becomes the encoder: ``q``, the trained one, or ``k``, its moving
            average.
        encoder_only: Do not convert the Mixer.
        image_size: Side of the training images, in px.
        mean: Mean per channel that they were normalised with, for pixels in [0, 1].
        std: Standard deviation per channel, likewise.
        lam_mul_k: OpenMixup's setting of that name; negative: the ratio is not bent.
        upsampling: Interpolation of the mask: ``bilinear`` or ``nearest``.
    """

    path: Path
    out: Path
    network: str = "q"
    encoder_only: bool = False
    image_size: int | None = None
    mean: Channels | None = None
    std: Channels | None = None
    lam_mul_k: float | None = None
    upsampling: str | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; samix convert --help shows what it takes")


def main(words: list[str]) -> str:
    """Convert a checkpoint and return the text to print: the files and their contents.

    Args:
        words: Command-line arguments, such as ``["openmixup", "file.pth", "-o", "folder"]``.

    Raises:
        UserError: For the first error; nothing is written then.
    """
    if {"-h", "--help"} & set(words):
        return _parser().format_help().rstrip()
    return "\n".join(convert(parse_convert(words)))


def parse_convert(words: list[str]) -> ConvertRequest:
    """Return the checked request of command-line arguments; the checkpoint is not opened.

    Raises:
        UserError: For the first error in them.
    """
    given = vars(_parser().parse_args(words))
    check_choice("kind of checkpoint", given.pop("kind"), KINDS)
    check_choice("--network", given["network"], NETWORKS)
    for name, least in (("--image-size", 8), ("--lam-mul-k", -1)):
        value = given[name[2:].replace("-", "_")]
        if value is not None:
            check_range(name, value, least, 4096)
    if given["upsampling"] is not None:
        check_choice("--upsampling", given["upsampling"], UPSAMPLING)
    for key, smallest in (("mean", 0.0), ("std", 1e-6)):
        given[key] = None if given[key] is None else _channels(key, given[key], smallest)
    request = ConvertRequest(**{**given, **{k: expanded(given[k]) for k in ("path", "out")}})
    _check_paths(request)
    return request


def _channels(key: str, text: str, smallest: float) -> Channels:
    try:
        red, green, blue = (float(part) for part in re.split(r"[\s,]+", text.strip("[]() ")))
    except ValueError as error:
        raise ConfigError(f"--{key} needs three numbers, as 0.485,0.456,0.406") from error
    for value in (red, green, blue):
        check_range(f"--{key}", value, smallest, 1)
    return red, green, blue


def _check_paths(request: ConvertRequest) -> None:
    if not request.path.is_file():
        raise CheckpointError(f"there is no checkpoint {request.path}")
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"-o {request.out} is a file: give a new folder")
    if request.out.is_dir() and any(request.out.iterdir()):
        raise ConfigError(f"-o {request.out} is not empty: give a new folder")


def convert(request: ConvertRequest) -> list[str]:
    """Write the encoder and, if the file has one, the Mixer.

    Returns:
        Lines to print: the files written, and the settings that were read or assumed.

    Raises:
        UserError: If the file is not a checkpoint of OpenMixup, or our models cannot compute the
            same. Nothing is written then.
    """
    from ssl_samix.artifacts import openmixup
    from ssl_samix.artifacts.checkpoints import describe
    from ssl_samix.artifacts.encoder import save_encoder

    checkpoint, out = openmixup.read(request.path), RunFolder(request.out)
    trained, average = checkpoint.networks
    name = average if request.network == "k" else trained
    if name is None:
        raise CheckpointError(f"{request.path} has no moving average: it has {trained} alone")
    images = _images(checkpoint, name, request)
    size = images["image_size"]
    encoder = openmixup.network(checkpoint, name, size)
    meta = {"method": "openmixup", "network": name, "mixup": "none", **images}
    meta |= {"backbone": encoder.settings, "feature_dim": encoder.feature_dim}
    lines = [
        f"{out.encoder}  {name}, {describe(encoder.settings)}, of images of {size} px, "
        f"mean {images['mean']}, std {images['std']}"
    ]
    if request.encoder_only or average is None or not checkpoint.under("mix_block."):
        reason = "--encoder-only" if request.encoder_only else f"{request.path} has no mix_block"
        lines.append(f"no Mixer: {reason}")
        make_folder(out.path)
    else:
        lines.append(_mixer(checkpoint, average, request, meta))
    save_encoder(out.encoder, encoder, meta)
    return lines


def _mixer(
    checkpoint: Checkpoint, average: str, request: ConvertRequest, meta: dict[str, Any]
) -> str:
    """Write the Mixer, add it to the description ``meta``, and return a line about it."""
    from ssl_samix.artifacts.mixer import save_mixer
    from ssl_samix.artifacts.openmixup import mixer, network
    from ssl_samix.mixup.mixer import SAMix

    teacher = network(checkpoint, average, meta["image_size"])
    k, upsampling = request.lam_mul_k, request.upsampling
    stage, settings, state = mixer(checkpoint, teacher, k, upsampling)
    policy = SAMix(**settings)
    policy.block.load_state_dict(state, strict=True)
    meta |= {"mixup": "samix", "mixer": {"stage": stage, "settings": settings}}
    path = RunFolder(request.out).mixer
    make_folder(path.parent)
    save_mixer(path, teacher, policy, meta)
    bend = -1 if settings["lam_curve"] is None else settings["lam_curve"]
    return (
        f"{path}  mix_block, reads stage {stage} of {average}, lam_mul_k {bend:g}, "
        f"lam_margin {settings['lam_margin']:g}, {settings['upsampling']} masks"
    )


def _images(checkpoint: Checkpoint, name: str, request: ConvertRequest) -> dict[str, Any]:
    """Return image_size, mean and std: from the user, the configuration, or the weights."""
    from ssl_samix.artifacts.openmixup import channels, side

    first = checkpoint.weights.get(f"{name}.conv1.weight")
    small = first is not None and first.shape[-1:] == (3,)
    usual = SMALL.get(checkpoint.classes or 0) if small else PHOTOGRAPHS
    said = (side(checkpoint.settings), *(channels(checkpoint.settings, k) for k in ("mean", "std")))
    known: dict[str, Any] = {
        key: getattr(request, key) or said[place] or (usual and usual[place])
        for place, key in enumerate(("image_size", "mean", "std"))
    }
    if None in known.values():
        raise ConfigError(
            f"{request.path} does not say which images it was trained on: "
            "give --image-size, --mean and --std"
        )
    return {**known, "mean": list(known["mean"]), "std": list(known["std"])}


def _parser() -> _Parser:
    parser = _Parser(
        "samix convert",
        usage="samix convert openmixup <file.pth> -o <folder> [option]...",
        description="Turn a checkpoint of OpenMixup, of its AutoMixup/SAMix classifiers or of its "
        "self-supervised methods, into an encoder (encoder.safetensors) and, where there is one, a "
        "Mixer (mixer.safetensors). What the file does not say is what OpenMixup's own "
        "configurations have; the options say otherwise.",
        allow_abbrev=False,
    )
    # A metavar of its own: the error for a missing argument shows it.
    parser.add_argument("kind", metavar="openmixup", help="whose checkpoint it is")
    parser.add_argument("path", metavar="file.pth", help="the checkpoint")
    parser.add_argument("-o", "--out", metavar="folder", required=True, help="new or empty")
    parser.add_argument(
        "--network", default="q", help="q: the trained network (default); k: its moving average"
    )
    parser.add_argument("--encoder-only", action="store_true", help="leave the Mixer")
    parser.add_argument("--image-size", type=int, metavar="px", help="side of its images")
    parser.add_argument("--mean", metavar="r,g,b", help="of its images, for pixels in 0..1")
    parser.add_argument("--std", metavar="r,g,b", help="likewise")
    parser.add_argument(
        "--lam-mul-k", type=float, metavar="k", help="its mix_block's lam_mul_k; -1: none"
    )
    parser.add_argument("--upsampling", help="its mix_block's: bilinear or nearest")
    return parser
