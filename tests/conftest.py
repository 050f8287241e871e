"""Fixtures that many tests share: small networks, seeded."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.methods.byol import BYOL
from ssl_samix.methods.moco import MoCo
from ssl_samix.methods.simclr import SimCLR
from ssl_samix.optim.recipe import OptimizerRecipe


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def recipe(**settings):
    return OptimizerRecipe(torch.optim.SGD, **{"lr": 0.1, "warmup_epochs": 0, **settings})


METHODS = {
    "moco": lambda backbone, **kw: MoCo(backbone, optimizer=recipe(), queue_size=32, **kw),
    "simclr": lambda backbone, **kw: SimCLR(backbone, optimizer=recipe(), **kw),
    "byol": lambda backbone, **kw: BYOL(backbone, optimizer=recipe(), hidden_dim=32, **kw),
}


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param](Backbone("resnet18", image_size=16, width=4))


@pytest.fixture
def views():
    return torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)
