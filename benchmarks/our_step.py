"""Our training step of MoCo, SimCLR and BYOL, with any policy and precision, without a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lightly_examples import QUEUE
from pytorch_lightning.plugins import MixedPrecision, Precision
from torch import Tensor

from ssl_samix.config.compose import build, compose
from ssl_samix.methods.base import BaseMethod
from ssl_samix.trainer import memory_format
from ssl_samix.training.defaults import resolve_auto
from ssl_samix.types import Batch

# The sizes of lightly's examples; a projector's hidden width is the feature width, our default.
SIZES = {
    "moco": ["method.hidden_dim=null", "method.output_dim=128", f"method.queue_size={QUEUE}"],
    "simclr": ["method.hidden_dim=null", "method.output_dim=128"],
    "byol": ["method.hidden_dim=1024", "method.output_dim=256"],
}
STEPS = 1000  # of the imaginary run
IMAGES = 50_000  # whose automatic settings it has


def configuration(method: str, backbone: str, width: int, words: Sequence[str]) -> Any:
    """Return the configuration of a run of `samix pretrain` with lightly's sizes."""
    network = [f"backbone={backbone}", f"backbone.width={width}"]
    config, choices = compose("pretrain", [f"method={method}", *SIZES[method], *network, *words])
    resolve_auto(config, choices, IMAGES, {"data.batch_size": 256})
    return config


def our_method(config: Any, size: int, device: str) -> BaseMethod:
    """Build the module that a run with this configuration trains."""
    backbone = build(config.backbone, image_size=size)
    mixing = build(config.mixup, backbone=backbone) if config.mixup else None
    optimizer = build(config.optimizer)
    method: BaseMethod = build(config.method, backbone=backbone, optimizer=optimizer, mixing=mixing)
    return method.to(device, memory_format=memory_format(method))  # type: ignore[call-overload]


class OurSide:
    """A method as `samix pretrain` trains it, in the order of Lightning's automatic optimization.

    The overhead of Lightning's loop is left out, as is that of a plain loop for lightly's side.

    Args:
        config: Configuration of the run.
        size: Side of the images in px.
        batch: Images per step.
        precision: Lightning's name of it.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, config: Any, size: int, batch: int, precision: str, device: str) -> None:
        self.model = our_method(config, size, device)
        # The part of a trainer that methods use; with a real one, sides could not alternate.
        self.trainer = SimpleNamespace(
            global_step=STEPS // 2,  # after the part in which the Mixer is trained in every step
            estimated_stepping_batches=STEPS,
            max_epochs=10,
            accumulate_grad_batches=1,
            datamodule=SimpleNamespace(batch_size=batch),
        )
        self.model.trainer = self.trainer  # type: ignore[assignment]
        self.model.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
        optimization = self.model.configure_optimizers()
        self.optimizer = optimization["optimizer"]
        self.schedule = optimization["lr_scheduler"]["scheduler"]
        mixed = precision.endswith("-mixed")
        self.precision = MixedPrecision(precision, device) if mixed else Precision()  # type: ignore[arg-type]
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "16-mixed")
        self.label = torch.full((batch,), -1, device=device)
        self.index = torch.arange(batch, device=device)

    def step(self, views: tuple[Tensor, ...]) -> None:
        """Train on one batch."""
        with self.precision.train_step_context():
            loss = self.model.training_step(Batch(views, self.label, self.index), 0)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.model.on_before_optimizer_step(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.after_step()
        self.model.after_batch()
        self.schedule.step()
        self.trainer.global_step += 1
