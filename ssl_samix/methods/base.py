"""Base classes of the methods: training step, logging, momentum encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.errors import check_memory, check_range
from ssl_samix.losses import cosines, info_nce_in_batch
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.distributed import gathered, offset
from ssl_samix.models.ema import EMATwin, evaluating, frozen_forward
from ssl_samix.optim import OptimizerRecipe
from ssl_samix.types import Batch, Terms

WIDEST = 65536  # maximum width of a head's layer
SMALLEST = 1e-4  # minimum temperature; below it, similarities of unit vectors overflow float16
CONTRAST_TEMPERATURE = 0.2  # for methods without negatives, which have no temperature


def check_widths(**widths: int) -> None:
    """Check that the layer widths of a head are in range and that its weights fit in memory.

    Args:
        **widths: Widths by their keys under ``method``.

    Raises:
        ConfigError: For the first width that is not.
    """
    for name, width in widths.items():
        check_range(f"method.{name}", width, 1, WIDEST)
    (first, rows), (second, columns) = sorted(widths.items(), key=lambda item: -item[1])[:2]
    check_memory(f"a layer of method.{first}={rows} and {second}={columns}", rows * columns)


@dataclass(frozen=True)
class Passed:
    """Outputs of a forward pass over (B, 3, S, S) images."""

    embedding: Tensor  # (B, D) output of the projector
    query: Tensor | None = None  # (B, D) output of the predictor, or the embedding
    maps: Tensor | None = None  # (B, C, h, w) of the mixing stage, no gradient
    features: Tensor | None = None  # (B, F) of the backbone, no gradient


class StepMemory:
    """Cache of forward passes by branch and images, for one step; disabled outside of steps.

    Images are compared by identity, not by value.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, Passed]] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enable the cache for the duration of a step."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def find(self, branch: str, images: Tensor) -> Passed | None:
        """Return the cached outputs of ``branch`` for these images, or None."""
        for name, seen, passed in self._kept or ():
            if name == branch and seen is images:
                return passed
        return None

    def once(self, branch: str, images: Tensor, compute: Callable[[], Passed]) -> Passed:
        """Return the cached outputs of ``branch`` for these images, or compute and cache them."""
        passed = self.find(branch, images)
        if passed is None:
            passed = compute()
            if self._kept is not None:
                self._kept.append((branch, images, passed))
        return passed


class BaseMethod(pl.LightningModule, ABC):
    """Base class of all methods.

    A method has a ``projector``, ``targets`` and a ``pair_loss``. It implements the protocol
    ``ssl_samix.types.Method``, which mixing objectives use. A method whose criterion does not
    depend on the length of embeddings returns them L2-normalised.

    Args:
        backbone: The encoder that is trained.
        optimizer: The optimizer recipe.
        mixing: The mixing objective, or None.
    """

    wants_sync_batchnorm = True  # as in the papers of SimCLR and BYOL
    directions: tuple[tuple[int, int], ...] = ((0, 1),)
    keeps_plain_views = True  # default: add mixtures instead of replacing views
    # Default weights of a Mixer's local and global term (measured: docs/results/mixer.md).
    mixer_weights = (1.0, 0.0)
    projector: nn.Module
    last_loss: Tensor  # of the newest step, without the Mixer's
    bad_step: Tensor  # first step with a NaN or infinite loss; -1 if none

    def __init__(
        self, backbone: Backbone, optimizer: OptimizerRecipe, mixing: MixObjective | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.mixing = mixing
        self.recipe = optimizer
        self.predictor: nn.Module | None = None
        self.twin: EMATwin | None = None
        self.memory = StepMemory()
        self._frozen_forward = frozen_forward
        self.on_features: Callable[[Tensor, Tensor], None] | None = None  # features, labels
        self.register_buffer("bad_step", torch.tensor(-1), persistent=False)

    @property
    def embedder(self) -> nn.Sequential:
        """Backbone and projector: images (B, 3, S, S) to unnormalised embeddings (B, D)."""
        return nn.Sequential(self.backbone, self.projector)

    @property
    def online(self) -> nn.Sequential:
        """The trained branch: the embedder and, if there is one, the predictor."""
        heads = [] if self.predictor is None else [self.predictor]
        return nn.Sequential(*self.embedder, *heads)

    @property
    def teacher(self) -> nn.Sequential:
        """The embedder used by ``frozen_query``: the twin (EMA), or else the online embedder."""
        return self.embedder if self.twin is None else self.twin.module  # type: ignore[return-value]

    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """Return the method's loss of the plain views, averaged over its directions, (B,).

        Small views are queries only, each against each key of the large ones, with equal weights
        (SwAV, arXiv 2006.09882, section 3.2); in one pass, as all have one size.
        """
        # Queries first: a method without a twin takes its targets from the same forward passes.
        queries = [self.query(views[query]) for query, _ in self.directions]
        keys = {key: self.keys(views[key]) for _, key in self.directions}
        losses = [
            self.plain_loss(query, keys[key])
            for query, (_, key) in zip(queries, self.directions, strict=True)
        ]
        if small := views[2:]:
            query = self.query(torch.cat(small))
            rows = torch.arange(len(small[0]), device=query.device).repeat(len(small))[:, None]
            for key in keys.values():
                losses += self.pair_loss(query, key, rows)[:, 0].chunk(len(small))
        return torch.stack(losses).mean(dim=0)

    def plain_loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the losses (B,) of plain views' queries (B, D) for their own keys (B, D)."""
        return self.pair_loss(query, key, torch.arange(len(query), device=query.device)[:, None])[
            :, 0
        ]

    @property
    def teacher_backbone(self) -> Backbone:
        """The teacher's backbone, which provides feature maps to the mixer."""
        return self.teacher[0]  # type: ignore[return-value]

    @abstractmethod
    def targets(self, images: Tensor) -> Tensor:
        """Return the targets of images, (B, D), without gradient."""

    @abstractmethod
    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return losses (K, P) of queries (K, D) for their parents, (K, P) rows of the targets."""

    def keys(self, images: Tensor) -> Tensor:
        """Return the own loss's keys (B, D); here ``targets``, which have no gradient."""
        return self.targets(images)

    def contrast(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return InfoNCE losses (K, P) among all ranks' targets, for methods without negatives."""
        query, others = F.normalize(query, dim=1), F.normalize(gathered(target), dim=1)
        rows = parents + offset(target)
        return info_nce_in_batch(query, others, rows, None, CONTRAST_TEMPERATURE)

    def likeness(
        self, query: Tensor, target: Tensor, parents: Tensor, temperature: float
    ) -> Tensor:
        """Return cosine similarities of queries and parents, divided by a temperature, (K, P)."""
        return cosines(query, target[parents]) / temperature

    def after_step(self) -> None:
        """Update the twin (EMA); called after each optimizer step."""
        if self.twin is not None and self.mixing is not None:
            self.twin.update(self.embedder, self.mixing.momentum, statistics=True)

    def after_batch(self) -> None:
        """Update the queue for the next batch; called after all losses are computed."""

    def add_teacher(self) -> None:
        """Add a momentum encoder for a trained mixer, if the method has none."""
        if self.mixing is not None and self.mixing.learns:
            self.twin = EMATwin(self.embedder)

    @torch.no_grad()
    def online_targets(self, images: Tensor) -> Tensor:
        """Return online embeddings without gradient: the ``targets`` of methods without a twin."""
        passed = self.memory.find("online", images)
        if passed is None:
            passed = self.memory.once("targets", images, lambda: self._online(images))
        return passed.embedding.detach()

    def query(self, images: Tensor) -> Tensor:
        """Return the online branch's output (B, D) for images (B, 3, S, S), with gradient."""
        query = self.memory.once("online", images, lambda: self._online(images)).query
        assert query is not None
        return query

    def mixed_query(self, images: Tensor) -> Tensor:
        """Return queries of additional mixtures; ``query`` unless the method has two heads."""
        return self.query(images)

    def frozen_query(self, images: Tensor) -> Tensor:
        """Return the frozen teacher's output (B, D); gradients flow to the images only."""
        return self.unit(self._frozen_forward(self.teacher, images))

    def maps(self, images: Tensor, stage: int, source: str) -> Tensor:
        """Return a stage's maps (B, C, h, w), from a cached forward pass if there is one."""
        for branch in ("teacher",) if source == "teacher" else ("online", "targets", "teacher"):
            passed = self.memory.find(branch, images)
            if passed is not None and passed.maps is not None:
                return passed.maps
        maps = self.memory.once("maps", images, lambda: self._only_maps(images, stage)).maps
        assert maps is not None
        return maps

    @torch.no_grad()
    def _only_maps(self, images: Tensor, stage: int) -> Passed:
        with evaluating(self.teacher):
            maps: Tensor = self.teacher_backbone.stage_map(images, stage)
        return Passed(embedding=images.new_empty(0), maps=maps)

    def unit(self, embedding: Tensor) -> Tensor:
        """Return embeddings in the method's output format: L2-normalised, float32."""
        return F.normalize(embedding.float(), dim=1)

    def read(self, branch: nn.Sequential, images: Tensor) -> tuple[Tensor, ...]:
        """Return embeddings (B, D) and features (B, F) of a backbone and projector.

        The maps for mixing follow, if there are any. Only the embeddings have a gradient.
        """
        backbone, projector = branch
        if self.mixing is None or self.mixing.stage is None:
            pooled = backbone(images)
            return projector(pooled), pooled.detach()
        maps, pooled = backbone.map_and_features(images, self.mixing.stage)  # type: ignore[operator]
        return projector(pooled), pooled.detach(), maps.detach()

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the forward pass of the online embedder; see ``read``."""
        return self.read(self.embedder, images)

    def _online(self, images: Tensor) -> Passed:
        embedding, features, *maps = self.embed(images)
        unit = self.unit(embedding)
        query = unit if self.predictor is None else self.unit(self.predictor(embedding))
        return Passed(unit, query, maps[0] if maps else None, features)

    def compile_passes(self, **options: Any) -> None:
        """Apply ``torch.compile`` with these options to the forward passes, but not the losses."""
        options = {"dynamic": False, **options}
        self.read = torch.compile(self.read, **options)  # type: ignore[method-assign]
        self._frozen_forward = torch.compile(frozen_forward, **options)
        for part in [] if self.mixing is None else self.mixing.networks:
            part.compile(**options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the loss terms of a batch, and log each term."""
        torch.compiler.cudagraph_mark_step_begin()  # outputs of CUDA graphs may be overwritten
        with self.memory.step():
            if self.mixing is None:
                terms = Terms({"own": self.own_loss(batch.views).mean()}, {})
            else:
                terms = self.mixing(self, batch, self.global_step, self.total_steps)
            if self.on_features is not None:
                self._show_features(batch)
        self._log_terms(terms)
        loss = torch.stack(list(terms.losses.values())).sum()
        # Kept on the device to avoid a synchronisation; the host checks it from time to time.
        broken = ~torch.isfinite(loss.detach()) & (self.bad_step < 0)
        self.bad_step = torch.where(broken, self.global_step, self.bad_step)
        return loss

    def _show_features(self, batch: Batch) -> None:
        """Call ``on_features`` with the features of a plain view, if the step computed any."""
        passes = (self.memory.find("online", view) for view in batch.views)
        features = next((p.features for p in passes if p is not None), None)
        if features is not None and self.on_features is not None:
            self.on_features(features, batch.label)

    def _log_terms(self, terms: Terms) -> None:
        losses = {name: value.detach() for name, value in terms.losses.items()}
        learner = losses.pop("mixer", None)  # a separate loss of separate weights
        values = {"loss": torch.stack(list(losses.values())).sum(), **terms.logs}
        self.last_loss = values["loss"]  # on the device; read back from time to time
        if len(losses) > 1:
            values |= {f"loss/{name}": value for name, value in losses.items()}
        if learner is not None and terms.logs:
            values["loss/mixer"] = learner
        # Epoch means only: logging every step would synchronise host and device.
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Call the mixing objective's hook before the optimizer step."""
        if self.mixing is not None:
            self.mixing.before_step()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run the optimizer step, then call ``after_step``."""
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call ``after_batch``."""
        self.after_batch()

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and learning-rate schedule of the recipe."""
        epochs = self.trainer.max_epochs or 1
        global_batch: int = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return self.recipe.build(
            self,
            batch_size=global_batch * self.trainer.accumulate_grad_batches,
            total_steps=self.total_steps,
            steps_per_epoch=max(1, self.total_steps // epochs),
            mixer=None if self.mixing is None else self.mixing.optimizer,
        )


class MomentumMethod(BaseMethod):
    """A method whose queries are compared with the embeddings of its momentum encoder.

    A subclass calls ``add_twin`` after creating its heads.
    """

    twin: EMATwin

    def add_twin(self) -> None:
        """Copy backbone and projector to the momentum encoder."""
        self.twin = EMATwin(self.embedder)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Return the momentum encoder's embeddings, (B, D)."""
        return self.memory.once("teacher", images, lambda: self._teacher(images)).embedding

    def _teacher(self, images: Tensor) -> Passed:
        embedding, _, *maps = self.embed_targets(images)
        return Passed(self.unit(embedding), None, *maps)

    def embed_targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the forward pass of the momentum encoder; see ``read``."""
        return self.read(self.teacher, images)

    def momentum_now(self) -> float:
        """Return the EMA momentum of this step."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Update the momentum encoder (EMA)."""
        self.twin.update(self.embedder, self.momentum_now())
