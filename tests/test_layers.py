"""Who may import whom (docs/design.md), read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ssl_samix"
EVERYWHERE = {"types", "errors", "files", "processes"}
# room or single module -> rooms and modules of this package that it may import beside itself
ALLOWED = {
    "losses": set(),
    "optim": set(),
    "pictures": set(),
    "trainer": {"models"},
    "config": set(),
    "models": {"config"},
    "data": set(),
    "mixup": {"losses", "optim"},
    "methods": {"losses", "optim", "mixup", "models"},
    "artifacts": {"config", "data", "mixup", "models"},
    "evaluation": {"artifacts", "config", "data", "models", "pictures", "trainer"},
    "training": {
        "artifacts",
        "config",
        "data",
        "evaluation",
        "methods",
        "mixup",
        "models",
        "optim",
        "pictures",
        "trainer",
    },
    "reporting": {
        "artifacts",
        "config",
        "data",
        "evaluation",
        "methods",
        "trainer",
        "training",
    },
    "cli": {
        "artifacts",
        "config",
        "data",
        "evaluation",
        "mixup",
        "pictures",
        "reporting",
        "training",
    },
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("ssl_samix.")}
    return found


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_opens_only_its_doors(room):
    assert files(room), room
    for path in files(room):
        assert imports(path) <= ALLOWED[room] | EVERYWHERE | {room}, path.name


def test_every_room_and_module_is_listed():
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    modules = {p.stem for p in PACKAGE.glob("[!_]*.py")}
    assert rooms | modules == set(ALLOWED) | EVERYWHERE


def test_rooms_stand_on_floors():
    """No room imports one that imports it, over however many others."""
    below = {room: set(doors) for room, doors in ALLOWED.items()}
    while ground := {room for room, doors in below.items() if not doors}:
        below = {room: doors - ground for room, doors in below.items() if room not in ground}
    assert not below


def test_nothing_outside_the_package_is_imported_by_it():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "import tests" not in text
        assert "from tests" not in text
        assert "from benchmarks" not in text


def test_one_lightning():
    for path in PACKAGE.rglob("*.py"):
        assert "lightning.pytorch" not in path.read_text().replace('"lightning.pytorch"', "")
