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

    On un-augmented validation images; nothing where there are none. Where mixtures have a head of
    their own it is measured in the same passes, but the plain images' head is the one whose best
    epoch is kept.

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
            average ``val/ema_top1`` and so on; of the mixtures' heads, where there are some,
            ``val/mix_top1``, ``val/ema_mix_top1`` and so on.
        """
        val, splits = data.splits.val, data.splits
        found: dict[str, float] = {}
        if val is None:
            return {}
        for network_name, network in module.measured().items():
            both = extract(
                network,
                val,
                range(len(val)),
                splits.mean,
                splits.std,
                device=module.device,
                workers=data.worker_count(),
            )
            heads = both.split(module.classes, dim=1)
            for head_name, logits in zip(("", "mix_"), heads, strict=False):
                prefix = f"val/{network_name}{head_name}"
                top1, top5 = top1_top5(logits, val.labels)
                loss = F.cross_entropy(logits, val.labels).item()
                found |= {f"{prefix}top1": top1, f"{prefix}top5": top5, f"{prefix}loss": loss}
        return found

    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return the accuracy of both networks, of each head where there are two."""
        if "val/top1" not in newest:
            return []
        now, best, ema = (newest[f"val/{n}"] for n in ("top1", "best_top1", "ema_top1"))
        lines = [("top-1", f"{now:.2f}% final, {best:.2f}% best; EMA {ema:.2f}% final")]
        if "val/mix_top1" in newest:
            mix, average = newest["val/mix_top1"], newest["val/ema_mix_top1"]
            text = f"top-1 of their head {mix:.2f}% final; EMA {average:.2f}% final"
            lines.append(("mixtures", text))
        return lines
