"""What many tests share: small networks, seeded, and the command."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

from ssl_samix.artifacts.mixer import Frozen, TrainedMixer
from ssl_samix.cli.main import main
from ssl_samix.methods.barlow_twins import BarlowTwins
from ssl_samix.methods.byol import BYOL
from ssl_samix.methods.dino import DINO
from ssl_samix.methods.moco import MoCo
from ssl_samix.methods.mocov3 import MoCoV3
from ssl_samix.methods.nnclr import NNCLR
from ssl_samix.methods.simclr import SimCLR
from ssl_samix.methods.simsiam import SimSiam
from ssl_samix.methods.swav import SwAV
from ssl_samix.methods.vicreg import VICReg
from ssl_samix.mixup.clusters import ClusterObjective
from ssl_samix.mixup.mixer import SAMix
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.mixup.policies import Mixup
from ssl_samix.mixup.samix_objective import SAMixObjective
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.ema import evaluating
from ssl_samix.optim import OptimizerRecipe


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def recipe(**settings):
    return OptimizerRecipe(torch.optim.SGD, **{"lr": 0.1, "warmup_epochs": 0, **settings})


BASE = {"optimizer": recipe()}
SMALL_HEADS = {"hidden_dim": 32, "output_dim": 16}


@torch.no_grad()
def with_neighbours(method):
    """Fill the queue with the method's own embeddings.

    Those of an untrained network lie so close together that all would have one random neighbour.
    """
    with evaluating(method):
        images = torch.randn(len(method.queue.keys), 3, 16, 16)
        method.queue.keys.copy_(method.unit(method.embedder(images)))
    return method


METHODS = {
    "moco": lambda backbone, **kw: MoCo(backbone, **{**BASE, "queue_size": 32, **kw}),
    "simclr": lambda backbone, **kw: SimCLR(backbone, **{**BASE, **kw}),
    "byol": lambda backbone, **kw: BYOL(backbone, **{**BASE, "hidden_dim": 32, **kw}),
    "simsiam": lambda backbone, **kw: SimSiam(
        backbone, **{**BASE, **SMALL_HEADS, "bottleneck_dim": 8, **kw}
    ),
    "barlow_twins": lambda backbone, **kw: BarlowTwins(backbone, **{**BASE, **SMALL_HEADS, **kw}),
    "mocov3": lambda backbone, **kw: MoCoV3(backbone, **{**BASE, **SMALL_HEADS, **kw}),
    "nnclr": lambda backbone, **kw: with_neighbours(
        NNCLR(backbone, **{**BASE, **SMALL_HEADS, "predictor_dim": 32, "queue_size": 32, **kw})
    ),
    "swav": lambda backbone, **kw: SwAV(
        backbone, **{**BASE, **SMALL_HEADS, "prototypes": 12, **kw}
    ),
    "dino": lambda backbone, **kw: DINO(
        backbone, **{**BASE, **SMALL_HEADS, "prototypes": 12, **kw}
    ),
    "vicreg": lambda backbone, **kw: VICReg(backbone, **{**BASE, **SMALL_HEADS, **kw}),
}


def frozen_mixer():
    backbone = Backbone("resnet18", image_size=16, width=4)
    settings = {"channels": 16, "lam": "drawn"}
    described = {"mixer": {"stage": 3, "settings": settings}}
    meta = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, **described}
    return TrainedMixer(backbone, SAMix(**settings), meta)


def clustered(backbone, **kw):
    objective = ClusterObjective(backbone=backbone, embedding_dim=kw.pop("dim"), clusters=3, **kw)
    objective.assign(torch.arange(64) % 3, torch.randn(3, 4))  # 0 1 2 0 1 2 ...
    return objective


def without(kw, *names):
    return {name: value for name, value in kw.items() if name not in names}


# name -> objective for a backbone; ``dim`` is the width of the method's embeddings
MIXINGS = {
    "mixup": lambda backbone, **kw: MixObjective(Mixup(), **without(kw, "dim")),
    "samix": lambda backbone, **kw: SAMixObjective(
        backbone=backbone, **{"mask": "exact", **without(kw, "dim")}
    ),
    "samix_c": clustered,
    "samix_p": lambda backbone, **kw: MixObjective(Frozen(frozen_mixer()), **without(kw, "dim")),
}
DIMS = {"moco": 128, "simclr": 128, "byol": 256}  # others: SMALL_HEADS


def mixed_method(name, mixing, **settings):
    """A method that mixes."""
    backbone = Backbone("resnet18", image_size=16, width=4)
    objective = MIXINGS[mixing](backbone, dim=DIMS.get(name, 16), **settings)
    return METHODS[name](backbone, mixing=objective)


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param](Backbone("resnet18", image_size=16, width=4))


@pytest.fixture
def views():
    return torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)


# Words of runs that several files of tests read.
RUNS = {
    "moco samix": [
        "method=moco", "mixup=samix", "data.limit=96", "data.batch_size=32", "backbone.width=8",
        "trainer.max_epochs=1", "method.queue_size=64",
    ],
    "moco none": [
        "method=moco", "mixup=none", "data.limit=64", "data.batch_size=32", "backbone.width=8",
        "trainer.max_epochs=1", "method.queue_size=64",
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Return a function that fills a folder once, whatever the number of testing processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(name, make):
        folder = shared / "once" / name
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (folder / ".made").exists():
                make(folder)
                (folder / ".made").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def trained(once):
    """Return a function that puts a copy of a run of ``RUNS`` into a folder."""

    def copy(name, folder):
        made = once(name, lambda home: samix_here("pretrain", *RUNS[name], "out=run", cwd=home))
        return shutil.copytree(made / "run", folder)

    return copy


def samix(*words, cwd, check=False, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "ssl_samix", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=check, **options
    )


def samix_here(*words, cwd):
    """Run the command in this process, which saves it its imports, and return what it prints."""
    before, printed = os.getcwd(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(printed):
            main([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:  # 0 is Hydra's way to end its help
            raise
    finally:
        os.chdir(before)
    return printed.getvalue()


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run the command in this process and return its one sentence."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["samix", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        lines = [line for line in error.splitlines() if line.startswith("samix: ")]
        assert len(lines) == 1, error
        assert "Traceback" not in error
        return lines[0]

    return run
