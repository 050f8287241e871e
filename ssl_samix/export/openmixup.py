"""What is in a checkpoint of OpenMixup's AutoMixup/SAMix classifiers, in terms of ours."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.backbones.resnet import RESNETS
from ssl_samix.checkpoint_io import load_plain
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.evaluation.foreign import load_strictly

LAM_MARGIN = 0.08  # of all SAMix configurations: an encoder's mixtures nearer to 0 or 1 are flat
MOST_BEND = 10.0  # a larger lam_mul_k counts as this
# Parts of our MixBlock -> what they are called there.
PARTS = {
    "query": "query.conv",
    "key": "key.conv",
    "value.0": "value.conv.0.conv",
    "value.1": "value.conv.0.bn",
    "value.3": "value.conv.1.conv",
}
LAST_BIAS = "value.conv.1.conv.bias"  # which SAMix's configurations leave out


@dataclass(frozen=True)
class Checkpoint:
    """A file: its weights by OpenMixup's names, and its configuration; published ones have none."""

    path: Path
    weights: dict[str, Tensor]
    config: str

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights whose names begin with ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}

    @property
    def classes(self) -> int | None:
        """The number of classes of its classifiers."""
        heads = (k for k in self.weights if re.fullmatch(r"head\w*\.(fc|fc_cls)\.weight", k))
        return next((len(self.weights[k]) for k in heads), None)

    def said(self, name: str) -> Any:
        """Return the first value that the configuration gives a setting; None: it does not."""
        found = re.search(rf"\b{name}\s*=\s*(\[[^\]]*\]|[^,)\s]+)", self.config)
        try:
            return None if found is None else ast.literal_eval(found[1])
        except (ValueError, SyntaxError):
            return None

    def one(self, given: Any, name: str, usual: Any) -> Any:
        """Return what the user gives, or the setting's only value, or the usual one.

        Raises:
            ConfigError: If it has several, of which OpenMixup draws one in each step.
        """
        value = self.said(name) if given is None else given
        if isinstance(value, list) and len(value) != 1:
            option = "--upsampling" if name == "unsampling_mode" else "--lam-mul-k"
            raise ConfigError(f"{self.path} was trained with {name}={value}: choose by {option}")
        value = value[0] if isinstance(value, list) else value
        return usual if value is None else value

    def require(self, name: str, value: Any) -> None:
        """Refuse a setting that no shape shows, if the configuration gives it another value.

        Raises:
            CheckpointError: With both values.
        """
        if self.said(name) not in (None, value):
            found = f"{name}={self.said(name)!r}"
            raise CheckpointError(f"{self.path} was trained with {found}: it must be {value!r}")


def read(path: Path) -> Checkpoint:
    """Read a file as OpenMixup trains or publishes it.

    Raises:
        CheckpointError: If it is damaged, would run code, or is none of OpenMixup's classifiers.
    """
    found = load_plain(path)
    found = found if isinstance(found, Mapping) else {}
    state, meta = found.get("state_dict", found), found.get("meta")
    state = state if isinstance(state, Mapping) else {}
    weights = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    networks = {k.split(".")[0] for k in weights}
    if "backbone_q" not in networks and not {"backbone", "head"} <= networks:
        raise CheckpointError(
            f"{path} is no checkpoint of OpenMixup's classifiers: it has no backbone_q"
        )
    config = meta.get("config") if isinstance(meta, Mapping) else None
    return Checkpoint(path, weights, config if isinstance(config, str) else "")


def network(checkpoint: Checkpoint, name: str, image_size: int) -> Backbone:
    """Build a ResNet by the shapes of its weights, and load them.

    Raises:
        CheckpointError: If the file has no such network, or one that ours cannot be.
    """
    checkpoint.require("style", "pytorch")  # where a bottleneck has its stride
    weights, what = checkpoint.under(f"{name}."), f"{name} in {checkpoint.path}"
    if not weights:
        raise CheckpointError(f"{checkpoint.path} has no {name}")
    if any(k.startswith("stem.") for k in weights):
        raise CheckpointError(
            f"{what} begins with three convolutions (ResNetV1c, V1d): only ResNets that begin with "
            "one are converted"
        )
    first = weights.get("conv1.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{what} is no ResNet: it has no conv1")
    stem = "small" if first.shape[-1] == 3 else "standard"
    backbone = Backbone(_resnet(weights, what), image_size, len(first), stem)  # type: ignore[arg-type]
    load_strictly(backbone, weights, what)
    return backbone


def _resnet(weights: dict[str, Tensor], what: str) -> str:
    """Name the ResNet whose numbers of blocks, kind of block and groups these are."""
    counts = tuple(
        len({k.split(".")[1] for k in weights if k.startswith(f"layer{n}.")}) for n in range(1, 5)
    )
    deep = "layer1.0.conv3.weight" in weights
    middle, last = (weights.get(f"layer1.0.conv{n}.weight") for n in (2, 3 if deep else 2))
    if middle is not None and last is not None and middle.ndim == 4:
        each, planes = middle.shape[1], len(last) // (4 if deep else 1)
        base = round(64 * each / planes)  # width of a group, in a network of width 64
        shown = (Bottleneck if deep else BasicBlock, counts, len(middle) // each, base)
        fitting = [name for name, known in RESNETS.items() if known == shown]
        if fitting:
            return fitting[0]
    raise CheckpointError(f"{what} is no ResNet that is known: its stages have {counts} blocks")


def mixer(
    checkpoint: Checkpoint, teacher: Backbone, lam_mul_k: float | None, upsampling: str | None
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Describe a Mixer that computes the masks of the file's mix_block.

    Returns:
        The stage that it reads, the arguments of ``SAMix``, and the state of its ``MixBlock``.

    Raises:
        UserError: If the mix_block computes what ours cannot, or its settings are not known.
    """
    for name in ("lam_residual", "use_scale"):
        checkpoint.require(name, True)
    found = {  # older files have no ".conv" here
        re.sub(r"^(query|key)\.(weight|bias)$", r"\1.conv.\2", k): v
        for k, v in checkpoint.under("mix_block.").items()
    }
    what = f"mix_block in {checkpoint.path}"
    inner, both = _check_parts(found, what)
    stages = [n for n in range(1, 5) if 2 * teacher.map_spec(n).channels == both]
    if not stages:
        raise _unfit(what, f"no stage of backbone_k has half of its query's {both} channels")
    bend = checkpoint.one(lam_mul_k, "lam_mul_k", _usual_bend(teacher, checkpoint.classes))
    settings = {
        "channels": both // 2,
        "lam": "drawn",
        "lam_margin": LAM_MARGIN,
        "form": "paper",
        "width": inner,
        "upsampling": checkpoint.one(upsampling, "unsampling_mode", "bilinear"),
        "activation": "elu",
        "lam_curve": min(float(bend), MOST_BEND) if bend >= 0 else None,
    }
    gamma = torch.tensor(float(checkpoint.one(None, "lam_mul", True)))
    theirs = {t: ours for ours, t in PARTS.items()}
    state = {"gamma": gamma, "value.3.bias": torch.zeros(1)}
    for name, tensor in found.items():
        part, _, kind = name.rpartition(".")
        state[f"{theirs[part]}.{kind}"] = tensor
    return stages[0], settings, state


def _usual_bend(teacher: Backbone, classes: int | None) -> float:
    """Return the lam_mul_k of SAMix's configurations for such a network."""
    if not teacher.small_stem:  # aircraft, birds
        return {100: 1.0, 200: 1.0}.get(classes or 0, -1.0)
    tiny = 0.25 if teacher.name.startswith("resnext") else -1.0
    return {10: 0.25, 100: 0.25, 200: tiny}.get(classes or 0, -1.0)


def _unfit(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"{what} is not SAMix's, {why}: --encoder-only leaves the Mixer")


def _check_parts(found: dict[str, Tensor], what: str) -> tuple[int, int]:
    """Refuse other parts and shapes than SAMix's; return the query's channels, out and in."""
    if "value.weight" in found:
        raise _unfit(what, "its value is one convolution, as AutoMix's")
    if not any(k.startswith("key.") for k in found):
        raise _unfit(what, "it has no key (x_qk_concat=False)")
    query = found.get("query.conv.weight")
    if query is None or query.ndim != 4:
        raise _unfit(what, "it has no query")
    both, inner = query.shape[1], max(1, query.shape[1] // 4)
    wanted: dict[str, tuple[int, ...]] = {
        "value.conv.0.conv.weight": (inner, both // 2, 1, 1),
        "value.conv.0.bn.num_batches_tracked": (),
        "value.conv.1.conv.weight": (1, inner, 1, 1),
        LAST_BIAS: (1,),
    }
    for part in ("query", "key"):
        wanted |= {f"{part}.conv.weight": (inner, both, 1, 1), f"{part}.conv.bias": (inner,)}
    for kind in ("weight", "bias", "running_mean", "running_var"):
        wanted[f"value.conv.0.bn.{kind}"] = (inner,)
    missing = sorted(wanted.keys() - found.keys() - {LAST_BIAS})
    unknown = sorted(found.keys() - wanted.keys())
    other = sorted(k for k in wanted.keys() & found.keys() if found[k].shape != wanted[k])
    for names, problem in ((missing, "lacks"), (unknown, "also has"), (other, "has another")):
        if names:
            raise _unfit(what, f"it {problem} {names[0]}")
    return inner, both
