"""Training steps of lightly's PyTorch examples of MoCo, SimCLR and BYOL, for any ResNet."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, MoCoV2Transform, SimCLRTransform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from torch import Tensor, nn

from ssl_samix.models.backbone import SMALL_IMAGE
from ssl_samix.models.resnet import ResNetTrunk

QUEUE = 4096
BLURRED_FROM = 64  # px; smaller images are not blurred, as on our side


def resnet(name: str, size: int, width: int) -> nn.Module:
    """Return torchvision's ResNet without classifier, with the stem for the image size.

    Narrower networks, which torchvision does not have, are those of this package.
    """
    if width != 64:
        return ResNetTrunk(name, width, small_stem=size < SMALL_IMAGE)
    network = getattr(torchvision.models, name)()
    if size < SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network


class LightlySide:
    """A method as lightly's example trains it: float32, default memory layout, plain SGD.

    Args:
        method: Name of the method.
        backbone: Name of a ResNet.
        size: Side of the images in px.
        width: Channels of the first stage.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, method: str, backbone: str, size: int, width: int, device: str) -> None:
        network = resnet(backbone, size, width)
        features = 8 * width * (4 if backbone == "resnet50" else 1)
        heads: dict[str, Callable[[], nn.Module]] = {
            "moco": lambda: MoCoProjectionHead(features, features, 128),
            "simclr": lambda: SimCLRProjectionHead(features, features, 128),
            "byol": lambda: BYOLProjectionHead(features, 1024, 256),
        }
        online = nn.Sequential(network, heads[method]())
        self.model = nn.ModuleDict({"online": online})
        if method != "simclr":
            self.model["twin"] = copy.deepcopy(online)
            deactivate_requires_grad(self.model["twin"])
        if method == "byol":
            self.model["predictor"] = BYOLPredictionHead(256, 1024, 256)
        self.model.to(device)
        # The examples do not move the criterion to the device, so the memory bank stays on the CPU.
        self.criterion: nn.Module = {
            "moco": lambda: NTXentLoss(memory_bank_size=(QUEUE, 128)),
            "simclr": NTXentLoss,
            "byol": NegativeCosineSimilarity,
        }[method]()
        self.loss = {"moco": self._moco, "simclr": self._simclr, "byol": self._byol}[method]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.06)

    def step(self, views: tuple[Tensor, ...]) -> None:
        """Train on one batch; the momentum encoder is updated first, as in the examples."""
        if "twin" in self.model:
            for online, twin in zip(self.model["online"], self.model["twin"], strict=True):
                update_momentum(online, twin, m=0.996)
        self.loss(*views).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _moco(self, first: Tensor, second: Tensor) -> Tensor:
        return self.criterion(self.model["online"](first), self.model["twin"](second))

    def _simclr(self, first: Tensor, second: Tensor) -> Tensor:
        return self.criterion(self.model["online"](first), self.model["online"](second))

    def _byol(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros((), device=first.device)
        for view, other in ((first, second), (second, first)):
            prediction = self.model["predictor"](self.model["online"](view))
            total = total + self.criterion(prediction, self.model["twin"](other))
        return total / 2


def lightly_transform(method: str, size: int) -> Callable[..., list[Tensor]]:
    """Return the transform of lightly's example: maps a PIL picture to its two views."""
    blur = {} if size >= BLURRED_FROM else {"gaussian_blur": 0.0}
    if method == "moco":
        return MoCoV2Transform(input_size=size, **blur)
    if method == "simclr":
        return SimCLRTransform(input_size=size, **blur)
    return BYOLTransform(
        BYOLView1Transform(input_size=size, **blur), BYOLView2Transform(input_size=size, **blur)
    )
