"""The Mixer: an attention network that predicts masks from feature maps (arXiv 2111.15454)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.errors import check_choice, check_range
from ssl_samix.mixup.plan import blend, flat, share
from ssl_samix.types import Mixed, MixPlan

MOST_POSITIONS = 784  # 28 x 28: attention is computed for so many queries at a time
FORMS = ("exact", "paper", "anchored")
UPSAMPLING = ("bilinear", "nearest")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU}
SMALL_STD = 1e-3  # of the weights of the last layer of the forms that start as plain mixup
LAM_EPS = 1e-4  # lam is clamped to [LAM_EPS, 1 - LAM_EPS] before its logit is taken
MAX_LOGIT = 8.0  # bound of the exact form's logits around their mean; e^-16 is negligible
BISECTIONS, NEWTON_STEPS = 6, 3  # from a bracket of 16 to 1/4, then to rounding
MIN_SLOPE = 1e-4  # lower bound of the mean slope of the sigmoids that the gradient is divided by


class MixBlock(nn.Module):
    """Predicts a mask from two feature maps and a ratio (arXiv 2111.15454, section 3.3).

    The ratio scales the maps (adaptive lambda encoding). Queries and keys of an attention over all
    positions are computed from both maps, its values from the partner's map only.

    Args:
        channels: C of the feature maps.
        width: Channels of query, key and value: C / 2 as in the paper, but at most this many (more
            would only make wide backbones slower).
        form: ``exact``: the output is shifted so that each mask's mean is 1 - lam (``balanced``).
            Maps are normalised, and a convolution of both is added to the attention's output.
            ``paper``: the mask is the sigmoid of the attention's output. ``anchored``: the output
            is added to the logit of the ratio. ``exact`` and ``anchored`` start as plain mixup.
        upsampling: From positions to pixels, ``bilinear`` or ``nearest``.
        activation: Between the value's convolutions, ``relu`` or ``elu`` (as in OpenMixup).
        lam_curve: Bends the ratio before it scales the maps (OpenMixup's ``lam_mul_k``): strongest
            at 0, weaker for larger values; None: no bend.

    Raises:
        ConfigError: For an unknown form, up-sampling or activation, a width below 1, or a negative
            bend.
    """

    def __init__(
        self,
        channels: int,
        width: int = 128,
        form: Literal["exact", "paper", "anchored"] = "paper",
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
        activation: Literal["relu", "elu"] = "relu",
        lam_curve: float | None = None,
    ) -> None:
        super().__init__()
        check_range("mixup.width", width, 1)
        check_choice("mixup.mask", form, FORMS)
        check_choice("mixup.upsampling", upsampling, UPSAMPLING)
        check_choice("mixup.activation", activation, ACTIVATIONS)
        if lam_curve is not None:
            check_range("mixup.lam_curve", lam_curve, 0)
        inner = max(1, min(channels // 2, width))
        self.channels, self.form, self.upsampling = channels, form, upsampling
        self.lam_curve = lam_curve
        self.gamma = nn.Parameter(torch.tensor(0.5))
        self.query = nn.Conv2d(2 * channels, inner, 1)
        self.key = nn.Conv2d(2 * channels, inner, 1)
        self.value = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            ACTIVATIONS[activation](inplace=True),
            nn.Conv2d(inner, 1, 1),
        )
        if form == "exact":
            # At the start attention is nearly uniform, which gives flat masks with little gradient:
            # a convolution beside it learns, position by position, in the first steps.
            self.norm = nn.BatchNorm2d(channels)
            self.place = nn.Sequential(
                nn.Conv2d(2 * channels, inner, 1, bias=False),
                nn.BatchNorm2d(inner),
                ACTIVATIONS[activation](inplace=True),
                nn.Conv2d(inner, 1, 1, bias=False),  # ``balanced`` would cancel a bias
            )
        self._initialise()

    def _initialise(self) -> None:
        for conv in (self.query, self.key, self.value[0]):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="linear")  # type: ignore[arg-type]
        last: nn.Conv2d = self.value[3]  # type: ignore[assignment]
        deviation = 0.1 if self.form == "paper" else SMALL_STD
        nn.init.normal_(last.weight, std=deviation)
        for conv in (self.query, self.key, last):
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        if self.form == "exact":
            nn.init.normal_(self.place[3].weight, std=deviation)  # type: ignore[arg-type]

    @property
    def bounded_gamma(self) -> Tensor:
        """gamma clamped to [0, 1], with a straight-through gradient: it can leave the bound."""
        return self.gamma + (self.gamma.clamp(0, 1) - self.gamma).detach()

    def forward(self, own: Tensor, partner: Tensor, lam: Tensor, size: int) -> Tensor:
        """Return masks: the predicted share of the partner in each pixel.

        Args:
            own: (K, C, h, w) feature maps of the images.
            partner: (K, C, h, w) feature maps of their partners.
            lam: (K,) share of the image itself, in [0, 1].
            size: S, side of the mask in pixels.

        Returns:
            (K, 1, S, S) float32 in [0, 1].
        """
        ratio = bend(lam, self.lam_curve).to(own.dtype)[:, None, None, None]
        gamma = self.bounded_gamma.to(own.dtype)
        if self.form == "exact":
            own, partner = self.norm(torch.cat([own, partner])).chunk(2)
        own = own * (1 + gamma * ratio)
        partner = partner * (1 + gamma * (1 - ratio))
        both = torch.cat([own, partner], dim=1)  # (K, 2C, h, w)
        query, key = self.query(both).flatten(2), self.key(both).flatten(2)  # (K, d, hw)
        value = self.value(partner).flatten(2)  # (K, 1, hw)
        output = attend(query, key, value).view(-1, 1, *own.shape[-2:])
        if self.form == "exact":
            output = output + self.place(both)
        output = self._upsample(output, size)
        if self.form == "exact":
            return balanced(output, lam)
        if self.form == "anchored":
            anchor = torch.logit(1 - lam, eps=LAM_EPS).to(output.dtype)
            output = output + anchor[:, None, None, None]
        return output.sigmoid()

    def _upsample(self, output: Tensor, size: int) -> Tensor:
        smooth = {"align_corners": False} if self.upsampling == "bilinear" else {}
        return F.interpolate(output, size=(size, size), mode=self.upsampling, **smooth)


def bend(lam: Tensor, curve: float | None) -> Tensor:
    """Return ratios moved towards 1/2; 0, 1/2 and 1 are fixed, bent lam and 1 - lam sum to 1.

    Args:
        lam: (K,) in [0, 1].
        curve: 0 gives a pure cubic, infinity a straight line; None: no change.
    """
    if curve is None:
        return lam
    off = lam - 0.5
    return 0.5 + off * (4 * off.square() + 3 * curve) / (1 + 3 * curve)


def balanced(logits: Tensor, lam: Tensor) -> Tensor:
    """Return masks whose mean is 1 - lam, computed from logits of any mean.

    The mask is ``sigmoid(level + logits)``, with one level per image, solved for that mean. The
    gradient is that of the exact level, by the implicit function theorem: if a logit raises its
    pixel, the other pixels of the image fall.

    Args:
        logits: (K, 1, S, S), higher where the partner should be; squashed to +-8 around their mean.
        lam: (K,) share of the image itself, in [0, 1].

    Returns:
        (K, 1, S, S) of at least float32, in [0, 1], of mean 1 - lam to 1e-3.
    """
    with torch.autocast(logits.device.type, enabled=False):
        shape, logits = logits.shape, at_least_float32(logits).flatten(1)  # (K, S^2)
        logits = logits - logits.mean(dim=1, keepdim=True)
        logits = MAX_LOGIT * (logits / MAX_LOGIT).tanh()
        wanted = (1 - lam.to(logits.dtype)).clamp(LAM_EPS, 1 - LAM_EPS)[:, None]
        level = _level(logits.detach(), wanted)
        mask = (level + logits).sigmoid()
        slope = (mask * (1 - mask)).detach().mean(dim=1, keepdim=True).clamp_min(MIN_SLOPE)
        share = mask.mean(dim=1, keepdim=True)
        # Its value is 0; its gradient is that of the level in the logits.
        answer = (share.detach() - share) / slope
        mask = (level + answer + logits).sigmoid()
    return mask.view(shape)


@torch.no_grad()
def _level(logits: Tensor, wanted: Tensor) -> Tensor:
    """Solve for the level (K, 1) at which the mean of ``sigmoid(level + logits)`` is ``wanted``.

    Bisection until Newton's method is sure to converge: a fixed number of steps, so that the host
    never waits for the device. Newton's steps are on the logit of the mean, which is nearly linear
    in the level.
    """
    goal = torch.logit(wanted)
    low = goal - logits.amax(dim=1, keepdim=True)
    high = goal - logits.amin(dim=1, keepdim=True)
    level = (low + high) / 2
    for _ in range(BISECTIONS):
        over = (level + logits).sigmoid().mean(dim=1, keepdim=True) > wanted
        low, high = torch.where(over, low, level), torch.where(over, level, high)
        level = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        mask = (level + logits).sigmoid()
        mean = mask.mean(dim=1, keepdim=True)
        slope = (mask * (1 - mask)).mean(dim=1, keepdim=True).clamp_min(1e-12)
        level = level - (torch.logit(mean, eps=1e-7) - goal) * mean * (1 - mean) / slope
    return level


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention with a value of one channel.

    The explicit matrix is fastest for few positions; for many it is computed in chunks of queries,
    since (h w)^2 values per image would fill the memory.

    Args:
        query: (K, d, N), N positions.
        key: (K, d, N).
        value: (K, 1, N).

    Returns:
        (K, N) float32.
    """
    query = query * query.shape[1] ** -0.5  # before the product, which could overflow float16
    parts = []
    for chunk in query.split(MOST_POSITIONS, dim=2):
        # Under autocast the product may be in half precision; the softmax is in float32.
        weights = at_least_float32(chunk.transpose(1, 2) @ key).softmax(dim=2)  # (K, n, N)
        with torch.autocast(query.device.type, enabled=False):
            parts.append((weights @ at_least_float32(value).transpose(1, 2))[..., 0])
    return torch.cat(parts, dim=1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class SAMix(nn.Module):
    """Mixing policy whose masks a ``MixBlock`` predicts.

    Args:
        channels: C of the feature maps that it reads.
        lam: Weight of the image in a mixture's loss: ``drawn``, the requested ratio, or ``mask``,
            the share that the mask gives the image.
        lam_margin: Ratios this close to 0 or 1 get a flat mask.
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
        """Return the masks (K, 1, S, S) of a plan from both images' maps, each (B, C, h, w)."""
        return self.block(maps[0][plan.rows], maps[1][plan.partner], plan.lam, size)

    def attached(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor]
    ) -> Mixed:
        """Return mixtures for the Mixer's loss, with gradient: no flat masks, the drawn ratios."""
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
        """Return mixtures for the encoder; no gradient reaches the Mixer.

        Args:
            images: (B, 3, S, S).
            partners: (B, 3, S, S), indexed by ``plan.partner``.
            plan: Ratios and partners.
            maps: Feature maps of both, each (B, C, h, w).
            plain: (K,) bool, the mixtures that get a flat mask; or None.
        """
        assert maps is not None, "SAMix reads feature maps"
        masks = self.masks(plan, maps, images.shape[-1])
        edge = torch.minimum(plan.lam, 1 - plan.lam) < self.lam_margin
        plain = edge if plain is None else edge | plain
        uniform = flat(plan.lam, images.shape[-1]).to(masks.dtype)
        masks = torch.where(plain[:, None, None, None], uniform, masks)
        lam = share(masks).to(plan.lam.dtype) if self.lam == "mask" else plan.lam
        return blend(images, partners, plan, masks, lam)
