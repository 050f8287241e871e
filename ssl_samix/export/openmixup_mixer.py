"""The mix_block in a checkpoint of OpenMixup, as a ``MixBlock`` that computes the same masks."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.errors import CheckpointError
from ssl_samix.export.openmixup import Checkpoint

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
BESIDE = ("pre_neck.", "pre_head.")  # parts of older mix_blocks that have a loss and no mask
# Settings that change a mask in eval mode and that no shape shows -> what ours has; the first is
# also what theirs has if its configuration does not say. Some are older versions'.
MIX_BLOCK = {
    "att_act_cfg": (None,),  # after query and key
    "attention_mode": ("embedded_gaussian",),
    "double_norm": (False,),  # of the attention, over its queries
    "mask_mode": ("none_v_",),
    "pre_norm_cfg": (None,),
}
VALUE = {"conv_cfg": (None, {"type": "Conv2d"})}
ACTIVATIONS = {"ELU": "elu", "ReLU": "relu"}  # of the value, that ours has


def mixer(
    checkpoint: Checkpoint, teacher: Backbone, lam_mul_k: float | None, upsampling: str | None
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Describe a Mixer that computes the masks of the file's mix_block.

    Returns:
        The stage that it reads, the arguments of ``SAMix``, and the state of its ``MixBlock``.

    Raises:
        UserError: If the mix_block computes what ours cannot, or its settings are not known.
    """
    found = {  # older files have no ".conv" here
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
    # What a configuration leaves out has the values of OpenMixup's constructors; where there is no
    # configuration, those of all of SAMix's count.
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
        # Ours divides the product of query and key by the root of their channels, always.
        state |= {k: inner**0.5 * t for k, t in state.items() if k.startswith("query.")}
    return stages[0], settings, state


def _check_settings(
    checkpoint: Checkpoint, section: dict[str, Any], usual: tuple[Any, bool, float]
) -> str:
    """Refuse settings of the mix_block that ours does not have; return the value's activation."""
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
