"""Training of the Mixer along with the encoder: the eta-balanced loss and the mask loss."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_samix.errors import check_choice, check_range
from ssl_samix.losses import full_precision
from ssl_samix.mixup.mixer import SAMix
from ssl_samix.mixup.objective import MixObjective, parent_losses, weighted
from ssl_samix.mixup.plan import blend, flat, share, share_done
from ssl_samix.optim import MixerOptimizer
from ssl_samix.types import Batch, Method, Mixed, MixPlan, StagedBackbone, Terms

ONE_SIDED = 0.05  # a mixture with a smaller share of one parent counts as a copy of the other
EVERY_STEP_SHARE = 0.05  # first fraction of the mixing steps, in which the Mixer always learns
GAIN_EVERY = 5  # Mixer steps between comparisons with flat masks, one forward pass each


class SAMixObjective(MixObjective):
    """SAMix-I: trains the Mixer on embeddings of its mixtures (arXiv 2111.15454, eq. 6-9).

    A step has three losses. The method's own loss and the loss of the mixtures train only the
    encoder. The Mixer's loss trains only the Mixer, through the frozen teacher, on other mixtures
    with separately drawn ratios and partners.

    Args:
        backbone: Provides the shapes of the stages' maps.
        stage: Backbone stage whose maps are the Mixer's input.
        mask: Type of the mask: ``exact``, ``paper`` or ``anchored`` (see ``MixBlock``).
        width: Width of the Mixer's attention.
        upsampling: Upsampling of the mask.
        lam: ``drawn`` or ``mask`` (see ``SAMix``), or ``seen`` (see ``MixObjective``).
        lam_margin: Ratios within this distance of 0 or 1 get a flat mask.
        eta: Weight of the global term; ``auto``: set by the method, 0 in pretraining, where the
            global term makes mixtures less useful for training, and 1 with labels. With a negative
            weight, the Mixer is adversarial: it learns mixtures that are hard to distinguish from
            other images (after AdAutoMix, arXiv 2312.11954), and only the local term keeps them
            between their parents.
        local_weight: Weight of the local term; ``auto``: 1 in pretraining, 0 with labels, where
            the global term includes it (OpenMixup's automix.py has only the global term).
        temperature: Temperature of the local term.
        mask_weight: Weight of the mask loss.
        mask_decay: Whether that weight decays to 0 over the run, by a cosine.
        mask_margin: Deviation of a mask's share from its ratio that is not penalised.
        variance_weight: Weight of the reward for the masks' spatial standard deviation.
        update_every: The Mixer is trained in every n-th step, but in all of the first 5% of the
            steps that mix.
        optimizer: The Mixer's optimizer: a separate ``adamw``, ``adam`` or ``sgd``, or the
            ``encoder``'s.
        lr: Learning rate of the Mixer; with ``optimizer=encoder``, a factor of the encoder's.
        momentum: EMA momentum of the Mixer's teacher, for methods without a momentum encoder.
        **mixing: Further arguments of ``MixObjective``.

    Raises:
        ConfigError: If a setting is out of range, or the backbone does not have the stage.
    """

    learns = True
    policy: SAMix
    bad_step: Tensor

    def __init__(  # noqa: PLR0913 - one argument per configuration key
        self,
        *,
        backbone: StagedBackbone,
        stage: int = 3,
        mask: Literal["exact", "paper", "anchored"] = "paper",
        width: int = 128,
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
        lam: Literal["drawn", "mask", "seen"] = "drawn",
        lam_margin: float = 0.0,
        eta: float | Literal["auto"] = 0.5,
        local_weight: float | Literal["auto"] = 1.0,
        temperature: float = 0.2,
        mask_weight: float = 0.1,
        mask_margin: float = 0.1,
        mask_decay: bool = True,
        variance_weight: float = 0.0,
        update_every: int = 1,
        optimizer: str = "encoder",
        lr: float = 1.0,
        momentum: float = 0.99,
        **mixing: Any,
    ) -> None:
        if eta != "auto":
            check_range("mixup.eta", eta, -10, 10)
        if local_weight != "auto":
            check_range("mixup.local_weight", local_weight, 0)
        check_range("mixup.temperature", temperature, 1e-3)
        check_range("mixup.mask_weight", mask_weight, 0)
        check_range("mixup.mask_margin", mask_margin, 0, 1)
        check_range("mixup.variance_weight", variance_weight, 0)
        check_range("mixup.update_every", update_every, 1)
        check_range("mixup.momentum", momentum, 0, 1)
        settings: dict[str, Any] = {
            "channels": backbone.map_spec(stage).channels,
            "lam": "drawn" if lam == "seen" else lam,
            "lam_margin": lam_margin,
            "form": mask,
            "width": width,
            "upsampling": upsampling,
        }
        check_choice("mixup.lam", lam, ("drawn", "mask", "seen"))
        policy = SAMix(**settings)
        weights: Any = "seen" if lam == "seen" else "drawn"
        super().__init__(policy, stage=stage, backbone=backbone, lam=weights, **mixing)
        self.description = {"stage": stage, "settings": settings}  # to rebuild the Mixer
        self.eta, self.temperature, self.update_every = eta, temperature, update_every
        self.mask_weight, self.mask_margin = mask_weight, mask_margin
        self.mask_decay, self.local_weight = mask_decay, local_weight
        self.variance_weight, self.momentum = variance_weight, momentum
        self.optimizer = MixerOptimizer(optimizer, lr)
        self.register_buffer("bad_step", torch.tensor(-1), persistent=False)
        self._step = 0
        self._learns_now = True

    def forward(self, method: Method, batch: Batch, step: int, total_steps: int) -> Terms:
        """Return the encoder's losses and the Mixer's, which is 0 if it does not learn now."""
        self._step = step
        self._learns_now = self.mixes(step, total_steps) and self._due(step, total_steps)
        terms = super().forward(method, batch, step, total_steps)
        if not self._learns_now:
            # A zero loss that depends on every weight: DDP waits for the gradients of all weights.
            idle = torch.stack([p.sum() for p in self.parameters()]).sum() * 0
            return Terms({**terms.losses, "mixer": idle}, terms.logs)
        learning = self.learn(method, batch, self._done(step, total_steps))
        return Terms(
            {**terms.losses, "mixer": learning.losses["mixer"]}, {**terms.logs, **learning.logs}
        )

    def _due(self, step: int, total_steps: int) -> bool:
        """Return whether the Mixer learns in this step: every early one, then every n-th."""
        return self._done(step, total_steps) < EVERY_STEP_SHARE or step % self.update_every == 0

    def _done(self, step: int, total_steps: int) -> float:
        """Return the completed fraction of the part of the run that mixes, in [0, 1]."""
        return (share_done(step, total_steps) - self.begin) / (self.end - self.begin)

    @property
    def networks(self) -> list[nn.Module]:
        """The Mixer."""
        return [self.policy.block]

    def learn(self, method: Method, batch: Batch, progress: float) -> Terms:
        """Return the Mixer's loss on separately drawn mixtures, through the frozen teacher.

        Args:
            method: Computes embeddings and losses.
            batch: Views of B images.
            progress: Completed fraction of the part of the run that mixes, in [0, 1].
        """
        images, partners = self.sources(method, batch, 0, 1)
        targets = self.targets_of_parents(method, batch, method.targets(batch.views[1]))
        maps = self.maps(method, images, partners)
        assert maps is not None
        plan = self.draw(images)
        mixed = self.policy.attached(images, partners, plan, maps)
        local, global_ = self.loss_terms(method, batch, mixed, plan, targets)
        share_local, share_global = self.term_weights(method)
        loss = share_local * local + share_global * global_ + self.mask_loss(mixed, progress)
        logs = {"mixer/local": local, "mixer/global": global_, **self._diagnostics(mixed)}
        if (self._step + self.update_every) % (self.update_every * GAIN_EVERY) == 0:
            with torch.no_grad():
                masks = flat(plan.lam, images.shape[-1])
                plain = blend(images, partners, plan, masks, plan.lam)
                flat_local, flat_global = self.loss_terms(method, batch, plain, plan, targets)
            gains = flat_local - local, flat_global - global_
            logs["mixer/gain"] = share_local * gains[0] + share_global * gains[1]
        return Terms({"mixer": loss}, {name: value.detach() for name, value in logs.items()})

    def term_weights(self, method: Method) -> tuple[float, float]:
        """Return the weights of the local and of the global term."""
        local, global_ = method.mixer_weights
        return (
            local if self.local_weight == "auto" else self.local_weight,
            global_ if self.eta == "auto" else self.eta,
        )

    def loss_terms(
        self,
        method: Method,
        batch: Batch,
        mixed: Mixed,
        plan: MixPlan,
        targets: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the local and global terms of the Mixer's loss, using the frozen teacher."""
        query = method.frozen_query(self.resized(mixed.images))
        like = partial(method.likeness, temperature=self.temperature)
        likeness = parent_losses(like, query, targets, plan.parents)
        local = local_loss(likeness, plan.lam).mean()
        return local, self.global_loss(method, query, targets, plan, batch).mean()

    def global_loss(
        self,
        method: Method,
        query: Tensor,
        targets: tuple[Tensor, Tensor],
        plan: MixPlan,
        batch: Batch,
    ) -> Tensor:
        """Return the method's contrastive loss of mixtures for their parents, (K,)."""
        return weighted(parent_losses(method.contrast, query, targets, plan.parents), plan.lam)

    def mask_loss(self, mixed: Mixed, progress: float) -> Tensor:
        """Return the penalty for mask shares that miss their ratios, minus the variance reward."""
        gap = (share(mixed.mask) - mixed.lam).abs() - self.mask_margin
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if self.mask_decay else 1.0
        weight = self.mask_weight * left
        return weight * gap.relu().mean() - self.variance_weight * spread(mixed.mask).mean()

    def mixtures(
        self, method: Method, batch: Batch, plan: MixPlan, first: int, second: int
    ) -> Mixed:
        """Return mixtures for the encoder, by the Mixer's current masks."""
        images, partners = self.sources(method, batch, first, second)
        maps = self.maps(method, images, partners)
        mixed = self.policy(images, partners, plan, maps, self.plain(plan, batch))
        # Kept on the device to avoid a synchronisation; the host checks it after the epoch.
        broken = ~torch.isfinite(mixed.mask).all() & (self.bad_step < 0)
        self.bad_step = torch.where(broken, self._step, self.bad_step)
        return mixed

    def plain(self, plan: MixPlan, batch: Batch) -> Tensor | None:
        """Return which mixtures get a flat mask, (K,); None for none, as here."""
        return None

    @torch.no_grad()
    def _diagnostics(self, mixed: Mixed) -> dict[str, Tensor]:
        own = share(mixed.mask)
        drawn = torch.minimum(mixed.lam, 1 - mixed.lam) > ONE_SIDED
        copied = (torch.minimum(own, 1 - own) < ONE_SIDED) & drawn
        return {
            "mixer/gamma": self.policy.block.bounded_gamma,
            "mixer/ratio_slope": slope(mixed.lam, own),
            "mixer/mask_mean_error": (own - mixed.lam).abs().mean(),
            "mixer/mask_std": spread(mixed.mask).mean(),
            "mixer/one_sided": copied.float().mean(),
        }

    def before_step(self) -> None:
        """Drop the Mixer's gradients if it did not learn, or momentum would still move it."""
        if not self._learns_now:
            for parameter in self.parameters():
                parameter.grad = None

    def error_message(self) -> str | None:
        """Return a message with the first step whose masks were NaN or infinite, or None."""
        step = int(self.bad_step)
        if step < 0:
            return None
        return f"the Mixer's mask became NaN in step {step}: lower mixup.lr or optimizer.lr"


@full_precision
def local_loss(likeness: Tensor, lam: Tensor) -> Tensor:
    """Return the cross-entropy of both parents to (lam, 1 - lam) (arXiv 2111.15454, sec. 3.2).

    Args:
        likeness: (K, 2) logits: similarity of the mixture to each parent.
        lam: (K,) weight of the first parent.

    Returns:
        (K,) losses.
    """
    return weighted(-likeness.log_softmax(dim=1), lam)


def slope(ratio: Tensor, found: Tensor) -> Tensor:
    """Return the regression slope, a scalar, of mask shares (K,) on drawn ratios (K,).

    A slope of 1 means that masks follow their ratios; 0, that they are independent of them.
    """
    ratio, found = ratio - ratio.mean(), found - found.mean()
    return (ratio * found).sum() / ratio.square().sum().clamp_min(1e-12)


def spread(mask: Tensor) -> Tensor:
    """Return the spatial standard deviation of each mask, (K,)."""
    # The gradient of the square root is infinite for a flat mask.
    return (mask.flatten(1).var(dim=1, unbiased=False) + 1e-12).sqrt()
