"""Models of torchvision and timm without classifier: maps of stages, pooled features."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ssl_samix.errors import ConfigError


class TorchvisionTrunk(nn.Module):
    """A torchvision classification model without its last linear layer.

    Its stages are those of the sequence of blocks that most of torchvision's models keep under
    ``features``; a model without one (``vit_b_16``) gives pooled features only.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        arguments = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        if arguments:
            arguments["init_weights"] = True
        self.model = torchvision.models.get_model(name, weights=None, **arguments)
        remove_classifier(self.model)
        blocks = getattr(self.model, "features", getattr(self.model, "trunk_output", None))
        self._channels_last = "swin" in name
        self._blocks: list[nn.Module] = []
        if isinstance(blocks, nn.Sequential):
            self._blocks = self._last_of_each_stride(blocks)

    @torch.no_grad()
    def _last_of_each_stride(self, blocks: nn.Sequential) -> list[nn.Module]:
        sides: dict[int, nn.Module] = {}
        was_training = blocks.training
        blocks.eval()
        x = torch.zeros(1, *(3, 64, 64))
        if hasattr(self.model, "stem"):
            x = self.model.stem.eval()(x)
        for block in blocks:
            x = block(x)
            sides[x.shape[1] if self._channels_last else x.shape[-1]] = block
        self.model.train(was_training)
        return [block for side, block in sides.items() if side <= 16]

    @property
    def stages(self) -> int:
        """Number of stages whose maps can be read."""
        return len(self._blocks)

    def forward_both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps of all stages, each (B, C, h, w), and the pooled features (B, C)."""
        seen: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _module, _input, output: seen.append(output))
            for block in self._blocks
        ]
        try:
            pooled = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [x.permute(0, 3, 1, 2) if self._channels_last else x for x in seen], pooled

    def stage_maps(self, images: Tensor, last: int) -> list[Tensor]:
        """Return the maps of stages 1 to ``last``, each (B, C, h, w)."""
        return self.forward_both(images)[0][:last]

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C)."""
        return self.model(images)


def remove_classifier(model: nn.Module) -> str | None:
    """Replace the last linear layer by the identity, and return its name.

    SqueezeNet has none and keeps its pooling.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        model.classifier = nn.AdaptiveAvgPool2d(1)
        return None
    parent, _, child = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return linear[-1]


class TimmTrunk(nn.Module):
    """A timm model without its classifier.

    Stages are numbered as in a ResNet: stage 1 is the one of stride 4, and a quarter of the blocks
    is one stage where all blocks share one stride (ViT).

    Args:
        name: A timm model name.
        image_size: Passed to models that are built for one size (ViT, Swin).
        options: Further keyword arguments of ``timm.create_model``, such as ``patch_size``.
        checkpointing: Store only the inputs of blocks for the backward pass.

    Raises:
        ValueError, TypeError, AssertionError: As timm raises them for sizes or options that the
            model does not take.
        ConfigError: For checkpointing of a model with BatchNorm.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        options: dict[str, Any] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        arguments: dict[str, Any] = {"num_classes": 0, **(options or {})}
        if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
            arguments["img_size"] = image_size
        self.model = timm.create_model(name, pretrained=False, **arguments)
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        if patch is not None and image_size % patch[0]:
            raise ValueError(f"{image_size} is not a multiple of its patch of {patch[0]} px")
        self._blocks = self._stage_blocks()
        if checkpointing:
            if any(isinstance(module, _NormBase) for module in self.model.modules()):
                raise ConfigError(
                    f"backbone.checkpointing would move {name}'s normalisation statistics twice a "
                    "step: leave it out"
                )
            self.model.set_grad_checkpointing(True)  # raises if there is none
        self.checkpointing = checkpointing

    def _stage_blocks(self) -> list[int]:
        """Return, for stages 1, 2, ..., the position of the stage's last block."""
        strides = [entry["reduction"] for entry in getattr(self.model, "feature_info", [])]
        if not strides or not hasattr(self.model, "forward_intermediates"):
            return []
        if len(set(strides)) == 1:
            return [round(len(strides) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        return [i for i, stride in enumerate(strides) if stride >= 4]

    def _model_in_mode(self) -> Any:
        """Return the model, with checkpointing switched off in eval mode.

        The Mixer's frozen pass is one, and what is computed again later would be in training mode.
        """
        if self.checkpointing:
            self.model.set_grad_checkpointing(self.training)
        return self.model

    @property
    def stages(self) -> int:
        """Number of stages whose maps can be read."""
        return len(self._blocks)

    def stage_maps(self, images: Tensor, last: int) -> list[Tensor]:
        """Return the maps of stages 1 to ``last``, each (B, C, h, w)."""
        return self._model_in_mode().forward_intermediates(
            images,
            indices=self._blocks[:last],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
        )

    def forward_both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps of all stages and the pooled features (B, C) of one pass."""
        final, maps = self._model_in_mode().forward_intermediates(
            images, indices=self._blocks, output_fmt="NCHW"
        )
        return maps, self.model.forward_head(final, pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C)."""
        return self._model_in_mode()(images)
