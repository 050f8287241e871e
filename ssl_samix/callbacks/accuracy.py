"""Watches a classifier while it trains: accuracy on the validation images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F

from ssl_samix.callbacks.monitor import Monitor
from ssl_samix.data.datamodule import DataModule
from ssl_samix.evaluation.accuracy import top1_top5
from ssl_samix.evaluation.features import extract


class AccuracyMonitor(Monitor):
    """Every n epochs: top-1 and top-5 of the classifier and of its moving average (EMA), and loss.

    On un-augmented validation images; nothing where there are none.

    Args:
        every_n_epochs: The interval, see ``Monitor``.
    """

    name = "accuracy"
    columns = ("val/",)
    first = ("val/top1", "val/ema_top1")
    shown: ClassVar = {"val/top1": "top-1 {:.1f}%", "val/ema_top1": "EMA {:.1f}%"}
    step_cost = 3

    def passes(self, data: DataModule) -> int:
        """Count the validation images, for both networks."""
        return 0 if data.splits.val is None else 2 * len(data.splits.val)

    def look(self, module: Any, data: DataModule) -> dict[str, float]:
        """Measure the classifier and its average.

        Returns:
            ``val/top1``, ``val/top5`` in percent and ``val/loss``, the plain cross-entropy; of the
            average ``val/ema_top1`` and so on.
        """
        val, splits = data.splits.val, data.splits
        found: dict[str, float] = {}
        if val is None:
            return {}
        for prefix, network in (("val/", module.embedder), ("val/ema_", module.teacher)):
            logits = extract(
                network,
                val,
                range(len(val)),
                splits.mean,
                splits.std,
                device=module.device,
                workers=data.worker_count(),
            )
            top1, top5 = top1_top5(logits, val.labels)
            loss = F.cross_entropy(logits, val.labels).item()
            found |= {f"{prefix}top1": top1, f"{prefix}top5": top5, f"{prefix}loss": loss}
        return found

    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return the accuracy of both networks, where it was measured."""
        if "val/top1" not in newest:
            return []
        now, best, ema = (newest[f"val/{n}"] for n in ("top1", "best_top1", "ema_top1"))
        return [("top-1", f"{now:.2f}% final, {best:.2f}% best; EMA {ema:.2f}% final")]
