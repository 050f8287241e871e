"""Pretrain encoders with cheap alternatives to a Mixer, and measure them.

    python benchmarks/rivals.py --rivals same,unmix,imix,sdmp --seeds 0,1,2 --out runs/rivals \
        --csv docs/results/rivals.csv method=simclr data=folder data.root=cifar10

Each is pretrained as by `samix pretrain` with these arguments, then measured by `samix knn` and
`samix linear`. None has an additional network:

`none`          no mixing
`mixup`         plain mixup as shipped: the partner is of the other view
`same`          the partner is of the same view, both parents are compared with the other one
`unmix`         likewise, and every other batch is mixed by CutMix; lam from Beta(1, 1) (after
                Un-Mix, arXiv 2003.05438)
`imix`          the mixture in place of the query, lam = max(lam, 1 - lam) from Beta(1, 1); the keys
                of the batch are negatives beside MoCo's queue (after i-Mix, arXiv 2010.08887)
`sdmp`          as `same`, and mixtures of the other view that share parents are positives by the
                share that they have in common (after SDMP, arXiv 2206.07692)
`mixed_barlow`  Barlow Twins alone: the cross-correlation of mixtures is to be the mixed one of
                their parents (after Mixed Barlow Twins, arXiv 2312.02151)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Options, exit_on_error, print_header, print_table
from encoders import Table
from torch import Tensor, nn

from ssl_samix.losses import info_nce_in_batch
from ssl_samix.methods.barlow_twins import BarlowTwins
from ssl_samix.methods.moco import MoCo
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.mixup.policies import CutMix, Mixup
from ssl_samix.types import Batch, Method, Mixed, MixPlan, Terms


class Alternating(nn.Module):
    """Mixup and CutMix, alternating by batch."""

    needs_maps = False

    def __init__(self) -> None:
        super().__init__()
        self.policies = nn.ModuleList([Mixup(), CutMix()])
        self.batches = 0

    def forward(self, images: Tensor, partners: Tensor, plan: MixPlan, maps: Any) -> Mixed:
        """Mix as ``ssl_samix.types.MixingPolicy`` says."""
        self.batches += 1
        mixed: Mixed = self.policies[self.batches % 2](images, partners, plan, maps)
        return mixed


class BatchNegatives:
    """MoCo with the keys of the batch as negatives beside the queue.

    Args:
        method: MoCo.
    """

    def __init__(self, method: MoCo) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return InfoNCE against the queue and the other images' keys, (K, P)."""
        queue = query @ self.method.queue.keys.T
        return info_nce_in_batch(query, target, parents, queue, self.method.temperature)


class IMix(MixObjective):
    """Mixtures with at least half of the image itself, in place of the queries."""

    def forward(self, method: Any, batch: Batch, step: int, total_steps: int) -> Terms:
        """Return the losses of a batch."""
        wrapped = BatchNegatives(method) if isinstance(method, MoCo) else method
        return super().forward(wrapped, batch, step, total_steps)

    def draw(self, images: Tensor) -> MixPlan:
        """Return a plan with ratios of at least 1/2."""
        plan = super().draw(images)
        return replace(plan, lam=torch.maximum(plan.lam, 1 - plan.lam))


class SDMP(MixObjective):
    """Also compares mixtures of both views by one plan with each other."""

    def _beside(self, method: Method, batch: Batch) -> Tensor:
        first, second = batch.views
        plan = self.draw(first)
        queries = method.mixed_query(self.policy(first, first, plan, None).images)
        own = method.targets(second)
        losses = method.pair_loss(queries, own, plan.parents)
        of_parents = plan.lam * losses[:, 0] + (1 - plan.lam) * losses[:, 1]
        keys = method.targets(self.policy(second, second, plan, None).images)
        logits = (queries @ keys.T).float() / method.temperature  # type: ignore[attr-defined]
        return (of_parents + F.cross_entropy(logits, overlaps(plan), reduction="none")) / 2


def overlaps(plan: MixPlan) -> Tensor:
    """Return the common share of each pair of mixtures, (K, K), rows that sum to 1."""
    shares = F.one_hot(plan.rows) * plan.lam[:, None]
    shares = shares + F.one_hot(plan.partner, shares.shape[1]) * (1 - plan.lam)[:, None]  # (K, B)
    common = torch.minimum(shares[:, None], shares[None]).sum(dim=2)
    return common / common.sum(dim=1, keepdim=True)


class MixedBarlow(MixObjective):
    """Barlow Twins and its regulariser of mixed samples, one ratio for the batch."""

    def forward(self, method: BarlowTwins, batch: Batch, step: int, total_steps: int) -> Terms:  # type: ignore[override]
        """Return the losses of a batch."""
        own = method.own_loss(batch.views).mean()
        first, second = batch.views
        plan = self.draw(first)
        lam = plan.lam[0]
        plan = replace(plan, lam=lam.expand(len(first)))
        mixture = method.query(self.policy(first, second, plan, None).images)
        m, a, b = (standardised(z) for z in (mixture, method.query(first), method.query(second)))
        loss = sum(
            (m.T @ z - lam * a.T @ z - (1 - lam) * b[plan.partner].T @ z).div(len(m)).pow(2).sum()
            for z in (a, b)
        )
        return Terms({"own": own, "mix": self.weight * method.redundancy * loss}, {})


def standardised(rows: Tensor) -> Tensor:
    """Return columns standardised to mean 0 and variance 1 over the rows."""
    return F.batch_norm(rows.float(), None, None, training=True)


RIVALS: dict[str, tuple[type[MixObjective], type[nn.Module], dict[str, Any]]] = {
    "mixup": (MixObjective, Mixup, {}),
    "same": (MixObjective, Mixup, {"pairs": "same"}),
    "unmix": (MixObjective, Alternating, {"pairs": "same", "alpha": 1.0}),
    "imix": (IMix, Mixup, {"placement": "replace", "alpha": 1.0}),
    "sdmp": (SDMP, Mixup, {"pairs": "same"}),
    "mixed_barlow": (MixedBarlow, Mixup, {"alpha": 1.0, "weight": 5.0}),
}


def made(name: str, backbone: Any) -> MixObjective | None:
    """Return the mixing objective of a rival."""
    if name == "none":
        return None
    objective, policy, settings = RIVALS[name]
    return objective(policy(), backbone=backbone, **settings)


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain with each rival and seed, measure, and print the table."""
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    parser.add_argument("--rivals", default="same,unmix,imix,sdmp", help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--out", default="runs/rivals", help="folder of the runs")
    parser.add_argument("--csv", help="table of the rows")
    parser.add_argument("words", nargs="+", help="arguments of samix pretrain")
    args = parser.read(arguments)
    names = parser.names("rivals", args.rivals, ("none", *RIVALS))
    print_header("Encoders that learn from a Mixer's rivals", args)
    path = Path(args.csv) if args.csv else Path(args.out) / "rivals.csv"
    table = Table(path, ("method", "rival", "seed"))
    (method,) = [w.removeprefix("method=") for w in args.words if w.startswith("method=")] or [
        "simclr"
    ]
    for seed in args.seeds.split(","):
        for name in names:
            out = Path(args.out) / f"{method}-{name}-s{seed}"
            table.train((method, name, seed), lambda b, name=name: made(name, b), args.words, out)
    print_table(table.columns[:-1], table.shown())


if __name__ == "__main__":
    main(sys.argv[1:])
