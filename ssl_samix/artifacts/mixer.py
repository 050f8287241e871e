"""Saving, loading and using a trained Mixer, with the teacher layers that it needs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_samix.artifacts.checkpoints import (
    described_backbone,
    load_strictly,
    read_ours,
    renamed,
    write_ours,
)
from ssl_samix.artifacts.run_folder import weights_file
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.mixup.mixer import SAMix
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.mixup.plan import draw_plan
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Mixed, MixPlan

BACKBONE, POLICY = "backbone.", "policy."  # prefixes in the file
# Prefix in a checkpoint -> in a Mixer file. Each method with a learning Mixer has a teacher (twin).
IN_CHECKPOINT = {"twin.module.0.": BACKBONE, "mixing.policy.": POLICY}
_log = logging.getLogger(__name__)


class TrainedMixer(nn.Module):
    """A trained, frozen Mixer that mixes the images of a batch; it has no gradient.

    Attributes:
        image_size: Side of the images it was trained on, in px; other sizes work less well.
        mean: Mean per channel that images are normalised with, for pixels in [0, 1].
        std: Standard deviation per channel, likewise.
    """

    def __init__(self, backbone: Backbone, policy: SAMix, meta: dict[str, Any]) -> None:
        super().__init__()
        self.backbone, self.policy, self.meta = backbone, policy, meta
        self.stage: int = meta["mixer"]["stage"]
        self.image_size: int = meta["image_size"]
        self.mean, self.std = tuple(meta["mean"]), tuple(meta["std"])
        self.requires_grad_(False)
        self.train()
        self._warned: set[int] = set()

    def train(self, mode: bool = True) -> TrainedMixer:
        """Stay in eval mode for any ``mode``: BatchNorm statistics must not change."""
        return super().train(False)

    def forward(
        self,
        images: Tensor,
        lam: Tensor | float | None = None,
        partner: Tensor | None = None,
        alpha: float = 2.0,
    ) -> Mixed:
        """Mix the images of a batch with each other.

        Args:
            images: (B, 3, S, S), normalised with ``mean`` and ``std``.
            lam: Share of the first image in each mixture, (B,) or one number; None: drawn from
                Beta(alpha, alpha) per image.
            partner: (B,) int64, index of the image that each is mixed with; None: drawn, never the
                image itself.
            alpha: Parameter of the Beta distribution of drawn ratios.

        Returns:
            ``Mixed(images, partner, lam, mask)``: with labels, the loss is
            ``lam * loss(label) + (1 - lam) * loss(label[partner])``.
        """
        plan = draw_plan(len(images), alpha, images.device)
        if lam is not None:
            given = torch.as_tensor(lam, dtype=torch.float32, device=images.device)
            plan = MixPlan(given.expand(len(images)), plan.partner, plan.rows)
        if partner is not None:
            plan = MixPlan(plan.lam, partner.to(images.device), plan.rows)
        return self.mix(images, images, plan)

    @torch.no_grad()
    def mix(self, images: Tensor, partners: Tensor, plan: MixPlan) -> Mixed:
        """Return ``images`` mixed with ``partners``, both (B, 3, S, S), by a given plan."""
        own = self.maps(images)
        other = own if partners is images else self.maps(partners)
        return self.policy(images, partners, plan, (own, other))

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Return feature maps (B, C, h, w) of normalised images (B, 3, S, S)."""
        self._tell_size(images.shape[-1])
        maps: Tensor = self.backbone.stage_map(images, self.stage)
        return maps

    def _tell_size(self, size: int) -> None:
        if size != self.image_size and size not in self._warned:
            self._warned.add(size)
            _log.warning(
                "the Mixer was trained on images of %d px and mixes images of %d px",
                self.image_size,
                size,
            )


class Frozen(nn.Module):
    """A trained Mixer as a policy, which computes its feature maps itself.

    It takes images in the current run's normalisation and converts them to its training run's.
    """

    needs_maps = False
    scale: Tensor
    shift: Tensor

    def __init__(self, mixer: TrainedMixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.register_buffer("scale", torch.ones(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.zeros(3, 1, 1), persistent=False)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalisation of the input images, per channel, of pixels in [0, 1]."""
        ours, theirs = (
            [torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in pair]
            for pair in ((mean, std), (self.mixer.mean, self.mixer.std))
        )
        self.scale.copy_(ours[1] / theirs[1])
        self.shift.copy_((ours[0] - theirs[0]) / theirs[1])

    def forward(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None
    ) -> Mixed:
        """Return images mixed by the plan; ``maps`` is ignored."""
        own = self.mixer.maps(images * self.scale + self.shift)
        other = own
        if partners is not images:
            other = self.mixer.maps(partners * self.scale + self.shift)
        mixed: Mixed = self.mixer.policy(images, partners, plan, (own, other))
        return mixed


class PretrainedObjective(MixObjective):
    """SAMix-P: a Mixer and its teacher from an earlier run, frozen (arXiv 2111.15454, section 3.4).

    Args:
        mixer: A run folder, a checkpoint or a ``mixer.safetensors``.
        **mixing: Arguments of ``MixObjective``.

    Raises:
        ConfigError: If ``mixer`` is None.
        CheckpointError: If the Mixer does not exist or cannot be loaded.
    """

    policy: Frozen

    def __init__(self, *, mixer: str | None, **mixing: Any) -> None:
        if mixer is None:
            raise ConfigError(
                "mixup=samix_p needs a trained Mixer: "
                "mixup.mixer=<run with mixup=samix, or its mixer.safetensors>"
            )
        super().__init__(Frozen(load_mixer(mixer)), **mixing)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalisation of the input images, which the Mixer converts to its own."""
        self.policy.set_normalisation(mean, std)


def save_mixer(path: Path, backbone: Backbone, policy: SAMix, meta: dict[str, Any]) -> None:
    """Write a Mixer and the teacher weights that it needs as safetensors."""
    read = backbone.state_names_for_stage(meta["mixer"]["stage"])
    weights = {BACKBONE + n: t for n, t in backbone.state_dict().items() if n in read}
    weights |= {POLICY + n: t for n, t in policy.state_dict().items()}
    write_ours(path, weights, meta)


@torch.inference_mode(False)  # weights created in inference mode cannot be trained
def load_mixer(run_or_file: str | os.PathLike[str]) -> TrainedMixer:
    """Return a trained Mixer, which mixes images in any training loop.

    Args:
        run_or_file: A run folder (its ``mixer.safetensors``, or ``last.ckpt`` until the run
            ends), a checkpoint, or a ``mixer.safetensors``.

    Returns:
        A module that maps normalised images (B, 3, S, S) to ``Mixed(images, partner, lam, mask)``.

    Raises:
        CheckpointError: If there is none, it is damaged, or its weights do not fit its description.
    """
    path = weights_file(run_or_file, "mixer.safetensors")
    meta, weights = read_ours(path, IN_CHECKPOINT)
    if "mixer" not in meta:
        raise CheckpointError(
            f"{path} holds no Mixer: it is of a run with mixup={meta.get('mixup', 'none')}"
        )
    backbone = described_backbone(meta, path)
    try:
        _check_channels(path, backbone, meta)
        policy = SAMix(**meta["mixer"]["settings"])
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} describes what cannot be built: {error}") from error
    read = backbone.state_names_for_stage(meta["mixer"]["stage"])
    load_strictly(backbone, renamed(weights, {BACKBONE: ""}), path, "Mixer", read)
    load_strictly(policy, renamed(weights, {POLICY: ""}), path, "Mixer", policy.state_dict())
    return TrainedMixer(backbone, policy, meta)


def _check_channels(path: Path, backbone: Backbone, meta: dict[str, Any]) -> None:
    stage, reads = meta["mixer"]["stage"], meta["mixer"]["settings"]["channels"]
    gives = backbone.map_spec(stage).channels
    if gives != reads:
        raise CheckpointError(
            f"the Mixer in {path} reads maps of {reads} channels, stage {stage} of its backbone "
            f"gives {gives}"
        )
