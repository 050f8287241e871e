"""The processes of a run: who started them, which one this is, and its cores. Imports no torch."""

from __future__ import annotations

import os
from typing import Any

from ssl_samix.errors import ConfigError

# Names of SLURM jobs in whose shells Lightning starts the processes itself, as on any machine.
_INTERACTIVE = ("bash", "interactive")
_MACHINE = ("NODE_RANK", "GROUP_RANK")  # by which Lightning numbers machines; the first one set
MOST_WORKERS = 16  # more hardly ever help one process


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None


def started_by() -> str | None:
    """Return what started the processes of this run: torchrun, SLURM, or None for Lightning.

    A single task of SLURM is a process like any other, and so is a shell or a script in a job,
    although it may have SLURM's variables: Lightning starts further processes there.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    shell = os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE or _number("SLURM_PROCID") is None
    return None if shell or (_number("SLURM_NTASKS") or 1) == 1 else "SLURM"


def is_main_process() -> bool:
    """Return whether this process writes the shared files (global rank 0)."""
    starter = started_by()
    if starter is not None:
        return not _number("RANK" if starter == "torchrun" else "SLURM_PROCID")
    machine = next((name for name in _MACHINE if name in os.environ), _MACHINE[0])
    return not _number("LOCAL_RANK") and not _number(machine)


def started_world() -> tuple[int, int] | None:
    """Return how many processes torchrun or SLURM started, and how many of them here.

    Returns:
        None if Lightning starts the processes.

    Raises:
        ConfigError: If SLURM does not tell how many tasks a machine has.
    """
    starter = started_by()
    if starter == "torchrun":
        world = _number("WORLD_SIZE") or 1
        return world, _number("LOCAL_WORLD_SIZE") or world
    if starter is None:
        return None
    tasks, here = _number("SLURM_NTASKS") or 1, _number("SLURM_NTASKS_PER_NODE")
    if here is None:
        raise ConfigError(
            f"SLURM started {tasks} tasks, and does not tell how many a machine has: start them "
            "with --ntasks-per-node, one task for each device"
        )
    return tasks, here


def fit_to_launcher(devices: Any, num_nodes: int) -> dict[str, Any]:
    """Return ``devices`` and ``num_nodes`` for the processes that torchrun or SLURM started.

    Args:
        devices: ``trainer.devices``: a number, a list of devices, or all of them (``auto``, -1).
        num_nodes: ``trainer.num_nodes``; 1 is replaced by the number that was started.

    Raises:
        ConfigError: If other numbers were started: each process would train by itself.
    """
    world = started_world()
    if world is None:
        return {"devices": devices, "num_nodes": num_nodes}
    total, here = world
    machines = max(1, total // here) if num_nodes == 1 else num_nodes
    wanted = _count(devices)
    if (wanted or here) != here or here * machines != total:
        raise ConfigError(
            f"{started_by()} started {total} processes, {here} of them here, which does not fit "
            f"trainer.devices={devices} and trainer.num_nodes={num_nodes}: leave both out, or "
            "start one process for each device"
        )
    return {"devices": here if wanted is None else devices, "num_nodes": machines}


def _count(devices: Any) -> int | None:
    """Return how many devices are meant, by Lightning's rules; None for all."""
    if str(devices) in ("auto", "-1"):
        return None
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return len(devices) if isinstance(devices, (list, tuple)) else int(devices)


def cores(ranks: int = 1) -> int:
    """Return the number of CPU cores that each of the ``ranks`` processes of this machine has.

    It is at least 1. Cores that this process may not use do not count.
    """
    task = _number("SLURM_CPUS_PER_TASK")
    if task and started_by() == "SLURM":
        return task  # SLURM has divided them already
    affinity = getattr(os, "sched_getaffinity", None)  # exists on Linux only
    mine = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, mine // ranks)


def worker_count(ranks: int = 1) -> int:
    """Return the number of data workers for each of the ``ranks`` processes of this machine."""
    return min(MOST_WORKERS, cores(ranks))
