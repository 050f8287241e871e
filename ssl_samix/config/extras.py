"""Optional packages that a configuration needs. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec

from omegaconf import DictConfig

from ssl_samix.errors import ConfigError

# logger -> the packages that its extra installs
LOGGERS = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}


def check_extras(config: DictConfig) -> None:
    """Check that the packages of the chosen loggers, and of a wanted report, are installed.

    Raises:
        ConfigError: With the command that installs them.
    """
    for name in config.get("logger") or {}:
        missing = [package for package in LOGGERS.get(name, ()) if not _installed(package)]
        if missing:
            raise ConfigError(f"logger={name} needs {missing[0]}: pip install 'ssl_samix[{name}]'")
    if config.get("report"):
        check_report("report=true")


def _installed(package: str) -> bool:
    """Return whether a package is installed; a folder of its name, such as W&B's, is not one."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_report(wanted_by: str) -> None:
    """Check that the packages of a report are installed.

    Args:
        wanted_by: The command or key that needs them.

    Raises:
        ConfigError: With the command that installs them.
    """
    missing = [package for package in ("bokeh", "jinja2") if not _installed(package)]
    if missing:
        raise ConfigError(f"{wanted_by} needs {missing[0]}: pip install 'ssl_samix[report]'")
