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

WIDEST = 65536  # layer of a head
SMALLEST = 1e-4  # temperature: below it, similarities of unit vectors overflow float16
CONTRAST_TEMPERATURE = 0.2  # of methods that have no negatives, and so no temperature, of their own


def check_widths(**widths: int) -> None:
    """Refuse widths of a head's layers that are out of range, or too many weights for the memory.

    Args:
        **widths: By their keys under ``method``.

    Raises:
        ConfigError: For the first of them.
    """
    for name, width in widths.items():
        check_range(f"method.{name}", width, 1, WIDEST)
    (first, rows), (second, columns) = sorted(widths.items(), key=lambda item: -item[1])[:2]
    check_memory(f"a layer of method.{first}={rows} and {second}={columns}", rows * columns)


@dataclass(frozen=True)
class Passed:
    """What one pass over (B, 3, S, S) images gave."""

    embedding: Tensor  # (B, D) of the projector
    query: Tensor | None = None  # (B, D) of the predictor, or the embedding where there is none
    maps: Tensor | None = None  # (B, C, h, w) of the stage that mixing reads, no gradient


class StepMemory:
    """Remembers passes by branch and images while a step lasts; outside of one it forgets at once.

    Images are compared by identity: the same tensor, not an equal one.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, Passed]] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Remember until the step is over."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def find(self, branch: str, images: Tensor) -> Passed | None:
        """Return what ``branch`` gave for these images in this step."""
        for name, seen, passed in self._kept or ():
            if name == branch and seen is images:
                return passed
        return None

    def once(self, branch: str, images: Tensor, compute: Callable[[], Passed]) -> Passed:
        """Return what ``branch`` gave for these images, or compute it now."""
        passed = self.find(branch, images)
        if passed is None:
            passed = compute()
            if self._kept is not None:
                self._kept.append((branch, images, passed))
        return passed


class BaseMethod(pl.LightningModule, ABC):
    """What all methods share.

    A method has a ``projector``, ``targets`` and a ``pair_loss``, and so fulfils the contract of
    ``ssl_samix.types.Method`` for whoever mixes images. Embeddings are L2-normalised wherever they
    leave a method whose criterion does not read their lengths.

    Args:
        backbone: The encoder that is trained.
        optimizer: How it is optimised.
        mixing: The mixing objective, or None.
    """

    wants_sync_batchnorm = True  # statistics over all devices, as SimCLR's and BYOL's papers have
    directions: tuple[tuple[int, int], ...] = ((0, 1),)
    keeps_plain_views = True  # beside mixtures, where the configuration does not say
    # Of a Mixer's local and global term, likewise (measured: docs/results/mixer.md).
    mixer_weights = (1.0, 0.0)
    projector: nn.Module
    bad_step: Tensor  # first step with a NaN or infinite loss; -1: none

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
        self.register_buffer("bad_step", torch.tensor(-1), persistent=False)

    @property
    def embedder(self) -> nn.Sequential:
        """Backbone and projector, images (B, 3, S, S) to unnormalised embeddings (B, D)."""
        return nn.Sequential(self.backbone, self.projector)

    @property
    def online(self) -> nn.Sequential:
        """The branch that learns: the embedder and, where there is one, the predictor."""
        heads = [] if self.predictor is None else [self.predictor]
        return nn.Sequential(*self.embedder, *heads)

    @property
    def teacher(self) -> nn.Sequential:
        """The embedder that ``frozen_query`` reads; the online one where there is no twin."""
        return self.embedder if self.twin is None else self.twin.module  # type: ignore[return-value]

    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """Return the method's loss of the plain views, the mean over its directions, (B,)."""
        parents = torch.arange(len(views[0]), device=views[0].device)[:, None]
        # Queries first: a method without a twin has its targets from the same passes.
        queries = [self.query(views[query]) for query, _ in self.directions]
        losses = [
            self.pair_loss(query, self.keys(views[key]), parents)[:, 0]
            for query, (_, key) in zip(queries, self.directions, strict=True)
        ]
        return torch.stack(losses).mean(dim=0)

    @property
    def teacher_backbone(self) -> Backbone:
        """The teacher's backbone, whose maps the mixer reads."""
        return self.teacher[0]  # type: ignore[return-value]

    @abstractmethod
    def targets(self, images: Tensor) -> Tensor:
        """Embed images to what queries are compared with: (B, D), no gradient."""

    @abstractmethod
    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Compare (K, D) queries with their parents (K, P) among the targets: (K, P)."""

    def keys(self, images: Tensor) -> Tensor:
        """Embed what the own loss compares queries with; ``targets`` where it has no gradient."""
        return self.targets(images)

    def contrast(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """InfoNCE among the targets of all ranks, for methods without negatives, (K, P)."""
        query, others = F.normalize(query, dim=1), F.normalize(gathered(target), dim=1)
        rows = parents + offset(target)
        return info_nce_in_batch(query, others, rows, None, CONTRAST_TEMPERATURE)

    def likeness(
        self, query: Tensor, target: Tensor, parents: Tensor, temperature: float
    ) -> Tensor:
        """Cosines of queries and their parents over a temperature, (K, P)."""
        return cosines(query, target[parents]) / temperature

    def after_step(self) -> None:
        """Let the twin follow; called after each optimizer step."""
        if self.twin is not None and self.mixing is not None:
            self.twin.update(self.embedder, self.mixing.momentum, statistics=True)

    def after_batch(self) -> None:
        """Store what the next batch compares with (queue); called when all losses are done."""

    def add_teacher(self) -> None:
        """Give a method without a momentum encoder the one that a learning mixer reads."""
        if self.mixing is not None and self.mixing.learns:
            self.twin = EMATwin(self.embedder)

    @torch.no_grad()
    def online_targets(self, images: Tensor) -> Tensor:
        """Embed with the online embedder, no gradient: ``targets`` of methods without a twin."""
        passed = self.memory.find("online", images)
        if passed is None:
            passed = self.memory.once("targets", images, lambda: self._online(images))
        return passed.embedding.detach()

    def query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the online branch to (B, D), with gradient."""
        query = self.memory.once("online", images, lambda: self._online(images)).query
        assert query is not None
        return query

    def mixed_query(self, images: Tensor) -> Tensor:
        """Embed mixtures that come beside plain views; as these, but for a method of two heads."""
        return self.query(images)

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed with the frozen teacher to (B, D); gradient reaches the images only."""
        return self.unit(self._frozen_forward(self.teacher, images))

    def maps(self, images: Tensor, stage: int, source: str) -> Tensor:
        """Return a stage's maps (B, C, h, w), of a pass that has been made if there is one."""
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
        """Bring embeddings to the form in which they leave the method: unit rows, float32."""
        return F.normalize(embedding.float(), dim=1)

    def read(self, branch: nn.Sequential, images: Tensor) -> tuple[Tensor, ...]:
        """Embed with backbone and projector: (B, D), and the maps that mixing reads, if any."""
        if self.mixing is None or self.mixing.stage is None:
            return (branch(images),)
        backbone, projector = branch
        maps, pooled = backbone.map_and_features(images, self.mixing.stage)  # type: ignore[operator]
        return projector(pooled), maps.detach()

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """Make the pass of the online embedder."""
        return self.read(self.embedder, images)

    def _online(self, images: Tensor) -> Passed:
        embedding, *maps = self.embed(images)
        unit = self.unit(embedding)
        query = unit if self.predictor is None else self.unit(self.predictor(embedding))
        return Passed(unit, query, *maps)

    def compile_passes(self, **options: Any) -> None:
        """Let ``torch.compile`` with these options have the passes; losses stay as they are."""
        options = {"dynamic": False, **options}
        self.read = torch.compile(self.read, **options)  # type: ignore[method-assign]
        self._frozen_forward = torch.compile(frozen_forward, **options)
        for part in [] if self.mixing is None else self.mixing.networks:
            part.compile(**options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum the named loss terms of one batch and log each."""
        torch.compiler.cudagraph_mark_step_begin()  # what recorded graphs gave may be overwritten
        with self.memory.step():
            if self.mixing is None:
                terms = Terms({"own": self.own_loss(batch.views).mean()}, {})
            else:
                terms = self.mixing(self, batch, self.global_step, self.total_steps)
        self._log_terms(terms)
        loss = torch.stack(list(terms.losses.values())).sum()
        # On the device, without a look: the host asks now and then.
        broken = ~torch.isfinite(loss.detach()) & (self.bad_step < 0)
        self.bad_step = torch.where(broken, self.global_step, self.bad_step)
        return loss

    def _log_terms(self, terms: Terms) -> None:
        losses = {name: value.detach() for name, value in terms.losses.items()}
        learner = losses.pop("mixer", None)  # a loss of its own, with weights of its own
        values = {"loss": torch.stack(list(losses.values())).sum(), **terms.logs}
        if len(losses) > 1:
            values |= {f"loss/{name}": value for name, value in losses.items()}
        if learner is not None and terms.logs:
            values["loss/mixer"] = learner
        # Means over the epoch only: a value per step would make the device wait for the host.
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Let the mixing objective do what has to be done before a step."""
        if self.mixing is not None:
            self.mixing.before_step()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the twin follow."""
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the method store its keys."""
        self.after_batch()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule from the recipe."""
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

    A subclass calls ``add_twin`` when its heads are there.
    """

    twin: EMATwin

    def add_twin(self) -> None:
        """Copy backbone and projector to the momentum encoder."""
        self.twin = EMATwin(self.embedder)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Embed with the momentum encoder to (B, D)."""
        return self.memory.once("teacher", images, lambda: self._teacher(images)).embedding

    def _teacher(self, images: Tensor) -> Passed:
        embedding, *maps = self.embed_targets(images)
        return Passed(self.unit(embedding), None, *maps)

    def embed_targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """Make the pass of the momentum encoder."""
        return self.read(self.teacher, images)

    def momentum_now(self) -> float:
        """Return the momentum of this step."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Move the momentum encoder."""
        self.twin.update(self.embedder, self.momentum_now())
