"""Watches the encoder while it trains: kNN where there are labels, RankMe everywhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from ssl_samix.callbacks.monitor import Monitor
from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.images import ImageSet
from ssl_samix.data.subsets import stratified
from ssl_samix.errors import ConfigError, check_range
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.knn import knn_accuracy
from ssl_samix.evaluation.measures import alignment, rankme, uniformity
from ssl_samix.evaluation.two_views import embed_two_views

RANK_SAMPLE = 1000  # images for RankMe and uniformity: a rank of at most 1,000 can be seen
VIEW_SAMPLE = 250  # images for alignment, embedded twice
_log = logging.getLogger(__name__)


class KNNMonitor(Monitor):
    """Every n epochs: weighted kNN on un-augmented images, RankMe, alignment and uniformity.

    Args:
        every_n_epochs: The interval, see ``Monitor``.
        k: Neighbours to vote; the first gives ``knn/top1``, the others ``knn/top1_k<k>``.
        temperature: Of the votes' weights (DINO, arXiv 2104.14294, uses 0.07).
        bank_limit: At most this many images in the memory bank (None: all).
        val_limit: At most this many validation images (None: all).

    Raises:
        ConfigError: For a setting below its smallest value.
    """

    name = "knn"
    columns = ("knn/", "rankme", "alignment", "uniformity")
    first = ("knn/top1", "rankme")
    shown: ClassVar = {"knn/top1": "kNN {:.1f}%", "rankme": "RankMe {:.1f}"}
    step_cost = 4  # of MoCo: 3 of the query encoder, 1 of the key encoder

    def __init__(
        self,
        every_n_epochs: int | Literal["auto"] = "auto",
        k: int | Sequence[int] = (20, 200),
        temperature: float = 0.07,
        bank_limit: int | None = None,
        val_limit: int | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        self.k = [k] if isinstance(k, int) else list(k)
        if not self.k:
            raise ConfigError("callbacks.knn.k needs at least one number of neighbours")
        for neighbours in self.k:
            check_range("callbacks.knn.k", neighbours, 1)
        check_range("callbacks.knn.temperature", temperature, 1e-3)
        for name, limit in (("bank_limit", bank_limit), ("val_limit", val_limit)):
            if limit is not None:
                check_range(f"callbacks.knn.{name}", limit, 1)
        self.temperature = temperature
        self.bank_limit, self.val_limit = bank_limit, val_limit

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so, if there are fewer images than neighbours that shall vote."""
        bank = trainer.datamodule.splits.bank  # type: ignore[attr-defined]
        images = 0 if bank is None else self._count(bank, self.bank_limit)
        beyond = [k for k in self.k if k > images]
        if trainer.is_global_zero and images and beyond:
            _log.warning(
                "callbacks.knn.k=%s: the bank has %d images, so %s",
                beyond[0] if len(beyond) == 1 else beyond, images,
                "all of them vote" if len(beyond) == len(self.k) else "this is left out",
            )  # fmt: skip

    def passes(self, data: DataModule) -> int:
        """Count the images that are embedded; those of two views twice."""
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

    def look(self, module: Any, data: DataModule) -> dict[str, float]:
        """Measure the backbone."""
        return self.measure(module.backbone, data, module.device)

    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return kNN, where there are labels, and RankMe."""
        lines = [("RankMe", f"{newest['rankme']:.1f}")] if "rankme" in newest else []
        if {"knn/top1", "knn/best_top1"} <= newest.keys():
            now, best = newest["knn/top1"], newest["knn/best_top1"]
            lines.insert(0, ("kNN top-1", f"{now:.2f}% final, {best:.2f}% best"))
        return lines

    def measure(
        self, encoder: torch.nn.Module, data: DataModule, device: torch.device
    ) -> dict[str, float]:
        """Measure an encoder on a data set.

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
            accuracy = knn_accuracy(
                bank, bank_labels, val, val_labels, len(splits.classes), self.k, self.temperature
            )
            for position, (k, (top1, top5)) in enumerate(accuracy.items()):
                suffix = f"_k{k}" if position else ""
                result |= {f"knn/top1{suffix}": top1, f"knn/top5{suffix}": top5}
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

    def _embed(
        self,
        encoder: torch.nn.Module,
        data: DataModule,
        images: ImageSet,
        limit: int | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        picks = stratified(images.labels, self._count(images, limit), seed=0)
        features = extract(
            encoder,
            images,
            picks.tolist(),
            data.splits.mean,
            data.splits.std,
            device=device,
            workers=data.worker_count(),
        )
        return features, images.labels[picks]

    def _two_views(
        self, encoder: torch.nn.Module, data: DataModule, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        images = data.splits.train
        picks = stratified(images.labels, min(VIEW_SAMPLE, len(images)), seed=0)
        return embed_two_views(encoder, images, picks.tolist(), data.views, device)
