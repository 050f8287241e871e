"""Callbacks that measure a network during training, and one that clusters images for SAMix-C."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly.utils.dist import rank, world_size
from torch import Tensor

from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.images import ImageSet
from ssl_samix.data.subsets import stratified
from ssl_samix.errors import ConfigError, check_range
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.knn import knn_accuracy
from ssl_samix.evaluation.measures import (
    alignment,
    embed_two_views,
    kmeans,
    rankme,
    top1_top5,
    uniformity,
)
from ssl_samix.training.probe import OnlineProbe

SHARE = 0.05  # share of the training cost that ``every_n_epochs=auto`` stays below


def _features(
    network: torch.nn.Module,
    data: DataModule,
    images: ImageSet,
    picks: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return features (n, D) of some un-augmented images of a run's data."""
    mean, std, workers = data.splits.mean, data.splits.std, data.worker_count()
    return extract(network, images, picks, mean, std, device=device, workers=workers)


class Monitor(pl.Callback, ABC):
    """Measures and logs every n epochs, and after the first and the last epoch.

    ``fresh`` holds the values measured in this epoch; empty if none were.

    Args:
        every_n_epochs: The interval; ``auto`` chooses the shortest one that is expected to cost at
            most 5% of the training, counted in passes of the network. A search for neighbours is
            a few percent of the passes (2 Q N D operations; docs/scaling.md) and left out.

    Raises:
        ConfigError: For an interval below 1.
    """

    name: ClassVar[str]  # key under ``callbacks``
    columns: ClassVar[tuple[str, ...]]  # prefixes of its measurements' names
    first: ClassVar[tuple[str, ...]]  # measurements in the first columns of metrics.csv
    shown: ClassVar[dict[str, str]]  # measurements that the progress bar shows, and their format
    step_cost: ClassVar[int]  # passes of the network per image and epoch of the cheapest training

    def __init__(self, every_n_epochs: int | Literal["auto"] = "auto") -> None:
        if every_n_epochs != "auto":
            check_range(f"callbacks.{self.name}.every_n_epochs", every_n_epochs, 1)
        self.every_n_epochs = every_n_epochs
        self.best: float | None = None
        self.fresh: dict[str, float] = {}

    @property
    def quality(self) -> str:
        """Name of the measurement that decides which checkpoint is the best."""
        return f"{self.columns[0]}top1"

    @abstractmethod
    def passes(self, data: DataModule) -> int:
        """Return the number of images that one measurement passes through a network."""

    @abstractmethod
    def measure(self, module: Any, data: DataModule) -> dict[str, float]:
        """Return the measurements of the module."""

    @abstractmethod
    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return the lines about quality in a finished run's table."""

    def state_dict(self) -> dict[str, Any]:
        """Save the best values."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best values."""
        self.best = state_dict["best"]

    def interval(self, data: DataModule) -> int:
        """Return the number of epochs between two measurements."""
        if self.every_n_epochs != "auto":
            return int(self.every_n_epochs)
        cost = SHARE * self.step_cost * len(data.splits.train)
        return max(1, math.ceil(self.passes(data) / cost))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure if due, and log."""
        self.fresh = {}
        epoch, last = trainer.current_epoch, (trainer.max_epochs or 0) - 1
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        if epoch % self.interval(data) and epoch != last:
            return
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            measured = self.measure(module, data)
        group = self.columns[0]
        if self.quality in measured:
            self.best = max(self.best or 0.0, measured[self.quality])
            measured[f"{group}best_top1"] = self.best
        measured[f"{group}seconds"] = time.perf_counter() - start
        self.fresh = measured
        module.log_dict(measured, on_step=False, on_epoch=True)


class AccuracyMonitor(Monitor):
    """Measures top-1, top-5 and loss of the classifier and of its moving average (EMA).

    On validation images without augmentation; nothing if there are none. If mixtures have a
    separate head, it is measured in the same passes, but the best epoch is that of the plain
    images' head.

    Args:
        every_n_epochs: The interval, see ``Monitor``.
    """

    name = "accuracy"
    columns = ("val/",)
    first = ("val/top1", "val/ema_top1")
    shown: ClassVar = {"val/top1": "top-1 {:.1f}%", "val/ema_top1": "EMA {:.1f}%"}
    step_cost = 3

    def passes(self, data: DataModule) -> int:
        """Return twice the number of validation images: there are two networks."""
        return 0 if data.splits.val is None else 2 * len(data.splits.val)

    def measure(self, module: Any, data: DataModule) -> dict[str, float]:
        """Return the measurements of the classifier and its moving average.

        Returns:
            ``val/top1``, ``val/top5`` in percent and ``val/loss``, the plain cross-entropy; for the
            average ``val/ema_top1`` and so on; for the mixtures' heads, if there are any,
            ``val/mix_top1``, ``val/ema_mix_top1`` and so on.
        """
        val = data.splits.val
        found: dict[str, float] = {}
        if val is None:
            return {}
        for network_name, network in module.measured().items():
            both = _features(network, data, val, range(len(val)), module.device)
            heads = both.split(module.classes, dim=1)
            for head_name, logits in zip(("", "mix_"), heads, strict=False):
                prefix = f"val/{network_name}{head_name}"
                top1, top5 = top1_top5(logits, val.labels)
                loss = F.cross_entropy(logits, val.labels).item()
                found |= {f"{prefix}top1": top1, f"{prefix}top5": top5, f"{prefix}loss": loss}
        return found

    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return lines with the accuracy of both networks, and of each head if there are two."""
        if "val/top1" not in newest:
            return []
        now, best, ema = (newest[f"val/{n}"] for n in ("top1", "best_top1", "ema_top1"))
        lines = [("top-1", f"{now:.2f}% final, {best:.2f}% best; EMA {ema:.2f}% final")]
        if "val/mix_top1" in newest:
            mix, average = newest["val/mix_top1"], newest["val/ema_mix_top1"]
            text = f"top-1 of their head {mix:.2f}% final; EMA {average:.2f}% final"
            lines.append(("mixtures", text))
        return lines


AUTO = "auto"
ONCE = 0.01  # share of a run's cost that a measurement may have, where images can be left out
FEWEST = 1000  # validation images: their accuracy has a standard error of at most 1.6 points
RANK_SAMPLE = 1000  # images for RankMe and uniformity: a rank of at most 1,000 can be seen
VIEW_SAMPLE = 250  # images for alignment, embedded twice
_log = logging.getLogger(__name__)


class KNNMonitor(Monitor):
    """Measures weighted kNN on images without augmentation, RankMe, alignment and uniformity.

    Args:
        every_n_epochs: The interval, see ``Monitor``.
        k: Neighbours to vote; the first gives ``knn/top1``, the others ``knn/top1_k<k>``.
        temperature: Temperature of the votes' weights (DINO, arXiv 2104.14294, uses 0.07).
        bank_limit: At most this many images in the memory bank (None: all).
        val_limit: At most this many validation images, balanced over the classes (None: all);
            ``auto``: so many that a measurement costs at most 1% of the run, but at least 1,000.

    Where it costs less than 1% of the run, the network is measured before it has learned, and so
    are the pixels themselves: what a run was worth is what it has above both.

    Raises:
        ConfigError: For a setting below its smallest value.
    """

    name = "knn"
    columns = ("knn/", "rankme", "alignment", "uniformity", "untrained/", "pixels/", "probe/")
    first = ("knn/top1", "rankme")
    shown: ClassVar = {
        "knn/top1": "kNN {:.1f}%", "probe/top1": "probe {:.1f}%", "rankme": "RankMe {:.1f}",
    }  # fmt: skip
    step_cost = 4  # of MoCo: 3 of the query encoder, 1 of the key encoder

    def __init__(
        self,
        every_n_epochs: int | Literal["auto"] = "auto",
        k: int | Sequence[int] = (20, 200),
        temperature: float = 0.07,
        bank_limit: int | None = None,
        val_limit: int | Literal["auto"] | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        self.k = [k] if isinstance(k, int) else list(k)
        if not self.k:
            raise ConfigError("callbacks.knn.k needs at least one number of neighbours")
        for neighbours in self.k:
            check_range("callbacks.knn.k", neighbours, 1)
        check_range("callbacks.knn.temperature", temperature, 1e-3)
        for name, limit in (("bank_limit", bank_limit), ("val_limit", val_limit)):
            if limit is not None and limit != AUTO:
                check_range(f"callbacks.knn.{name}", limit, 1)
        self.temperature = temperature
        self.bank_limit = bank_limit
        self.val_limit: int | None = None if val_limit == AUTO else val_limit  # type: ignore[assignment]
        self.limits_itself = val_limit == AUTO
        self.before: dict[str, float] = {}  # measured before the first step
        self.probe: OnlineProbe | None = None  # measured on the same validation features

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the validation images, and measure what there is before the first step.

        A warning says so, if there are fewer images than neighbours that shall vote.
        """
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        bank, val = data.splits.bank, data.splits.val
        run = self.step_cost * len(data.splits.train) * (trainer.max_epochs or 1)
        if self.limits_itself and val is not None:
            left = int(ONCE * run) - self.passes(data) + len(val)
            self.val_limit = min(len(val), max(FEWEST, left))
        if trainer.global_step == 0 and self.passes(data) <= ONCE * run:
            with trainer.precision_plugin.forward_context():
                self.before = self._worth(pl_module, data)
        images = 0 if bank is None else self._count(bank, self.bank_limit)
        beyond = [k for k in self.k if k > images]
        if trainer.is_global_zero and images and beyond:
            _log.warning(
                "callbacks.knn.k=%s: the bank has %d images, so %s",
                beyond[0] if len(beyond) == 1 else beyond, images,
                "all of them vote" if len(beyond) == len(self.k) else "this is left out",
            )  # fmt: skip

    def _worth(self, module: Any, data: DataModule) -> dict[str, float]:
        """Measure the untrained network, and the pixels of images that are held in memory."""
        untrained = self.measure_encoder(module.backbone, data, module.device)
        found = {f"untrained/{name}": untrained[name] for name in self.first if name in untrained}
        if data.in_memory and "knn/top1" in untrained:
            pixels = self.measure_encoder(torch.nn.Flatten(), data, module.device)
            found["pixels/knn/top1"] = pixels["knn/top1"]
        return found

    def passes(self, data: DataModule) -> int:
        """Return the number of embedded images; those of two views count twice."""
        splits = data.splits
        passes = 2 * min(VIEW_SAMPLE, len(splits.train))
        if splits.bank is not None and splits.val is not None:
            passes += self._count(splits.bank, self.bank_limit)
            passes += self._count(splits.val, self.val_limit)
        if splits.bank is not splits.train:
            passes += min(RANK_SAMPLE, len(splits.train))
        return passes

    @staticmethod
    def _count(images: ImageSet, limit: int | None) -> int:
        return min(len(images), limit or len(images))

    def measure(self, module: Any, data: DataModule) -> dict[str, float]:
        """Measure the backbone; the first time, add what was measured before the first step."""
        before, self.before = self.before, {}
        probe = self.probe if self.probe is not None and self.probe.learned else None
        return before | self.measure_encoder(module.backbone, data, module.device, probe)

    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return kNN and the probe, where there are labels, and RankMe."""
        lines = []
        if {"knn/top1", "knn/best_top1"} <= newest.keys():
            now, best = newest["knn/top1"], newest["knn/best_top1"]
            lines.append(("kNN top-1", f"{now:.2f}% final, {best:.2f}% best"))
        before = {
            "raw pixels": newest.get("pixels/knn/top1"),
            "untrained network": newest.get("untrained/knn/top1"),
        }
        known = [f"{name} {value:.2f}%" for name, value in before.items() if value is not None]
        if lines and known:
            lines.append(("", f"for comparison: {', '.join(known)}"))
        if "probe/top1" in newest:
            lines.append(("probe", f"{newest['probe/top1']:.2f}% final, online linear"))
        if "rankme" in newest:
            untrained = newest.get("untrained/rankme")
            beside = "" if untrained is None else f"; untrained network {untrained:.1f}"
            lines.append(("RankMe", f"{newest['rankme']:.1f}{beside}"))
        return lines

    def measure_encoder(
        self,
        encoder: torch.nn.Module,
        data: DataModule,
        device: torch.device,
        probe: OnlineProbe | None = None,
    ) -> dict[str, float]:
        """Return an encoder's measurements on a data set.

        Args:
            encoder: Maps (B, 3, S, S) to (B, D).
            data: The images.
            device: Device of the encoder.
            probe: A classifier of its features, measured as ``probe/top1`` if there are labels.

        Returns:
            ``rankme``, ``alignment``, ``uniformity`` and, with labels, ``knn/top1``, ``knn/top5``
            (first k) and ``knn/top1_k<k>``, ``knn/top5_k<k>``, in percent.
        """
        splits = data.splits
        result: dict[str, float] = {}
        bank: Tensor | None = None
        if splits.bank is not None and splits.val is not None:
            bank, bank_labels = self._embed(encoder, data, splits.bank, self.bank_limit, device)
            val, val_labels = self._embed(encoder, data, splits.val, self.val_limit, device)
            found = self._accuracy(bank, bank_labels, val, val_labels, len(splits.classes), device)
            for position, (k, (top1, top5)) in enumerate(found.items()):
                suffix = f"_k{k}" if position else ""
                result |= {f"knn/top1{suffix}": top1, f"knn/top5{suffix}": top5}
            if probe is not None:
                result["probe/top1"] = probe.top1(val, val_labels)
        if bank is None or splits.bank is not splits.train:
            bank, _ = self._embed(encoder, data, splits.train, RANK_SAMPLE, device)
        rows = torch.linspace(0, len(bank) - 1, min(len(bank), RANK_SAMPLE)).long()
        sample = bank[rows]  # evenly over the set, which may be sorted by class
        first, second = self._two_views(encoder, data, device)
        return result | {
            "rankme": rankme(sample),
            "alignment": alignment(first, second),
            "uniformity": uniformity(sample),
        }

    def _accuracy(
        self,
        bank: Tensor,
        bank_labels: Tensor,
        val: Tensor,
        val_labels: Tensor,
        classes: int,
        device: torch.device,
    ) -> dict[int, tuple[float, float]]:
        """Return k -> (top-1, top-5) in percent; each rank searches for its share of ``val``."""

        def searched(part: slice) -> dict[int, tuple[float, float]]:
            query, labels = val[part], val_labels[part]
            return knn_accuracy(
                bank, bank_labels, query, labels, classes, self.k, self.temperature, device
            )

        if world_size() == 1:
            return searched(slice(None))
        share = slice(rank() % len(val), None, world_size())  # of few images some are asked twice
        mine, count = searched(share), len(val[share])
        hits = torch.tensor([*mine.values()], dtype=torch.float32, device=device) * count
        total = torch.tensor(float(count), device=device)
        torch.distributed.all_reduce(hits)
        torch.distributed.all_reduce(total)
        every = (hits / total).tolist()
        return {k: (top1, top5) for k, (top1, top5) in zip(mine, every, strict=True)}

    def _embed(
        self,
        encoder: torch.nn.Module,
        data: DataModule,
        images: ImageSet,
        limit: int | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        picks = stratified(images.labels, self._count(images, limit), seed=0)
        return _features(encoder, data, images, picks.tolist(), device), images.labels[picks]

    def _two_views(
        self, encoder: torch.nn.Module, data: DataModule, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        images = data.splits.train
        picks = stratified(images.labels, min(VIEW_SAMPLE, len(images)), seed=0)
        return embed_two_views(encoder, images, picks.tolist(), data.large_views, device)


class Recluster(pl.Callback):
    """Clusters every ``cluster_every`` epochs of a ``ClusterObjective`` while it mixes."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Embed and cluster all training images, and set the clusters of the objective."""
        mixing = getattr(pl_module, "mixing", None)
        every = getattr(mixing, "cluster_every", None)
        if mixing is None or every is None:
            return
        if trainer.current_epoch % every and mixing.ids is not None:
            return
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        steps = max(1, total // (trainer.max_epochs or 1))
        if not mixing.mixes_in(range(step, step + steps), total):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        images = data.splits.train
        with trainer.precision_plugin.forward_context():
            encoder: Any = pl_module.teacher_backbone
            features = _features(encoder, data, images, range(len(images)), pl_module.device)
        found = kmeans(features, mixing.clusters, start=mixing.centroids)
        # One process clusters for all: rounding could put an image into another cluster elsewhere.
        mixing.assign(*trainer.strategy.broadcast(found))
