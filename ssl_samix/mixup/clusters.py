"""SAMix-C: mixtures are told apart by the clusters of their parents (arXiv 2111.15454, eq. 8)."""

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

    A linear head learns the clusters from embeddings of plain views, beside the Mixer; mixtures
    pass it with its weights frozen. Images of one cluster are mixed by a flat mask: there is
    nothing to choose between them. Whoever trains calls ``assign`` before the first step.

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
        # Not buffers: DDP would send them in every step, from the CPU, which NCCL cannot.
        self.ids: Tensor | None = None
        self.centroids: Tensor | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """Keep the clusters in checkpoints: their number of images is not known beforehand."""
        return {"ids": self.ids, "centroids": self.centroids}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the clusters back."""
        self.ids, self.centroids = state["ids"], state["centroids"]

    def assign(self, ids: Tensor, centroids: Tensor) -> None:
        """Take new clusters.

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
        """Name the mixtures whose parents are of one cluster, (K,)."""
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
        """Tell the clusters of a mixture's parents, through the head's frozen weights, (K,)."""
        ids = self.of(batch)[plan.parents]  # (K, 2)
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        return weighted(cluster_loss(query, ids, weight, bias), plan.lam)

    def learn(self, method: Method, batch: Batch, progress: float) -> Terms:
        """Return the Mixer's loss and, in the same term, the head's."""
        terms = super().learn(method, batch, progress)
        target, ids = method.targets(batch.views[1]), self.of(batch)[:, None]
        head = cluster_loss(target, ids, self.head.weight, self.head.bias).mean()
        return Terms(
            {"mixer": terms.losses["mixer"] + head}, {**terms.logs, "mixer/head": head.detach()}
        )


@full_precision
def cluster_loss(embedding: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cross-entropy of a linear head on unit embeddings.

    Args:
        embedding: (K, D).
        ids: (K, P) int64, clusters, each as if it were the only right one.
        weight: (clusters, D) of the head.
        bias: (clusters,).

    Returns:
        (K, P) losses.
    """
    chances = F.linear(F.normalize(embedding, dim=1), weight, bias).log_softmax(dim=1)
    return -chances.gather(1, ids)
