"""Mixing policies that look where the partner matters, without any label.

Legend: K mixtures of B images, S image side, C channels of a feature map, h and w its sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_samix.errors import ConfigError
from ssl_samix.mixup.classic import MaskPolicy, box_around, enlarge, smallest
from ssl_samix.types import MixPlan

SHARES = (8, 4, 2)  # surroundings are an eighth, a quarter and half of the image's side wide
FINEST = 64  # px; larger images are looked at in this size, at a fraction of the cost


def local_mean(images: Tensor, window: int) -> Tensor:
    """Average (B, 3, S, S) over a square around each pixel, of odd side, cut at the border."""
    # Two strips instead of one square: the cost grows with its side, not with its area.
    reach = window // 2
    strips = F.avg_pool2d(images, (window, 1), 1, (reach, 0), count_include_pad=False)
    return F.avg_pool2d(strips, (1, window), 1, (0, reach), count_include_pad=False)


def saliency(images: Tensor) -> Tensor:
    """How far each pixel is from its surroundings, (B, S, S).

    Absolute differences from local means, summed over ``SHARES`` and the channels.

    Args:
        images: (B, 3, S, S).
    """
    contrast = torch.zeros_like(images)
    for share in SHARES:
        contrast += (images - local_mean(images, images.shape[-1] // share | 1)).abs()
    return contrast.sum(dim=1)


def peak(images: Tensor) -> Tensor:
    """Find the row and column of the most salient pixel of images (B, 3, S, S), (B, 2) float32."""
    size = images.shape[-1]
    side = min(size, FINEST)
    found = saliency(F.adaptive_avg_pool2d(images.detach().float(), side)).flatten(1).argmax(dim=1)
    cell = torch.stack([found // side, found % side], dim=1)
    return ((cell + 0.5) * (size / side)).floor()


class SaliencyMix(MaskPolicy):
    """A square of the partner around its most salient pixel, at the same place (arXiv 2006.01791).

    Clipped at the border as in the paper; the ratio follows what is left. The paper takes OpenCV's
    fine-grained saliency, centre against surround in grey images at several scales; here the same
    idea on colours and for a whole batch, see ``saliency``. Every mixture has its own box.
    """

    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return boxes around the partners' peaks, (K, 1, S, S)."""
        size = partners.shape[-1]
        return box_around(peak(partners[plan.partner]), plan.lam, size)


class AttentiveMix(MaskPolicy):
    """The cells of the partner that its feature map is strongest in, in place (arXiv 2003.13048).

    Strength is the mean over channels. The paper pastes 6 of 49 cells, as a network trained with
    labels ranks them; here their share is 1 - lam, and the maps are those of the network itself.
    """

    needs_maps = True

    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the partners' strongest cells, (K, 1, S, S).

        Raises:
            ConfigError: Without maps.
        """
        if maps is None:
            raise ConfigError("this mixing policy reads feature maps: set mixup.stage, such as 3")
        strength = maps[1].detach().mean(dim=1, dtype=torch.float32)[plan.partner]  # (K, h, w)
        cells = smallest(-strength.flatten(1), plan.lam).view_as(strength)
        return enlarge(cells, partners.shape[-1])
