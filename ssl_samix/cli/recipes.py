"""``samix recipes``: the published recipes that can be started. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_samix.config.compose import CONFIG_DIR, groups
from ssl_samix.errors import ConfigError
from ssl_samix.reporting.tables import Table, text

HELP = """samix recipes: published recipes, started by experiment=<name>.

Usage: samix recipes [word]...

Only recipes whose line holds every word are listed: samix recipes imagenet supervised. What a
recipe is from, and what of it is not as published, stands in its file under configs/experiment/ and
in docs/recipes.md. Words after it change it: mixup=none, trainer.max_epochs=300, trainer.devices=8.
"""


@dataclass(frozen=True)
class Recipe:
    """A file under ``configs/experiment``.

    Attributes:
        name: What ``experiment=`` takes.
        command: ``pretrain`` or ``supervised``.
        title: What is trained on what.
        epochs: As ``100 epochs``.
        published: What it reached where it was published.
    """

    name: str
    command: str
    title: str
    epochs: str
    published: str

    @property
    def start(self) -> str:
        """The words that start it."""
        return f"samix {self.command} experiment={self.name}"


def recipes() -> list[Recipe]:
    """Read the second line of every recipe."""
    return [_read(name) for name in groups()["experiment"]]


def _read(name: str) -> Recipe:
    lines = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    command, title, epochs, published = lines[1].removeprefix("# samix ").split(" | ")
    return Recipe(name, command, title, epochs, published)


def main(words: list[str]) -> str:
    """List recipes.

    Args:
        words: What their lines must hold; none lists all.

    Raises:
        ConfigError: If no recipe holds them.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    rows = [[r.start, r.title, r.epochs, r.published] for r in recipes()]
    found = [row for row in rows if all(w.lower() in " ".join(row).lower() for w in words)]
    if not found:
        raise ConfigError(f"no recipe holds {' and '.join(words)}: samix recipes lists all")
    header = [["start with"], ["what"], ["length"], ["published"]]
    return text(Table(header, found, names=4))
