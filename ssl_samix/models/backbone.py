"""Base class of all backbones: pooled features, maps of stages, memory layout."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_samix.config.key_types import check_options
from ssl_samix.errors import ConfigError, check_memory, check_range, nearest
from ssl_samix.models.ema import evaluating
from ssl_samix.models.resnet import RESNETS, ResNetTrunk, weights_of
from ssl_samix.types import Features, MapSpec

NARROW = 16  # channels: float32 values in the longest vector of a CPU


def breaks_in_channels_last(module: nn.Module) -> bool:
    """Return whether images or weights in channels_last could corrupt memory in this module.

    oneDNN's backward pass of a strided 1x1 convolution writes past its memory in channels_last
    when it reads fewer channels than fit a vector: 8 numbers, with AVX-512 16 (seen with torch 2.15
    from 48 px on).
    """
    return any(
        conv.in_channels < NARROW and conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    )


WIDEST = 65536  # first stage of a ResNet
SMALL_IMAGE = 64  # px; below it the stem for small images is the automatic choice

# Exceptions that models raise for options and sizes that they do not check.
MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class Backbone(nn.Module):
    """An image model without classifier.

    Args:
        name: A torchvision or timm model name; torchvision's ResNets take a width and both stems.
        image_size: Side of the square images in px; checked by a forward pass.
        width: Channels of a ResNet's first stage; 64 is the published network.
        stem: ``small`` (3x3, no max-pool), ``standard``, or ``auto``: small below 64 px.
        options: Further arguments of ``timm.create_model`` for a timm model.
        checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        ConfigError: For an unknown name, a width, stem or checkpointing that the model does not
            have, options that name weights, or an image size that it cannot take.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        width: int = 64,
        stem: Literal["auto", "small", "standard"] = "auto",
        options: dict[str, Any] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if stem not in ("auto", "small", "standard"):
            raise ConfigError(nearest(stem, ["auto", "small", "standard"], "backbone.stem"))
        self.name, self.image_size = name, image_size
        self.small_stem = stem == "small" or (
            stem == "auto" and name in RESNETS and image_size < SMALL_IMAGE
        )
        check_options(options or {})
        self._check_resnet_settings(name, width, options)
        # Arguments that rebuild this network, with "auto" resolved.
        self.settings: dict[str, Any] = {
            "name": name,
            "width": width,
            "stem": "small" if self.small_stem else "standard",
            "options": dict(options or {}),
        }
        self.trunk = self._build(name, width, options, checkpointing)
        self._contiguous = breaks_in_channels_last(self.trunk)
        maps, pooled = self._try_one_image()
        self.feature_dim = pooled.shape[1]
        self._map_specs = {
            stage: MapSpec(channels=m.shape[1], stride=round(image_size / m.shape[-1]))
            for stage, m in enumerate(maps, start=1)
        }

    def _check_resnet_settings(self, name: str, width: int, options: dict[str, Any] | None) -> None:
        if name in RESNETS:
            least = -(-64 // RESNETS[name][3])  # at least one channel for each group
            check_range(f"backbone.width of {name}", width, least, WIDEST)
            if options:
                raise ConfigError(f"backbone.options are for timm models, and {name} is not one")
        elif (width != 64 or self.small_stem) and _library(name):
            setting = "stem=small" if self.small_stem else f"width={width}"
            raise ConfigError(
                f"backbone.{setting} is for ResNets, not for {name}: choose backbone=any"
            )

    def _build(
        self, name: str, width: int, options: dict[str, Any] | None, checkpointing: bool
    ) -> nn.Module:
        try:
            if name in RESNETS:
                check_memory(f"backbone.width={width}", weights_of(name, width))
                return ResNetTrunk(name, width, self.small_stem, checkpointing)
            if _library(name) == "timm":
                from ssl_samix.models.libraries import TimmTrunk

                return TimmTrunk(name, self.image_size, options, checkpointing)
            from ssl_samix.models.libraries import TorchvisionTrunk

            if checkpointing:
                raise ConfigError(
                    f"backbone.checkpointing is for ResNets and timm models, and {name} is neither"
                )
            return TorchvisionTrunk(name)
        except ConfigError:
            raise
        except MODEL_ERRORS as error:
            raise self._size_error(error) from error

    def _size_error(self, error: Exception) -> ConfigError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        return ConfigError(
            f"backbone {self.name} cannot take images of {self.image_size} px with these settings "
            f"({reason}): change data.image_size, backbone.name or backbone.options"
        )

    @torch.no_grad()
    def _try_one_image(self) -> tuple[list[Tensor], Tensor]:
        # eval mode: normalisation statistics must not change, and a batch of one image is allowed.
        self.trunk.eval()
        try:
            maps, pooled = self._both(torch.zeros(1, 3, self.image_size, self.image_size))
        except MODEL_ERRORS as error:
            raise self._size_error(error) from error
        if pooled.ndim != 2 or any(0 in m.shape for m in maps):
            raise self._size_error(ValueError("the feature map of its last stage is empty"))
        self.trunk.train()
        return maps, pooled

    @torch.no_grad()
    def check_small(self, size: int, key: str) -> None:
        """Check that the network also takes images of ``size`` px, which the key has set.

        Raises:
            ConfigError: If it does not.
        """
        try:
            with evaluating(self):
                self(torch.zeros(1, 3, size, size))
        except MODEL_ERRORS as error:
            raise ConfigError(
                f"backbone {self.name} cannot take images of {size} px: change {key}, or for a ViT "
                "add backbone.options.dynamic_img_size=true"
            ) from error

    def _in_memory_format(self, images: Tensor) -> Tensor:
        # A convolution computes in the layout of its images, not of its weights.
        return images.contiguous() if self._contiguous else images

    def _both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        images = self._in_memory_format(images)
        if isinstance(self.trunk, ResNetTrunk):
            maps = self.trunk.stage_maps(images)
            return maps, self.trunk.pool(maps[-1])
        return self.trunk.forward_both(images)  # type: ignore[operator]

    def freeze_patches(self) -> None:
        """Freeze a transformer's patch projection; does nothing for other networks."""
        patches = getattr(getattr(self.trunk, "model", None), "patch_embed", None)
        if patches is not None:
            patches.requires_grad_(False)

    def map_spec(self, stage: int) -> MapSpec:
        """Return channels and stride of a stage's feature map.

        Raises:
            ConfigError: If the backbone has no such stage.
        """
        if stage not in self._map_specs:
            known = ", ".join(map(str, self._map_specs)) or "none"
            raise ConfigError(f"backbone {self.name} has no stage {stage}; its stages: {known}")
        return self._map_specs[stage]

    def state_names_for_stage(self, stage: int) -> set[str]:
        """Return the names of the ``state_dict`` entries that a stage's map depends on.

        Raises:
            ConfigError: If the backbone has no such stage.
        """
        self.map_spec(stage)
        # They are found by their gradients, and the caller may have switched gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            copied = copy.deepcopy(self).eval().requires_grad_(True)
            weights = dict(copied.named_parameters())
            image = next(iter(weights.values())).new_zeros(1, 3, self.image_size, self.image_size)
            given = copied.stage_map(image, stage)
            slopes = torch.autograd.grad(given.sum(), list(weights.values()), allow_unused=True)
        read = {n for n, slope in zip(weights, slopes, strict=True) if slope is not None}
        owners = {name.rpartition(".")[0] for name in read}
        without = {n for n, m in self.named_modules() if not list(m.parameters(recurse=False))}
        state = self.state_dict()
        buffers = {name for name in state if name not in weights}
        return read | {n for n in buffers if n.rpartition(".")[0] in owners | without}

    def stage_map(self, images: Tensor, stage: int) -> Tensor:
        """Return one stage's map (B, C, h, w), computing no further than that stage."""
        return self.trunk.stage_maps(self._in_memory_format(images), stage)[stage - 1]  # type: ignore[operator]

    def map_and_features(self, images: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Return one stage's map and the pooled features of one pass."""
        maps, pooled = self._both(images)
        return maps[stage - 1], pooled

    def features(self, images: Tensor) -> Features:
        """Return the maps of all stages and the pooled features of one pass."""
        maps, pooled = self._both(images)
        return Features(maps=dict(enumerate(maps, start=1)), pooled=pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to the pooled features (B, feature_dim)."""
        return self.trunk(self._in_memory_format(images))


def other_library(name: str) -> str | None:
    """Return the library, ``timm`` or ``torchvision``, that has no model like this backbone.

    None for ResNets, which both libraries can build in any width and with either stem.
    """
    if name in RESNETS:
        return None
    return "torchvision" if _library(name) == "timm" else "timm"


def check_library(library: str, name: str) -> None:
    """Raise ``ConfigError`` if a backbone's weights do not fit a model of ``library``."""
    if library == other_library(name):
        own = _library(name)
        raise ConfigError(
            f"{name} is a model of {own}, whose weights {library} does not take: choose "
            f"format={own}, format=onnx or format=torch_export"
        )


def _library(name: str) -> str:
    """Return the library that has a model of this name: timm first, which has maps of more models.

    Raises:
        ConfigError: If neither has, with the nearest name.
    """
    import timm
    import torchvision

    if timm.is_model(name):
        return "timm"
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return "torchvision"
    raise ConfigError(nearest(name, {*known, *RESNETS, *timm.list_models()}, "backbone"))
