"""ResNets of any width, with the stem for photographs or the one for small images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

# name -> block, blocks per stage, groups, width per group (torchvision.models.resnet; resnet10: one
# block a stage, for studies on a CPU)
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], int, int]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), 1, 64),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": (Bottleneck, (3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), 1, 128),
}


def weights_of(name: str, width: int) -> int:
    """Return the number of weights of a ResNet without building it."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in ResNetTrunk(name, width).parameters())


class ResNetTrunk(TorchvisionResNet):
    """torchvision's ResNet without its classifier; parameter names are torchvision's.

    Args:
        name: A key of ``RESNETS``.
        width: Channels of the first stage; 64 is the published network.
        small_stem: A 3x3 stem of stride 1 without max-pool, for images below 64 px (SimCLR,
            arXiv 2002.05709, appendix B.9), in place of the 7x7 stem of stride 2.
        checkpointing: Store only each block's input for the backward pass.
    """

    def __init__(
        self, name: str, width: int = 64, small_stem: bool = False, checkpointing: bool = False
    ) -> None:
        # torchvision's constructor fixes the width at 64: only its ``_make_layer`` is used.
        nn.Module.__init__(self)
        self.checkpointing = checkpointing
        block, blocks, self.groups, self.base_width = RESNETS[name]
        self._norm_layer: type[nn.Module] = nn.BatchNorm2d
        self.inplanes = width
        self.dilation = 1
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, width, blocks[0])
        self.layer2 = self._make_layer(block, width * 2, blocks[1], stride=2)
        self.layer3 = self._make_layer(block, width * 4, blocks[2], stride=2)
        self.layer4 = self._make_layer(block, width * 8, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stage_maps(self, images: Tensor, last: int = 4) -> list[Tensor]:
        """Return the maps of stages 1 to ``last``, each (B, C, h, w); compute no further."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4)[:last]:
            x = self._block_by_block(layer, x) if self.checkpointing else layer(x)
            maps.append(x)
        return maps

    @staticmethod
    def _block_by_block(layer: nn.Module, x: Tensor) -> Tensor:
        for block in layer.children():
            x = recomputed(block, x)
        return x

    def pool(self, final: Tensor) -> Tensor:
        """Average the last map (B, C, h, w) to (B, C)."""
        return self.avgpool(final).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, C)."""
        return self.pool(self.stage_maps(images)[-1])


def recomputed(block: nn.Module, images: Tensor) -> Tensor:
    """Run a block, store only its input, and run it again in the backward pass.

    The second run uses the train and eval modes of the first, and does not update normalisation
    statistics a second time.
    """
    if not torch.is_grad_enabled():
        return block(images)
    modes = [(module, module.training) for module in block.modules()]
    return checkpoint(
        block, images, use_reentrant=False, context_fn=lambda: (nullcontext(), _restored(modes))
    )


@contextmanager
def _restored(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Restore modules' train and eval modes, and freeze their normalisation statistics."""
    now = [(module, module.training) for module, _ in modes]
    norms = [module for module, training in modes if isinstance(module, _NormBase) and training]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for module, training in modes:
        module.training = training
    for norm, _, counted in before:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if counted is None else counted.clone()
    try:
        yield
    finally:
        for module, training in now:
            module.training = training
        for norm, momentum, counted in before:
            norm.momentum, norm.num_batches_tracked = momentum, counted
