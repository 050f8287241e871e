"""``samix recipes``: list the published recipes. Imports no torch."""

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
    """A recipe, read from its file under ``configs/experiment``.

    Attributes:
        name: Value of ``experiment=``.
        command: ``pretrain`` or ``supervised``.
        title: Method, network and data.
        epochs: Length, such as ``100 epochs``.
        published: Published result.
    """

    name: str
    command: str
    title: str
    epochs: str
    published: str

    @property
    def start(self) -> str:
        """The command that starts it."""
        return f"samix {self.command} experiment={self.name}"


def recipes() -> list[Recipe]:
    """Return all recipes, each read from the second line of its file."""
    return [_read(name) for name in groups()["experiment"]]


def _read(name: str) -> Recipe:
    lines = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    command, title, epochs, published = lines[1].removeprefix("# samix ").split(" | ")
    return Recipe(name, command, title, epochs, published)


def main(words: list[str]) -> str:
    """Return the table of recipes whose lines contain all search words, as text.

    Args:
        words: Search words; an empty list lists all recipes.

    Raises:
        ConfigError: If no recipe contains them.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    rows = [[r.start, r.title, r.epochs, r.published] for r in recipes()]
    found = [row for row in rows if all(w.lower() in " ".join(row).lower() for w in words)]
    if not found:
        raise ConfigError(f"no recipe holds {' and '.join(words)}: samix recipes lists all")
    header = [["start with"], ["what"], ["length"], ["published"]]
    return text(Table(header, found, names=4))
