"""Who may import whom (docs/design.md), read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ssl_samix"
EVERYWHERE = {"types", "errors", "files"}
# room -> rooms and modules of this package that it may import beside itself
ALLOWED = {
    "losses": set(),
    "modules": set(),
    "backbones": set(),
    "data": set(),
    "optim": set(),
    "mixup": {"losses", "optim"},
    "methods": {"losses", "modules", "optim", "mixup", "backbones"},
    "evaluation": {
        "data",
        "backbones",
        "modules",
        "checkpoint_io",
        "choices",
        "config",
        "run_folder",
        "saved_config",
        "description",
        "engine",
        "environment",
        "key_types",
    },
    "export": {"evaluation", "backbones", "checkpoint_io", "choices", "config", "run_folder"},
    "study": {
        "evaluation",
        "data",
        "methods",
        "callbacks",
        "choices",
        "config",
        "run_folder",
        "engine",
        "fitting",
        "text_tables",
    },
    "callbacks": {"evaluation", "data", "modules", "run_folder", "painting"},
}
TOP = {
    "pretraining",
    "show_mixing",
    "subcommands",
    "cli",
}  # nobody imports them, but the front doors


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
    return sorted((PACKAGE / room).glob("*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_opens_only_its_doors(room):
    assert files(room), room
    for path in files(room):
        assert imports(path) <= ALLOWED[room] | EVERYWHERE | {room}, path.name


def test_every_room_is_listed():
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(ALLOWED)


def test_nobody_imports_the_top():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py", "cli.py", "subcommands.py"):
            assert not imports(path) & TOP, path


def test_nothing_outside_the_package_is_imported_by_it():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "import tests" not in text
        assert "from tests" not in text
        assert "from benchmarks" not in text


def test_one_lightning():
    for path in PACKAGE.rglob("*.py"):
        assert "lightning.pytorch" not in path.read_text().replace('"lightning.pytorch"', "")
