"""Compare masks with an oracle: masks optimised for each pair, through the frozen teacher.

    python benchmarks/mixer_oracle.py score runs/simclr-samix
    python benchmarks/mixer_oracle.py train --objective both --seeds 0,1,2 --out runs/oracle \
        --csv docs/results/mixer_oracle.csv method=simclr data=folder data.root=cifar10

`score`: the Mixer's own loss (local + eta * global) on the same pairs and ratios, for flat masks
(plain mixup), the Mixer of a run of `samix pretrain mixup=samix`, and the oracle: the logits
of each pair's mask, one per position of the Mixer's maps, optimised by Adam for `--steps` steps,
with the drawn ratio as every mask's share. `encoder's loss` and `gradient` are the encoder's loss
on these mixtures and the norm of its gradient in the backbone's weights. The last column is the
share of the oracle's gain that is reached.

`train`: pretraining as by `samix pretrain` with these arguments, with the oracle's masks as mixing
policy (slow: each step has `--steps` passes of the teacher, forward and backward), then
`samix knn` and `samix linear`. The masks minimise the objective: `both` the published loss, `local`
(the default Mixer's) or `global` one of its terms, `hard` local - eta * global (a mixture between
its parents but far from both), `random` none (smooth random masks of the drawn ratio), `flat` none
(plain mixup).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import Options, exit_on_error, print_header, print_table
from encoders import Table
from torch import Tensor

from ssl_samix.artifacts.checkpoints import read_checkpoint
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import build, compose
from ssl_samix.data.datamodule import DataModule
from ssl_samix.errors import CheckpointError, check_choice
from ssl_samix.methods.base import BaseMethod
from ssl_samix.mixup.mixer import balanced
from ssl_samix.mixup.objective import MixObjective, parent_losses, weighted
from ssl_samix.mixup.plan import blend, flat
from ssl_samix.mixup.policies import Mixup
from ssl_samix.mixup.samix_objective import SAMixObjective, local_loss, spread
from ssl_samix.training import run as fitting
from ssl_samix.types import Batch, Method, Mixed, MixPlan

Seek = Callable[[Tensor, Tensor], Tensor]
OBJECTIVES: dict[str, Seek] = {
    "both": lambda local, global_: local + ETA * global_,
    "local": lambda local, global_: local,
    "global": lambda local, global_: global_,
    "hard": lambda local, global_: local - ETA * global_,
}
WITHOUT_STEPS = ("random", "flat")
ETA, TEMPERATURE = 0.5, 0.2  # as published; temperature of the local term
LR = 1.0  # learning rate of Adam on the logits
STRENGTH = 2.0  # standard deviation of the random masks' logits


class Oracle(MixObjective):
    """Mixes by masks that are optimised for each pair.

    Args:
        objective: The minimised objective, a name or a function of both terms; or ``random`` or
            ``flat``.
        steps: Steps of Adam.
        **mixing: Arguments of ``MixObjective``.
    """

    learns = True  # every method gets a teacher

    def __init__(self, objective: str | Seek, steps: int, **mixing: Any) -> None:
        super().__init__(Mixup(), stage=3, **mixing)
        self.objective, self.steps = objective, steps
        spec = mixing["backbone"].map_spec(3)
        self.stride = spec.stride
        self.description = {"stage": 3, "settings": {"channels": spec.channels}}

    def mixtures(
        self, method: Method, batch: Batch, plan: MixPlan, first: int, second: int
    ) -> Mixed:
        """Return mixtures by optimised masks."""
        images, partners = self.sources(method, batch, first, second)
        targets = self.targets_of_parents(method, batch, method.targets(batch.views[second]), first)
        masks = self.masks(method, images, partners, plan, targets)
        return blend(images, partners, plan, masks, plan.lam)

    def masks(
        self,
        method: Method,
        images: Tensor,
        partners: Tensor,
        plan: MixPlan,
        targets: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the optimised masks (K, 1, S, S)."""
        size = images.shape[-1]
        if self.objective == "flat":
            return flat(plan.lam, size)
        side = size // self.stride
        logits = torch.randn(len(plan.lam), 1, side, side, device=images.device)
        if self.objective == "random":
            return balanced(upsampled(STRENGTH * logits, size), plan.lam)
        seek = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        logits = (0.01 * logits).requires_grad_()
        adam = torch.optim.Adam([logits], lr=LR, betas=(0.8, 0.95))
        for _ in range(self.steps):
            with torch.enable_grad():
                masks = balanced(upsampled(logits, size), plan.lam)
                mixed = blend(images, partners, plan, masks, plan.lam)
                loss = seek(*terms(method, mixed.images, plan, targets)).sum()
                (logits.grad,) = torch.autograd.grad(loss, logits)
            adam.step()
        return balanced(upsampled(logits.detach(), size), plan.lam)


def upsampled(logits: Tensor, size: int) -> Tensor:
    """Return logits (K, 1, h, w), up-sampled to pixels (K, 1, S, S)."""
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def terms(
    method: Method, mixed: Tensor, plan: MixPlan, targets: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the local and the global term of mixtures (K, 3, S, S), (K,) each."""
    query = method.frozen_query(mixed)
    like = partial(method.likeness, temperature=TEMPERATURE)
    local = local_loss(parent_losses(like, query, targets, plan.parents), plan.lam)
    return local, weighted(parent_losses(method.contrast, query, targets, plan.parents), plan.lam)


def trained(path: str) -> tuple[BaseMethod, DataModule]:
    """Return method and data of a run, with an untrained Mixer if it has none.

    Raises:
        UserError: If there is no run, or no checkpoint in it.
    """
    folder = RunFolder(path)
    config, _ = folder.load_config()
    if not folder.last.exists():
        raise CheckpointError(f"{folder.path} holds no last.ckpt")
    if not config.mixup or "SAMixObjective" not in config.mixup._target_:
        config.mixup = compose("pretrain", ["mixup=samix"])[0].mixup
    pl.seed_everything(config.seed, verbose=False)
    data: DataModule = build(config.data, views=build(config.views), seed=config.seed)
    backbone = build(config.backbone, image_size=data.splits.image_size)
    method: BaseMethod = build(
        config.method,
        backbone=backbone,
        optimizer=fitting.build_optimizer(config),
        mixing=fitting.build_mixing(config, backbone, data),
    )
    weights = read_checkpoint(folder.last)["state_dict"]
    method.load_state_dict(weights, strict=False)
    if not any(name.startswith("twin.") for name in weights):
        method.teacher.load_state_dict(method.embedder.state_dict())
    return method, data


def score(args: Any) -> None:
    """Print the table of the given runs."""
    print_header("The Mixer's own loss, and the minimum over masks", args)
    measured = ("local", "global", "own loss", "mask_std", "encoder's loss", "gradient")
    columns = ("run", "masks", *measured, "share of the gain")

    def rows() -> Any:
        for path in args.runs:
            method, data = trained(path)
            found = scored(method, data, args)
            best, plain = found["oracle"][2], found["flat"][2]
            for name, values in found.items():
                share = (plain - values[2]) / max(plain - best, 1e-9)
                yield [Path(path).name, name, *(f"{v:.3f}" for v in values), f"{share:.2f}"]

    print_table(columns, rows())


def scored(method: BaseMethod, data: DataModule, args: Any) -> dict[str, list[float]]:
    """Return measurements of flat masks, the Mixer's and the oracle's, on the same pairs."""
    mixing: SAMixObjective = method.mixing  # type: ignore[assignment]
    spec = {"backbone": method.backbone, "pairs": mixing.pairs, "targets": mixing.targets}

    def own_loss(local: Tensor, global_: Tensor) -> Tensor:
        share_local, share_global = mixing.term_weights(method)
        return share_local * local + share_global * global_

    oracle = Oracle(own_loss, args.steps, **spec)
    method.to(args.device).eval()
    found: dict[str, list[list[float]]] = {"flat": [], "Mixer": [], "oracle": []}
    train = data.splits.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    for index in order.split(data.batch_size)[: args.batches]:
        torch.manual_seed(int(index[0]))
        views = data.views(train.load(index).to(args.device))
        batch = Batch(views=views, label=train.labels[index], index=index)
        with method.memory.step(), torch.no_grad():
            images, partners = mixing.sources(method, batch, 0, 1)
            targets = mixing.targets_of_parents(method, batch, method.targets(batch.views[1]))
            plan = mixing.draw(images)
            maps = mixing.maps(method, images, partners)
            assert maps is not None
            masks = {
                "flat": flat(plan.lam, images.shape[-1]),
                "Mixer": mixing.policy.masks(plan, maps, images.shape[-1]),
                "oracle": oracle.masks(method, images, partners, plan, targets),
            }
            for name, mask in masks.items():
                mixed = blend(images, partners, plan, mask, plan.lam)
                local, global_ = terms(method, mixed.images, plan, targets)
                lesson = taught(method, mixed.images, plan, targets)
                values = (local, global_, own_loss(local, global_), spread(mask), *lesson)
                found[name].append([float(value.mean()) for value in values])
    return {name: [fmean(column) for column in zip(*v, strict=True)] for name, v in found.items()}


def taught(
    method: BaseMethod, mixed: Tensor, plan: MixPlan, targets: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the encoder's loss on mixtures (K, 3, S, S), and its gradient's norm."""
    with torch.enable_grad():
        losses = parent_losses(method.pair_loss, method.mixed_query(mixed), targets, plan.parents)
        loss = weighted(losses, plan.lam).mean()
        gradients = torch.autograd.grad(loss, list(method.backbone.parameters()))
    return loss.detach(), torch.stack([g.norm() for g in gradients]).norm()


def train(args: Any) -> None:
    """Pretrain with the oracle, measure, and write a row for each seed."""
    print_header("Encoders that learn from masks optimised pair by pair", args)
    path = Path(args.csv) if args.csv else Path(args.out) / "mixer_oracle.csv"
    table = Table(path, ("objective", "steps", "seed"))
    for seed in args.seeds.split(","):
        table.train(
            (args.objective, str(args.steps), seed),
            lambda backbone: Oracle(args.objective, args.steps, backbone=backbone),
            args.words,
            Path(args.out) / f"{args.objective}-{args.steps}-s{seed}",
        )
    print_table(table.columns[:-1], table.shown())


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Score Mixers, or train encoders with the oracle."""
    sizes = {"steps": 8, "batches": 4}
    about = {"steps": "of Adam for each mask", "batches": "that score is measured on"}
    parser = Options(__doc__, cpu=sizes, cuda=sizes, about=about)
    parser.add_argument("--objective", default="both", help="objective of the masks")
    parser.add_argument("--seeds", default="0", help="comma-separated (train)")
    parser.add_argument("--out", default="runs/oracle", help="folder of the runs (train)")
    parser.add_argument("--csv", help="table of the rows (train)")
    parser.add_argument("command", choices=("score", "train"))
    parser.add_argument("words", nargs="+", help="runs (score), or keys of samix pretrain (train)")
    args = parser.read(arguments)
    check_choice("--objective", args.objective, (*OBJECTIVES, *WITHOUT_STEPS))
    args.runs = args.words
    {"score": score, "train": train}[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])
