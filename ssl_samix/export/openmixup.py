"""What is in a checkpoint of OpenMixup, of classifiers or self-supervised, in terms of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.backbones.resnet import RESNETS
from ssl_samix.checkpoint_io import load_plain
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.evaluation.foreign import load_strictly
from ssl_samix.export.openmixup_config import Computed, read_text

# Where the trained network and its moving average are, by whose files they are. Those with ".0"
# hold a network and its projection in a row. Many files have a second name, backbone, for one.
NETWORKS: tuple[tuple[str, str | None], ...] = (
    ("backbone_q", "backbone_k"),  # AutoMixup
    ("encoder_q.0", "encoder_k.0"),  # MOCO, DenseCL
    ("encoder_q", "encoder_k"),  # MoCoSAMix, MoCoMix
    ("online_net.0", "target_net.0"),  # BYOL
    ("base_encoder.0", "momentum_encoder.0"),  # MoCoV3
    ("encoder.0", None),  # SimSiam
    ("backbone", None),  # SimCLR, BarlowTwins, SwAV and plain classifiers
)
# Settings that change a network and that no shape shows -> what ours has; the first is also what
# theirs has if its configuration does not say.
NETWORK = {
    "style": ("pytorch",),  # where a bottleneck has its stride
    "strides": ([1, 2, 2, 2],),
    "dilations": ([1, 1, 1, 1],),
    "conv_cfg": (None, {"type": "Conv2d"}),
}
EPS = 1e-5  # of every normalisation


@dataclass(frozen=True)
class Checkpoint:
    """A file as OpenMixup writes it.

    Attributes:
        path: The file.
        weights: By OpenMixup's names.
        settings: Its configuration; published files have none.
    """

    path: Path
    weights: dict[str, Tensor]
    settings: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights whose names begin with ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}

    @property
    def networks(self) -> tuple[str, str | None]:
        """Names of the trained network and of its moving average; ``None``: it has none."""
        return next(pair for pair in NETWORKS if self.under(f"{pair[0]}."))

    @property
    def classes(self) -> int | None:
        """The number of classes of its classifiers, and not of clusters."""
        heads = (k for k in self.weights if re.fullmatch(r"head\w*\.(fc|fc_cls)\.weight", k))
        return next((len(self.weights[k]) for k in heads if "clst" not in k), None)

    def section(self, *names: str) -> dict[str, Any]:
        """Return a dict of the configuration, such as its model's backbone; empty: none."""
        found: Any = self.settings
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def one(self, given: Any, section: dict[str, Any], name: str, usual: Any) -> Any:
        """Return what the user gives, or the setting's only value, or the usual one.

        Raises:
            ConfigError: If it has several, of which OpenMixup draws one in each step.
            CheckpointError: If its value is not written out.
        """
        value = section.get(name, usual) if given is None else given
        if isinstance(value, list) and len(value) != 1:
            option = "--upsampling" if name == "unsampling_mode" else "--lam-mul-k"
            raise ConfigError(f"{self.path} was trained with {name}={value}: choose by {option}")
        value = value[0] if isinstance(value, list) else value
        number = not isinstance(usual, (int, float)) or isinstance(value, (int, float))
        if isinstance(value, Computed) or not number:
            raise CheckpointError(f"{self.path} does not say what its {name}={value!r} is")
        return value

    def require(
        self, section: dict[str, Any], wanted: dict[str, tuple[Any, ...]], hint: str = ""
    ) -> None:
        """Refuse settings that no shape shows, if the configuration gives one another value.

        Raises:
            CheckpointError: With both values.
        """
        for name, values in wanted.items():
            value = section.get(name, values[0])
            if value not in values:
                found = f"{name}={value!r}"
                raise CheckpointError(
                    f"{self.path} was trained with {found}: it must be {values[0]!r}{hint}"
                )
        norm = section.get("norm_cfg")
        if isinstance(norm, dict) and norm.get("eps", EPS) != EPS:
            raise CheckpointError(
                f"{self.path} was trained with norm_cfg={norm}: its eps must be {EPS:g}{hint}"
            )


def read(path: Path) -> Checkpoint:
    """Read a file as OpenMixup trains or publishes it.

    Raises:
        CheckpointError: If it is damaged, would run code, or is not one of OpenMixup's.
    """
    found = load_plain(path)
    found = found if isinstance(found, Mapping) else {}
    state, meta = found.get("state_dict", found), found.get("meta")
    state = state if isinstance(state, Mapping) else {}
    weights = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    networks = [q for q, _ in NETWORKS if any(k.startswith(f"{q}.") for k in weights)]
    beside = any(k.startswith(("neck.", "head.", "head_")) for k in weights)
    if not networks or (networks == ["backbone"] and not beside):
        names = ", ".join(q for q, _ in NETWORKS if q != "backbone")
        raise CheckpointError(
            f"{path} is not a checkpoint of OpenMixup: it has no {names}, and no backbone with a "
            "neck or head"
        )
    config = meta.get("config") if isinstance(meta, Mapping) else None
    settings = read_text(config, path) if isinstance(config, str) else {}
    return Checkpoint(path, weights, settings)


def network(checkpoint: Checkpoint, name: str, image_size: int) -> Backbone:
    """Build a ResNet by the shapes of its weights, and load them.

    Raises:
        CheckpointError: If the file has no such network, or one that ours cannot be.
    """
    own = "backbone_k" if name == "backbone_k" else "backbone"  # a teacher may have its own
    section = checkpoint.section("model", own) or checkpoint.section("model", "backbone")
    checkpoint.require(section, NETWORK)
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
        raise CheckpointError(f"{what} is not a ResNet: it has no conv1")
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
    raise CheckpointError(f"{what} is not a known ResNet: its stages have {counts} blocks")
