"""Mixing policies without a network: masks drawn at random, or placed by maps or saliency.

Legend: K mixtures of B images, S image side, n side of a grid of cells, C channels of a feature
map, h and w its sides. A mask is the share of the partner in each pixel, (K, 1, S, S) float32.
Nothing here synchronises host and device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.errors import ConfigError, check_range
from ssl_samix.mixup.plan import blend, flat, share
from ssl_samix.types import Mixed, MixPlan


def box(corner: Tensor, side: Tensor, size: int) -> Tensor:
    """Return masks (K, 1, S, S) of one square of ones each, clipped at the image border.

    Args:
        corner: (K, 2) whole numbers, the first row and column; may be negative.
        side: (K,) whole numbers, px.
        size: S.
    """
    at = torch.arange(size, device=corner.device)
    first = corner[:, :, None]
    inside = (at >= first) & (at < first + side[:, None, None])  # (K, 2, S)
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float()


def box_side(lam: Tensor, size: int) -> Tensor:
    """Return the side (K,), in whole px, of a square that covers 1 - lam of the image."""
    return ((1 - lam.float()).sqrt() * size).round()


def box_around(centre: Tensor, lam: Tensor, size: int) -> Tensor:
    """Return masks (K, 1, S, S) of squares around ``centre`` (K, 2), clipped at the border."""
    side = box_side(lam, size)
    return box(centre - (side // 2)[:, None], side, size)


def smallest(scores: Tensor, lam: Tensor) -> Tensor:
    """Return ones at the smallest 1 - lam of each row's scores, rounded to a whole number of them.

    Args:
        scores: (K, N) float.
        lam: (K,).

    Returns:
        (K, N) float32 of zeros and ones.
    """
    total = scores.shape[1]
    count = ((1 - lam.float()) * total).round()
    order = scores.argsort(dim=1, stable=True)  # ties: the same order in every run
    taken = (torch.arange(total, device=scores.device) < count[:, None]).float()
    return torch.zeros_like(taken).scatter(1, order, taken)


def enlarge(cells: Tensor, size: int) -> Tensor:
    """Return masks of cells (K, h, w) enlarged to (K, 1, S, S) by nearest neighbour."""
    return F.interpolate(cells[:, None], size=(size, size), mode="nearest-exact")


class MaskPolicy(nn.Module, ABC):
    """A policy defined by its mask; the image's weight in the loss is the mean of 1 - mask."""

    needs_maps = False

    @abstractmethod
    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the share of the partner in each pixel, (K, 1, S, S) float32 in [0, 1].

        Args:
            partners: (B, 3, S, S), indexed by ``plan.partner``.
            plan: The ratios and partners.
            maps: As for ``forward``.
        """

    def forward(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None
    ) -> Mixed:
        """Mix as ``ssl_samix.types.MixingPolicy`` says."""
        mask = self.mask(partners, plan, maps)
        return blend(images, partners, plan, mask, share(mask))


class Mixup(nn.Module):
    """Both images in every pixel, weighted by the ratio (arXiv 1710.09412)."""

    needs_maps = False

    def forward(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None
    ) -> Mixed:
        """Mix as ``ssl_samix.types.MixingPolicy`` says, with the plan's own ratios."""
        return blend(images, partners, plan, flat(plan.lam, images.shape[-1]), plan.lam)


class CutMix(MaskPolicy):
    """A square of the partner at a random place (arXiv 1905.04899).

    Its centre is anywhere in the image, so that it may be clipped; the ratio is that of the
    clipped square.
    """

    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return squares that cover 1 - lam of the image before clipping, around random centres."""
        size = partners.shape[-1]
        centre = (torch.rand(len(plan.lam), 2, device=partners.device) * size).floor()
        return box_around(centre, plan.lam, size)


class GridMix(MaskPolicy):
    """Random cells of a grid come from the partner (Baek et al., Pattern Recognition 109, 2021).

    Their number is the nearest to the plan's ratio. The paper also predicts a label for every cell,
    which has no counterpart without labels.

    Args:
        grid: n, cells per side of the image.

    Raises:
        ConfigError: If ``grid`` is below 2.
    """

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        check_range("mixup.policy.grid", grid, 2)
        self.grid = grid

    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return masks of random cells."""
        scores = torch.rand(len(plan.lam), self.grid**2, device=partners.device)
        cells = smallest(scores, plan.lam).unflatten(1, (self.grid, self.grid))
        return enlarge(cells, partners.shape[-1])


class FMix(MaskPolicy):
    """Regions of any shape: smooth noise, thresholded at the ratio (arXiv 2002.12047).

    Args:
        decay: Amplitudes fall with this power of the frequency; higher values give larger regions.

    Raises:
        ConfigError: If ``decay`` is negative.
    """

    def __init__(self, decay: float = 3.0) -> None:
        super().__init__()
        check_range("mixup.policy.decay", decay, 0)
        self.decay = decay

    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return masks of the 1 - lam lowest pixels of smooth noise."""
        size = partners.shape[-1]
        noise = self.noise(len(plan.lam), size, partners.device)
        return smallest(noise.flatten(1), plan.lam).view_as(noise)[:, None]

    def noise(self, count: int, size: int, device: torch.device) -> Tensor:
        """Return low-frequency noise, (count, size, size) float32."""
        down = torch.fft.fftfreq(size, device=device)[:, None] * size
        across = torch.fft.rfftfreq(size, device=device) * size
        # The constant is weighted as the longest wave; its frequency is 0, a division by zero.
        amplitude = torch.hypot(down, across).clamp(min=1) ** -self.decay
        shape = (count, *amplitude.shape)
        waves = torch.randn(shape, dtype=torch.complex64, device=device) * amplitude
        return torch.fft.irfft2(waves, s=(size, size))


class ResizeMix(nn.Module):
    """The whole partner, made small, at a random place inside the image (arXiv 2012.11101).

    The paper draws the scale from U(0.1, 0.8). Here it is sqrt(1 - lam), so that the plan sets the
    area as for every other policy. Resized bilinearly without antialiasing. Inside the box a pixel
    is of the *resized* partner.
    """

    needs_maps = False

    def forward(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None
    ) -> Mixed:
        """Mix as ``ssl_samix.types.MixingPolicy`` says; the mask is the box."""
        size = images.shape[-1]
        side = box_side(plan.lam, size)
        free = (size - side + 1)[:, None]  # positions at which the whole box is inside the image
        corner = (torch.rand(len(side), 2, device=images.device) * free).floor()
        mask = box(corner, side, size)
        small = shrink(partners[plan.partner], corner, side)  # in the order of the mixtures
        in_order = replace(plan, partner=torch.arange(len(small), device=small.device))
        mixed = blend(images, small, in_order, mask, share(mask))
        return replace(mixed, partner=plan.partner)


def shrink(images: Tensor, corner: Tensor, side: Tensor) -> Tensor:
    """Return images (K, 3, S, S) resized into their boxes, with repeated edge pixels outside.

    Args:
        images: The images to resize.
        corner: (K, 2) first row and column of the box.
        side: (K,) px, of the box; an empty one gives finite pixels, which the mask hides.
    """
    size = images.shape[-1]
    at = torch.arange(size, device=images.device) + 0.5
    # From -1 to 1 over the box; affine_grid multiplies matrices, under autocast in half precision.
    place = 2 * (at - corner[:, :, None]) / side.clamp(min=1)[:, None, None] - 1  # (K, 2, S)
    place = place.clamp(1 / size - 1, 1 - 1 / size)  # padding_mode="border", which MPS lacks
    down, across = place[:, 0, :, None], place[:, 1, None, :]
    grid = torch.stack(torch.broadcast_tensors(across, down), dim=-1)  # (K, S, S, 2)
    dtype = torch.promote_types(images.dtype, grid.dtype)
    small = F.grid_sample(images.to(dtype), grid.to(dtype), align_corners=False)
    return small.to(images.dtype)


DIVISORS = (8, 4, 2)  # the image's side over that of the surroundings
MAX_SIDE = 64  # px; larger images are reduced to this size, at a fraction of the cost


def local_mean(images: Tensor, window: int) -> Tensor:
    """Return local means of (B, 3, S, S), over a square of odd side, clipped at the border."""
    # Separable, rows then columns: the cost grows with the side, not with the area.
    reach = window // 2
    strips = F.avg_pool2d(images, (window, 1), 1, (reach, 0), count_include_pad=False)
    return F.avg_pool2d(strips, (1, window), 1, (0, reach), count_include_pad=False)


def saliency(images: Tensor) -> Tensor:
    """Return how much each pixel differs from its surroundings, (B, S, S).

    Absolute differences from local means, summed over ``DIVISORS`` and the channels.

    Args:
        images: (B, 3, S, S).
    """
    contrast = torch.zeros_like(images)
    for part in DIVISORS:
        contrast += (images - local_mean(images, images.shape[-1] // part | 1)).abs()
    return contrast.sum(dim=1)


def peak(images: Tensor) -> Tensor:
    """Return row and column of the most salient pixel of images (B, 3, S, S), (B, 2) float32."""
    pixels = -(-images.shape[-1] // MAX_SIDE)  # a whole number: MPS pools by no other
    small = F.avg_pool2d(images.detach().float(), pixels)
    found, side = saliency(small).flatten(1).argmax(dim=1), small.shape[-1]
    cell = torch.stack([found // side, found % side], dim=1)
    return ((cell + 0.5) * pixels).floor()


class SaliencyMix(MaskPolicy):
    """A square of the partner around its most salient pixel, at the same place (arXiv 2006.01791).

    Clipped at the border as in the paper; the ratio is that of the clipped square. The paper uses
    OpenCV's fine-grained saliency, centre against surround in grey images at several scales; here
    the same on colours and for a whole batch, see ``saliency``. Every mixture has its own box.
    """

    def mask(self, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return boxes around the partners' peaks, (K, 1, S, S)."""
        size = partners.shape[-1]
        return box_around(peak(partners[plan.partner]), plan.lam, size)


class AttentiveMix(MaskPolicy):
    """The cells of the partner that its feature map is strongest in, in place (arXiv 2003.13048).

    Strength is the mean over channels. The paper pastes 6 of 49 cells, ranked by a network trained
    with labels; here their share is 1 - lam, and the maps are those of the network being trained.
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
