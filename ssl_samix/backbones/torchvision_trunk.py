"""torchvision's models other than ResNets."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn


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
        _remove_classifier(self.model)
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


def _remove_classifier(model: nn.Module) -> None:
    """Replace the last linear layer by the identity (SqueezeNet has none: its pooling stays)."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        model.classifier = nn.AdaptiveAvgPool2d(1)
        return
    parent, _, child = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
