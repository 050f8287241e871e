"""SAMix-C: the global term classifies the clusters of the parents (arXiv 2111.15454, eq. 8)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.errors import check_range
from ssl_samix.losses import full_precision
from ssl_samix.mixup.objective import weighted
from ssl_samix.mixup.samix_objective import SAMixObjective
from ssl_samix.types import Batch, Method, MixPlan, Terms


class ClusterObjective(SAMixObjective):
    """SAMix-C: the global term is the cross-entropy on the parents' clusters.

    A linear head is trained beside the Mixer on the clusters of plain views; mixtures pass through
    it with frozen weights. Images of one cluster are mixed by a flat mask. Call ``assign`` before
    the first training step.

    Args:
        embedding_dim: D of the method's embeddings.
        clusters: Number of clusters.
        cluster_every: Epochs between two clusterings.
        **samix: Arguments of ``SAMixObjective``.

    Raises:
        ConfigError: For fewer than 2 clusters or a setting outside its range.
    """

    def __init__(
        self, *, embedding_dim: int, clusters: int = 100, cluster_every: int = 5, **samix: Any
    ) -> None:
        super().__init__(**samix)
        check_range("mixup.clusters", clusters, 2)
        check_range("mixup.cluster_every", cluster_every, 1)
        self.clusters, self.cluster_every = clusters, cluster_every
        self.head = nn.Linear(embedding_dim, clusters)
        # Not buffers: DDP would broadcast them in every step, and NCCL cannot send CPU tensors.
        self.ids: Tensor | None = None
        self.centroids: Tensor | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """Return the clusters for the checkpoint; not a buffer, since their size varies."""
        return {"ids": self.ids, "centroids": self.centroids}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the clusters."""
        self.ids, self.centroids = state["ids"], state["centroids"]

    def assign(self, ids: Tensor, centroids: Tensor) -> None:
        """Set new clusters.

        Args:
            ids: (N,) int64, the cluster of each training image.
            centroids: (clusters, C), where the next clustering starts from.
        """
        self.ids, self.centroids = ids, centroids

    def of(self, batch: Batch) -> Tensor:
        """Return the clusters of a batch's images, (B,)."""
        assert self.ids is not None, "no clusters yet: call assign"
        self.ids = self.ids.to(batch.index.device)
        return self.ids[batch.index]

    def plain(self, plan: MixPlan, batch: Batch) -> Tensor:
        """Return which mixtures have both parents in one cluster, (K,) bool."""
        ids = self.of(batch)
        return ids[plan.rows] == ids[plan.partner]

    def global_loss(
        self,
        method: Method,
        query: Tensor,
        targets: tuple[Tensor, Tensor],
        plan: MixPlan,
        batch: Batch,
    ) -> Tensor:
        """Return the loss (K,) of classifying both parents' clusters with the frozen head."""
        ids = self.of(batch)[plan.parents]  # (K, 2)
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        return weighted(cluster_loss(query, ids, weight, bias), plan.lam)

    def learn(self, method: Method, batch: Batch, progress: float) -> Terms:
        """Return the Mixer's loss plus the head's, as one term."""
        terms = super().learn(method, batch, progress)
        target, ids = method.targets(batch.views[1]), self.of(batch)[:, None]
        head = cluster_loss(target, ids, self.head.weight, self.head.bias).mean()
        return Terms(
            {"mixer": terms.losses["mixer"] + head}, {**terms.logs, "mixer/head": head.detach()}
        )


@full_precision
def cluster_loss(embedding: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the cross-entropy of a linear head on L2-normalised embeddings.

    Args:
        embedding: (K, D).
        ids: (K, P) int64 clusters; each column is a separate target.
        weight: (clusters, D) of the head.
        bias: (clusters,).

    Returns:
        (K, P) losses.
    """
    chances = F.linear(F.normalize(embedding, dim=1), weight, bias).log_softmax(dim=1)
    return -chances.gather(1, ids)
