"""SAMix as a policy: masks that are predicted from feature maps (arXiv 2111.15454)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_samix.errors import check_choice, check_range
from ssl_samix.mixup.blend import blend, flat, share
from ssl_samix.mixup.mixer import MixBlock
from ssl_samix.types import Mixed, MixPlan


class SAMix(nn.Module):
    """Mixes by the masks of a ``MixBlock``.

    Args:
        channels: C of the feature maps that it reads.
        lam: What the loss of a mixture is weighted with: ``drawn``, the ratio that was asked for,
            or ``mask``, the share that the mask gives the image.
        lam_margin: A ratio this near to 0 or 1 gets a flat mask.
        **block: Further arguments of ``MixBlock``.

    Raises:
        ConfigError: For a setting outside its range.
    """

    needs_maps = True

    def __init__(
        self,
        channels: int,
        lam: Literal["drawn", "mask"] = "drawn",
        lam_margin: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        check_choice("mixup.lam", lam, ("drawn", "mask"))
        check_range("mixup.lam_margin", lam_margin, 0, 0.5)
        self.lam, self.lam_margin = lam, lam_margin
        self.block = MixBlock(channels, **block)

    def masks(self, plan: MixPlan, maps: tuple[Tensor, Tensor], size: int) -> Tensor:
        """Predict the masks (K, 1, S, S) of a plan from both images' maps, each (B, C, h, w)."""
        return self.block(maps[0][plan.rows], maps[1][plan.partner], plan.lam, size)

    def attached(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor]
    ) -> Mixed:
        """Mix for the Mixer's own loss: nothing but the network's masks, and the drawn ratio."""
        masks = self.masks(plan, maps, images.shape[-1])
        return blend(images, partners, plan, masks, plan.lam)

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        partners: Tensor,
        plan: MixPlan,
        maps: tuple[Tensor, Tensor] | None,
        plain: Tensor | None = None,
    ) -> Mixed:
        """Mix for the encoder: no gradient reaches the Mixer.

        Args:
            images: (B, 3, S, S).
            partners: (B, 3, S, S), indexed by ``plan.partner``.
            plan: Ratios and partners.
            maps: Feature maps of both, each (B, C, h, w).
            plain: (K,) bool, the mixtures whose mask shall be flat; or None.
        """
        assert maps is not None, "SAMix reads feature maps"
        masks = self.masks(plan, maps, images.shape[-1])
        edge = torch.minimum(plan.lam, 1 - plan.lam) < self.lam_margin
        plain = edge if plain is None else edge | plain
        uniform = flat(plan.lam, images.shape[-1]).to(masks.dtype)
        masks = torch.where(plain[:, None, None, None], uniform, masks)
        lam = share(masks).to(plan.lam.dtype) if self.lam == "mask" else plan.lam
        return blend(images, partners, plan, masks, lam)
