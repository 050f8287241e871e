"""Loading foreign weights: published ones of torchvision and timm, and state dict files."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from ssl_samix.artifacts.checkpoints import load_plain, opened_safetensors
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.resnet import RESNETS, ResNetTrunk

UNPUBLISHED = "no published weights are known for '{}': begin with random ones"
_log = logging.getLogger(__name__)
# Prefixes that an encoder does not need: classifiers, projections, SwAV's prototypes, MAE's
# decoder, masks.
HEADS = (
    "fc.", "head.", "heads.", "classifier.", "projection_head.", "prototypes.", "decoder_",
    "mask_token", "masked_embed", "patch_masking.",
)  # fmt: skip
TRACKED = "num_batches_tracked"  # BatchNorm's batch counter, which old files lack
# Which of two networks is the encoder: the teacher, not the student (DINO, iBOT); otherwise the
# trained network, not its moving average (MoCo, BYOL).
STUDENT = re.compile(r"student")
AVERAGE = re.compile(r"encoder_k|key_|momentum|teacher|target|(^|[._])ema[._]")
# ViTs that are tried when an error suggests a model; all ResNets are tried as well.
VITS = (
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *("vit_small_patch8_224", "vit_base_patch8_224", "vit_base_patch32_224"),
    "vit_huge_patch14_224",
    *(
        f"vit_{size}_patch14_{registers}dinov2"
        for size in ("small", "base", "large", "giant")
        for registers in ("", "reg4_")
    ),
)
Rename = Callable[[str], str]


def published(name: str, image_size: int | None) -> tuple[Backbone, dict[str, Any]]:
    """Return a backbone with its published weights, downloaded if they are not cached.

    Returns:
        The backbone and its description: image_size, mean and std of its published evaluation, and
        the name of the weights.

    Raises:
        ConfigError: If torchvision and timm have no published weights for the name.
        CheckpointError: If the weights cannot be downloaded.
    """
    try:
        weights, meta = (_torchvisions if name in RESNETS else _timms)(name)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the weights of {name} cannot be fetched: {reason}") from error
    meta["image_size"] = image_size or meta["image_size"]
    backbone = Backbone(name, meta["image_size"], stem="standard")
    load_backbone(backbone, weights, f"the published {name}")
    return backbone, meta


def _torchvisions(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if name not in torchvision.models.list_models():
        raise ConfigError(UNPUBLISHED.format(name))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    shown = weights.transforms()
    meta = {
        "image_size": shown.crop_size[0],
        "mean": list(shown.mean),
        "std": list(shown.std),
        "weights": str(weights),
    }
    return dict(weights.get_state_dict(progress=True, check_hash=True)), meta


def _timms(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise ConfigError(UNPUBLISHED.format(name))
    model = timm.create_model(name, pretrained=True, num_classes=0)
    shown = model.pretrained_cfg
    meta = {
        "image_size": shown["input_size"][-1],
        "mean": list(shown["mean"]),
        "std": list(shown["std"]),
        "weights": shown.get("hf_hub_id") or shown.get("url") or name,
    }
    return model.state_dict(), meta


def from_file(path: Path, name: str | None, prefix: str | None, image_size: int) -> Backbone:
    """Return a backbone with weights from a file that has torchvision's or timm's names.

    Args:
        path: File of ``torch.save`` or safetensors.
        name: The model's name.
        prefix: Prefix of its entries, such as ``module.encoder_q.``, or the end of the prefix;
            None: detected.
        image_size: Side of its images, in px. Position tables of another size are interpolated.

    Raises:
        ConfigError: If the name is missing or unknown.
        CheckpointError: If the file is damaged or does not fit.
    """
    weights = read_weights(path)
    if name is None:
        raise ConfigError(
            f"{path} does not say whose weights it holds: give model=<name>{_hint(weights)}"
        )
    prefix = f"{prefix.rstrip('.')}." if prefix else None
    backbone = _empty(name, weights, prefix, image_size, path)
    fit = _the_one(path, backbone, weights, prefix)
    for what in fit.resampled:
        _log.warning("%s: %s, for images of %d px", path, what, image_size)
    load_backbone(backbone, fit.weights, str(path))
    return backbone


def _empty(
    name: str, weights: dict[str, Tensor], prefix: str | None, image_size: int, path: Path
) -> Backbone:
    """Return the model with random weights; width, stem and heads are read off the weights."""
    if name in RESNETS:
        kernel = first_kernel(weights, prefix) or first_kernel(weights, None)
        if kernel is None:
            raise CheckpointError(
                f"{path} holds no ResNet: it has no conv1.weight of 3 channels{_hint(weights)}"
            )
        return Backbone(name, image_size, kernel[0], "small" if kernel[1] == 3 else "standard")
    # MoCo v3's ViT-S has 12 heads where others have 6, which no tensor's shape shows.
    theirs = any(k.endswith("base_encoder.patch_embed.proj.weight") for k in weights)
    if theirs and name.partition(".")[0] == "vit_small_patch16_224":
        _log.info("%s: 12 heads, as MoCo v3 has them", name)
        return Backbone(name, image_size, options={"num_heads": 12})
    return Backbone(name, image_size)


def _the_one(path: Path, backbone: Backbone, weights: dict[str, Tensor], prefix: str | None) -> Fit:
    found = find(_model(backbone), weights)
    fitting = [fit for fit in found if fit.problem is None]
    if not fitting:
        total = len(_model(backbone).state_dict())
        problem, matched = (found[0].problem, found[0].matched) if found else ("", 0)
        raise CheckpointError(
            f"{path} does not fit {backbone.name}: {problem or 'it has none of its names'} "
            f"({matched} of {total} found){_hint(weights)}"
        )
    asked = [fit for fit in fitting if f".{fit.prefix}".endswith(f".{prefix or ''}")]
    left = choose(asked if prefix else fitting)
    if len(left) != 1:
        problem = "several encoders" if left else f"no {backbone.name} under prefix={prefix}"
        known = " or ".join(sorted(fit.prefix for fit in left or fitting))
        raise CheckpointError(f"{path} holds {problem}: give prefix=<{known}>")
    return left[0]


def _hint(weights: dict[str, Tensor]) -> str:
    """Return the end of an error message: entries of the file, and the model that they fit."""
    some, rest = ", ".join(list(weights)[:3]), len(weights) - 3
    found = f"; the file has {some}" + (f" and {rest} more" if rest > 0 else "")
    model = model_for(weights)
    return f"{found}, which fit model={model}" if model else found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of any origin, by name.

    Returns:
        The tensors; the keys of nested dicts are joined by dots.

    Raises:
        CheckpointError: If it is damaged, would run code, or holds no weights.
    """
    if path.suffix == ".safetensors":
        with opened_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    tensors = flatten(load_plain(path))
    if not tensors:
        raise CheckpointError(f"{path} holds no weights")
    return tensors


def _model(backbone: Backbone) -> nn.Module:
    """Return the module of a backbone whose parameters have the library's names."""
    return backbone.get_submodule("trunk" if backbone.name in RESNETS else "trunk.model")


def load_backbone(backbone: Backbone, weights: dict[str, Tensor], what: str) -> None:
    """Load weights with the library's names into a backbone; only heads may be left over.

    Raises:
        CheckpointError: If an entry is missing, has another shape, or is unknown.
    """
    model = _model(backbone)
    state = model.state_dict()
    problem = misfit(state, weights)
    if problem is not None:
        raise CheckpointError(f"{what} does not fit {backbone.name}: {problem}")
    left = sorted(weights.keys() - state.keys())
    if left:
        _log.info("not loaded, being of heads: %s", ", ".join(left))
    # Updating the state keeps BatchNorm's counters, which old files lack, and the versions of its
    # modules.
    state.update((k, weights[k]) for k in weights.keys() & state.keys())
    model.load_state_dict(state, strict=True)


@dataclass(frozen=True)
class Fit:
    """A candidate for a model's weights in a file.

    Attributes:
        prefix: Prefix of the names in the file.
        weights: Tensors by the names of the model's library.
        matched: Number of the model's names that were found.
        problem: Why these weights cannot be loaded into the model; None if they can.
        resampled: How position tables were interpolated; empty if none was.
    """

    prefix: str
    weights: dict[str, Tensor]
    matched: int
    problem: str | None
    resampled: tuple[str, ...] = ()


def flatten(found: Any, prefix: str = "", above: frozenset[int] = frozenset()) -> dict[str, Tensor]:
    """Return all tensors in nested dicts, their keys joined by dots."""
    if not isinstance(found, Mapping) or id(found) in above:  # a pickle may contain itself
        return {}
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        else:
            tensors |= flatten(value, f"{prefix}{key}.", above | {id(found)})
    return tensors


def misfit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """Return why weights do not fit a state dict; None if they do, heads left over aside."""
    common = wanted.keys() & weights.keys()
    missing = [k for k in wanted.keys() - common if not k.endswith(TRACKED)]
    unknown = [k for k in weights.keys() - common if not k.startswith(HEADS)]
    other = [k for k in common if wanted[k].shape != weights[k].shape]
    for names, problem in ((missing, "lacks"), (unknown, "also has"), (other, "has another")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"it {problem} {min(names)}{more}"
    return None


def find(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Fit]:
    """Return where a model of torchvision or timm is found among weights, under any prefix.

    Returns:
        The candidates that fit; if none fits, the one with most of the model's names; if none has
        any of its names, an empty list.
    """
    wanted = model.state_dict()
    found: dict[str, Fit] = {}
    for rename in (_as_they_are, _by_position(model), _without_chunks):
        counts = Counter(p for name in weights for p in _prefixes(name, rename, wanted.keys()))
        whole = [p for p, count in counts.items() if 2 * count > len(wanted)]
        for prefix in whole or [p for p, _ in counts.most_common(1)]:
            fit = _fit(model, wanted, weights, prefix, rename)
            known = found.get(prefix)
            if known is None or (known.problem and not fit.problem):
                found[prefix] = fit
    fitting = [fit for fit in found.values() if fit.problem is None]
    return fitting or sorted(found.values(), key=lambda fit: -fit.matched)[:1]


def _prefixes(name: str, rename: Rename, wanted: Any) -> Iterator[str]:
    """Yield each prefix of a name after which the rest is one of the wanted names."""
    start = 0
    while True:
        if rename(name[start:]) in wanted:
            yield name[:start]
        start = name.find(".", start) + 1
        if not start:
            return


def _as_they_are(name: str) -> str:
    return name


def _by_position(model: nn.Module) -> Rename:
    """Return the renaming of ``nn.Sequential(*resnet.children())``: "4." to "layer1." and so on."""
    children = [name for name, _ in model.named_children()]

    def rename(name: str) -> str:
        first, dot, rest = name.partition(".")
        place = int(first) if first.isdecimal() else len(children)
        return children[place] + dot + rest if place < len(children) else name

    # A ResNet runs its children in order; other models need not.
    return rename if isinstance(model, ResNetTrunk) else _as_they_are


def _without_chunks(name: str) -> str:
    """Return a block's name without DINOv2's chunks: "blocks.1.7." is the eighth block."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _fit(
    model: nn.Module,
    wanted: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    prefix: str,
    rename: Rename,
) -> Fit:
    there = {rename(k.removeprefix(prefix)): v for k, v in weights.items() if k.startswith(prefix)}
    matched, problem = len(wanted.keys() & there.keys()), misfit(wanted, there)
    converted = _converted(model, wanted, there) if problem else {}
    if converted and misfit(wanted, converted) is None:
        return Fit(prefix, converted, matched, None, tuple(_resampled(there, converted)))
    return Fit(prefix, there, matched, problem)


def _converted(
    model: nn.Module, wanted: Mapping[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return weights converted by timm (DINOv2's names, sizes of position tables), else {}."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    common = wanted.keys() & weights.keys()
    # timm would also resample patch projections, which changes the features.
    if convert is None or any(
        wanted[k].numel() != weights[k].numel() and not _is_table(k) for k in common
    ):
        return {}
    try:
        return convert(dict(weights), model)
    except (KeyError, IndexError, ValueError, AssertionError, RuntimeError):
        return {}  # weights of another model, which timm cannot convert


def _is_table(name: str) -> bool:
    return "pos" in name.rpartition(".")[2]  # pos_embed, relative_position_bias_table, ...


def _resampled(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[str]:
    for name in filter(_is_table, before.keys() & after.keys()):
        # isqrt ignores tokens without a place, which the conversion may have moved
        old, new = (math.isqrt(state[name].shape[-2]) for state in (before, after))
        if old != new:
            yield f"{name} of {old}x{old} places is interpolated to {new}x{new}"


def choose(fits: list[Fit]) -> list[Fit]:
    """Return the encoder among the candidates that fit; several if none is preferred."""
    different: list[Fit] = []
    for fit in fits:
        if not any(_same(fit.weights, other.weights) for other in different):
            different.append(fit)
    left = different
    for worse in (STUDENT, AVERAGE):
        left = [fit for fit in left if not worse.search(fit.prefix)] or left
    if len(left) == 1 and len(different) > 1:
        others = " or ".join(fit.prefix for fit in different if fit is not left[0])
        _log.info("taken is prefix=%s; also there: prefix=%s", left[0].prefix, others)
    return left


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    names = {k for k in one.keys() | other.keys() if not k.startswith(HEADS)}
    return all(k in one and k in other and torch.equal(one[k], other[k]) for k in names)


def first_kernel(weights: Mapping[str, Tensor], prefix: str | None) -> tuple[int, int] | None:
    """Return output channels and side of a ResNet's first kernel; None if there is none."""
    for name, weight in weights.items():
        if (
            re.search(r"(^|\.)(conv1|0)\.weight$", name)
            and weight.ndim == 4
            and weight.shape[1] == 3
            and (not prefix or f".{prefix}" in f".{name}")
        ):
            return weight.shape[0], weight.shape[-1]
    return None


def model_for(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of a known model that the weights fit, or None."""
    for name, model in _known(weights):
        fits = find(model, weights)
        if fits and fits[0].problem is None:
            return name
    return None


def _known(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Module]]:
    kernel = first_kernel(weights, None)
    with torch.device("meta"):  # shapes only
        if any(name.endswith("cls_token") for name in weights):
            yield from ((name, timm.create_model(name, num_classes=0)) for name in VITS)
        elif kernel is not None:
            for name in RESNETS:
                yield name, ResNetTrunk(name, kernel[0], small_stem=kernel[1] == 3)
