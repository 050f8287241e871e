"""Conversion of OpenMixup's checkpoints, of classifiers or of self-supervised methods.

Their configuration is Python source, which is parsed and never run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from ssl_samix.artifacts.checkpoints import load_plain
from ssl_samix.artifacts.foreign import load_backbone
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.resnet import RESNETS

MOST_PARTS = 100_000  # AST nodes of a value; OpenMixup's longest values have about 1,000
# Transforms that give the training image size.
CROPS = ("RandomResizedCrop", "RandomCrop", "CenterCrop")


class Computed:
    """Source text of an expression that cannot be evaluated without running code."""

    def __init__(self, node: ast.expr) -> None:
        self.text = ast.unparse(node)

    def __repr__(self) -> str:
        return self.text


def read_text(text: str, path: Path) -> dict[str, Any]:
    """Return the values that a configuration's source assigns, by name.

    Args:
        text: Assignments of plain values, lists and ``dict(...)``, as OpenMixup's training writes
            them (``Config.pretty_text`` of mmcv).
        path: File that it was read from, for the error.

    Returns:
        Numbers, strings, lists (also for tuples) and dicts by name; a ``Computed`` for any other
        expression.

    Raises:
        CheckpointError: If it is not Python source, or nested names make a value too large.
    """
    try:
        return _assigned(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{path} has a configuration that cannot be read: write its state_dict alone to a file"
        ) from error


def _assigned(tree: ast.Module) -> dict[str, Any]:
    names: dict[str, Any] = {}
    sizes: dict[str, int] = {}  # AST nodes of a name's value, with the names in it expanded
    for line in tree.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            name, parts = line.targets[0].id, ast.walk(line.value)
            sizes[name] = sum(sizes.get(getattr(part, "id", ""), 1) for part in parts)
            if sizes[name] > MOST_PARTS:
                raise ValueError(f"{name} has {sizes[name]} parts")
            names[name] = _value(line.value, names)
    return names


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id, Computed(node))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(part, names) for part in node.elts]
    if isinstance(node, ast.Dict):
        return _dict([*zip(node.keys, node.values, strict=True)], names)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        pairs = [(word.arg and ast.Constant(word.arg), word.value) for word in node.keywords]
        return _dict(pairs, names)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Computed(node)


def _dict(pairs: list[Any], names: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, node in pairs:
        value = _value(node, names)
        if key is not None:
            found[str(_value(key, names))] = value
        elif isinstance(value, dict):  # **value
            found |= value
    return found


def dicts(values: Any) -> Iterator[dict[str, Any]]:
    """Yield all dicts in a value, at any depth, outer ones first."""
    if isinstance(values, dict):
        yield values
    if isinstance(values, (dict, list)):
        for part in values.values() if isinstance(values, dict) else values:
            yield from dicts(part)


def channels(settings: dict[str, Any], name: str) -> list[float] | None:
    """Return the first ``mean`` or ``std`` of three channels in [0, 1]; None if there is none."""
    for one in dicts(settings):
        value = one.get(name)
        numbers = value if isinstance(value, list) else []
        if len(numbers) == 3 and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in numbers):
            return [float(v) for v in numbers]
    return None


def side(settings: dict[str, Any]) -> int | None:
    """Return the side in px that training images are cropped to; None if it is not given."""
    for one in dicts(settings.get("train_pipeline") or settings.get("data")):
        size = one.get("size")
        size = size[0] if isinstance(size, list) and size else size
        if one.get("type") in CROPS and isinstance(size, int):
            return size
    return None


# Prefixes of the trained network and of its moving average, by method. With ".0" they are the
# first part of a Sequential of network and projection. Many files also name a network backbone.
NETWORKS: tuple[tuple[str, str | None], ...] = (
    ("backbone_q", "backbone_k"),  # AutoMixup
    ("encoder_q.0", "encoder_k.0"),  # MOCO, DenseCL
    ("encoder_q", "encoder_k"),  # MoCoSAMix, MoCoMix
    ("online_net.0", "target_net.0"),  # BYOL
    ("base_encoder.0", "momentum_encoder.0"),  # MoCoV3
    ("encoder.0", None),  # SimSiam
    ("backbone", None),  # SimCLR, BarlowTwins, SwAV and plain classifiers
)
# Settings that change a network but no tensor's shape -> the values that our network has; the
# first is also OpenMixup's default.
NETWORK = {
    "style": ("pytorch",),  # position of the stride in a bottleneck
    "strides": ([1, 2, 2, 2],),
    "dilations": ([1, 1, 1, 1],),
    "conv_cfg": (None, {"type": "Conv2d"}),
}
EPS = 1e-5  # of all normalisation layers


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of OpenMixup.

    Attributes:
        path: The file.
        weights: Tensors by OpenMixup's names.
        settings: The configuration; empty for published files, which have none.
    """

    path: Path
    weights: dict[str, Tensor]
    settings: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights whose names begin with ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}

    @property
    def networks(self) -> tuple[str, str | None]:
        """Names of the trained network and of its moving average (None if it has none)."""
        return next(pair for pair in NETWORKS if self.under(f"{pair[0]}."))

    @property
    def classes(self) -> int | None:
        """Number of classes of its classifier, clusters not counted; None without classifier."""
        heads = (k for k in self.weights if re.fullmatch(r"head\w*\.(fc|fc_cls)\.weight", k))
        return next((len(self.weights[k]) for k in heads if "clst" not in k), None)

    def section(self, *names: str) -> dict[str, Any]:
        """Return a dict of the configuration, such as model.backbone; empty if it is absent."""
        found: Any = self.settings
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def one(self, given: Any, section: dict[str, Any], name: str, usual: Any) -> Any:
        """Return the user's value, else the setting's only value, else the default ``usual``.

        Raises:
            ConfigError: If it has several values, of which OpenMixup draws one in each step.
            CheckpointError: If its value is an expression, or is not a number where one is needed.
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
        """Check settings that no tensor's shape shows: the configuration must have our values.

        Raises:
            CheckpointError: If a setting differs; names both values.
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
    """Read a checkpoint written by OpenMixup's training, or published by OpenMixup.

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
    """Return a ResNet built by the shapes of its weights, with these weights.

    Raises:
        CheckpointError: If the file has no such network, or it is not one of our ResNets.
    """
    own = "backbone_k" if name == "backbone_k" else "backbone"  # a teacher may have its own section
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
    load_backbone(backbone, weights, what)
    return backbone


def _resnet(weights: dict[str, Tensor], what: str) -> str:
    """Return the name of the ResNet with these numbers of blocks, kind of block and groups."""
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


LAM_MARGIN = 0.08  # in all SAMix configurations: an encoder's mixtures nearer to 0 or 1 are flat
MOST_BEND = 10.0  # larger values of lam_mul_k are clipped to this
# Parts of our MixBlock -> their names in OpenMixup.
PARTS = {
    "query": "query.conv",
    "key": "key.conv",
    "value.0": "value.conv.0.conv",
    "value.1": "value.conv.0.bn",
    "value.3": "value.conv.1.conv",
}
LAST_BIAS = "value.conv.1.conv.bias"  # absent in SAMix's configurations
BESIDE = ("pre_neck.", "pre_head.")  # parts of older mix_blocks that have a loss and no mask
# Settings that change a mask in eval mode but no tensor's shape -> the values that our MixBlock
# has; the first is also OpenMixup's default. Some are of older versions.
MIX_BLOCK = {
    "att_act_cfg": (None,),  # after query and key
    "attention_mode": ("embedded_gaussian",),
    "double_norm": (False,),  # of the attention, over its queries
    "mask_mode": ("none_v_",),
    "pre_norm_cfg": (None,),
}
VALUE = {"conv_cfg": (None, {"type": "Conv2d"})}
ACTIVATIONS = {"ELU": "elu", "ReLU": "relu"}  # of the value branch, supported by our MixBlock


def mixer(
    checkpoint: Checkpoint, teacher: Backbone, lam_mul_k: float | None, upsampling: str | None
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Return stage, arguments and state of a Mixer that computes the masks of the file's mix_block.

    Returns:
        The stage that it reads, the arguments of ``SAMix``, and the state of its ``MixBlock``.

    Raises:
        UserError: If our Mixer cannot compute the same masks, or settings are unknown.
    """
    found = {  # older files have no ".conv" in these names
        re.sub(r"^(query|key)\.(weight|bias)$", r"\1.conv.\2", k): v
        for k, v in checkpoint.under("mix_block.").items()
        if not k.startswith(BESIDE)
    }
    what = f"mix_block in {checkpoint.path}"
    inner, both = _check_parts(found, what)
    stages = [n for n in range(1, 5) if 2 * teacher.map_spec(n).channels == both]
    if not stages:
        teachers = f"no stage of {checkpoint.networks[1]}"
        raise _unfit(what, f"{teachers} has half of its query's {both} channels")
    # Settings that a configuration omits have the defaults of OpenMixup's constructors; without a
    # configuration, the values common to all SAMix configurations are used.
    section = checkpoint.section("model", "mix_block")
    usual = (0, False, -1.0) if section else (True, True, _usual_bend(teacher, checkpoint.classes))
    activation = _check_settings(checkpoint, section, usual)
    bend = checkpoint.one(lam_mul_k, section, "lam_mul_k", usual[2])
    margin = checkpoint.one(
        None, checkpoint.section("model"), "lam_margin", 0 if section else LAM_MARGIN
    )
    settings = {
        "channels": both // 2,
        "lam": "drawn",
        "lam_margin": max(float(margin), 0.0),
        "form": "paper",
        "width": inner,
        "upsampling": checkpoint.one(upsampling, section, "unsampling_mode", "bilinear"),
        "activation": activation,
        "lam_curve": min(float(bend), MOST_BEND) if bend >= 0 else None,
    }
    gamma = torch.tensor(float(checkpoint.one(None, section, "lam_mul", usual[0])))
    theirs = {t: ours for ours, t in PARTS.items()}
    state = {"gamma": gamma, "value.3.bias": torch.zeros(1)}
    for name, tensor in found.items():
        part, _, kind = name.rpartition(".")
        state[f"{theirs[part]}.{kind}"] = tensor
    if not checkpoint.one(None, section, "use_scale", True):
        # Our MixBlock always divides the product of query and key by the root of their channels.
        state |= {k: inner**0.5 * t for k, t in state.items() if k.startswith("query.")}
    return stages[0], settings, state


def _check_settings(
    checkpoint: Checkpoint, section: dict[str, Any], usual: tuple[Any, bool, float]
) -> str:
    """Check that our Mixer supports the mix_block's settings; return the value's activation."""
    hint = "; --encoder-only leaves the Mixer"
    checkpoint.require(section, MIX_BLOCK, hint)
    if checkpoint.one(None, section, "lam_mul", usual[0]):
        residual = {"lam_residual": section.get("lam_residual", usual[1])}
        checkpoint.require(residual, {"lam_residual": (True,)}, hint)
    value = section.get("value_neck_cfg")
    value = value if isinstance(value, dict) else {}
    checkpoint.require(value, VALUE, hint)
    given = value.get("act_cfg", {"type": "ELU"})
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ACTIVATIONS or given.keys() - {"type", "inplace"}:
        raise CheckpointError(
            f"{checkpoint.path} was trained with act_cfg={given!r} of the value: "
            f"it must be {' or '.join(ACTIVATIONS)}{hint}"
        )
    return ACTIVATIONS[kind]


def _usual_bend(teacher: Backbone, classes: int | None) -> float:
    """Return the lam_mul_k that SAMix's configurations have for this network and data set."""
    if not teacher.small_stem:  # aircraft, birds
        return {100: 1.0, 200: 1.0}.get(classes or 0, -1.0)
    tiny = 0.25 if teacher.name.startswith("resnext") else -1.0
    return {10: 0.25, 100: 0.25, 200: tiny}.get(classes or 0, -1.0)


def _unfit(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"{what} is not SAMix's, {why}: --encoder-only leaves the Mixer")


def _check_parts(found: dict[str, Tensor], what: str) -> tuple[int, int]:
    """Check that parts and shapes are SAMix's; return the query's output and input channels."""
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
