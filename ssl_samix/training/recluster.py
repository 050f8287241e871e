"""Callback that clusters the training set with the teacher's features, for SAMix-C."""

from __future__ import annotations

import pytorch_lightning as pl

from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.measures import kmeans


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
            features = extract(
                pl_module.teacher_backbone,  # type: ignore[arg-type]
                images,
                range(len(images)),
                data.splits.mean,
                data.splits.std,
                device=pl_module.device,
                workers=data.worker_count(),
            )
        found = kmeans(features, mixing.clusters, start=mixing.centroids)
        # One process clusters for all: rounding could put an image into another cluster elsewhere.
        mixing.assign(*trainer.strategy.broadcast(found))
