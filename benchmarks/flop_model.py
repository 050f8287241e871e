"""Number of passes of a step, in F: one forward pass over one view of the batch.

Forward and backward take 3F; through frozen weights, with gradient to the images, 2F; forward
alone 1F; the first three of a ResNet's four stages, for the Mixer's maps, 0.7F. The Mixer itself
(`mixer.py`), losses and optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

LEARNING, FROZEN, MAPS = 3.0, 2.0, 0.7
# MoCo: a query and a key; SimCLR: two queries; BYOL: two queries and two targets
PLAIN = {"moco": 4.0, "simclr": 6.0, "byol": 8.0}


@dataclass(frozen=True)
class Policy:
    """A mixing setting, and the passes that it adds to the plain method.

    Attributes:
        words: Arguments of the command line.
        beside: Whether mixtures are used beside the plain views, or in their place.
        every: The Mixer is trained in every n-th step; 0: there is no Mixer.
        maps: Additional passes for the Mixer's maps, per method.
        targets: Forward passes for targets that the plain method does not make, per method.
    """

    words: tuple[str, ...]
    beside: bool = True
    every: int = 0
    maps: tuple[int, int, int] = (0, 0, 0)
    targets: tuple[int, int, int] = (0, 0, 0)

    def passes(self, method: str, size: float = 1.0) -> float:
        """Return the mean passes of a step, in F; mixtures have ``size`` times the views' side."""
        total = PLAIN[method]
        if "mixup=none" in self.words:
            return total
        if self.beside:
            total += LEARNING * size**2
        if self.every:
            total += FROZEN * size**2 / self.every
        place = list(PLAIN).index(method)
        return total + MAPS * self.maps[place] + self.targets[place]


POLICIES = {
    "none": Policy(("mixup=none",)),
    "mixup": Policy(("mixup=mixup",)),
    "mixup-replace": Policy(("mixup=mixup", "mixup.placement=replace"), beside=False),
    "cutmix": Policy(("mixup=cutmix",)),
    "samix": Policy(("mixup=samix",), every=4),
    "samix-online": Policy(("mixup=samix", "mixup.update_every=1"), every=1),
    "samix-paper": Policy(("mixup=samix_paper",), every=1, maps=(0, 2, 0), targets=(1, 0, 0)),
    "samix-replace": Policy(
        ("mixup=samix", "mixup.placement=replace"), beside=False, every=4, maps=(1, 1, 1)
    ),
}


def ratio(method: str, policy: str) -> float:
    """Return a step's passes divided by those of the plain method."""
    return POLICIES[policy].passes(method) / PLAIN[method]
