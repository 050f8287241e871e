"""What a study consists of: its runs, their words and folders. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

LENGTHS = {"epochs": "e", "cpu_seconds": "t"}  # key -> how a run's name says it
# What a run may have otherwise on another machine, and is the same run all the same.
ELSEWHERE = ("data.root=", "data.workers=", "data.memory_gb=", "data.download=", "callbacks.")


@dataclass(frozen=True)
class Length:
    """How long runs are.

    Attributes:
        kind: ``epochs`` or ``cpu_seconds``.
        amount: How many; seconds are processor time of training, start and monitor left out.
    """

    kind: str
    amount: int

    def __str__(self) -> str:
        return f"{LENGTHS[self.kind]}{self.amount}"


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        method: Its name in the study file.
        policy: Likewise.
        length: How long it is.
        seed: Of weights, order and views.
        words: ``key=value`` words, without seed, folder and number of epochs.
    """

    method: str
    policy: str
    length: Length
    seed: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.method}-{self.policy}-{self.length}-s{self.seed}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What its row of the table is found by."""
        return self.method, self.policy, str(self.length), str(self.seed)

    @property
    def settings(self) -> str:
        """The words that make it what it is, wherever it runs."""
        return settings_of(self.words)


def settings_of(words: Sequence[str]) -> str:
    """Write words, but for those that may differ between machines, in one order."""
    return " ".join(sorted(word for word in words if not word.startswith(ELSEWHERE)))


def differing_words(ours: str, theirs: str) -> str:
    """Return the words that only one of two settings has."""
    return " ".join(sorted({*ours.split()} ^ {*theirs.split()}))


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        path: The file.
        command: ``pretrain`` or ``supervised``.
        base: Words of all runs.
        methods: Words by name.
        policies: Words by name.
        seeds: By policy.
        lengths: The shortest first.
        evaluate: Protocols that measure every run.
        workers: Runs at the same time.
        reference: The policy that others are compared with.
        out: Folder of the runs.
        csv: The table.
    """

    path: Path
    command: str
    base: tuple[str, ...]
    methods: dict[str, tuple[str, ...]]
    policies: dict[str, tuple[str, ...]]
    seeds: dict[str, tuple[int, ...]]
    lengths: tuple[Length, ...]
    evaluate: tuple[str, ...]
    workers: int
    reference: str
    out: Path
    csv: Path

    def words(self, method: str, policy: str) -> tuple[str, ...]:
        """Return the words of a cell of the table; of those for one key the last wins."""
        last: dict[str, str] = {}
        for word in (*self.base, *self.methods[method], *self.policies[policy]):
            key = word.partition("=")[0].lstrip("+")
            last.pop(key, None)  # its place, too, is that of the last
            last[key] = word
        return tuple(last.values())

    def runs(self) -> list[Run]:
        """Return all runs: the shortest first, and the first seed of all before the second."""
        every = sorted({seed for seeds in self.seeds.values() for seed in seeds})
        return [
            Run(method, policy, length, seed, self.words(method, policy))
            for length, seed, method, policy in product(
                self.lengths, every, self.methods, self.policies
            )
            if seed in self.seeds[policy]
        ]

    def folder(self, run: Run) -> Path:
        """Return a run's folder."""
        return self.out / run.name

    @property
    def logs(self) -> Path:
        """Folder of what the runs say, and of what the study notes of them."""
        return self.out / "logs"

    def training(self, run: Run, epochs: int) -> list[str]:
        """Return the words after ``samix`` that train a run, from its last checkpoint on."""
        given = [f"trainer.max_epochs={epochs}", f"seed={run.seed}", f"out={self.folder(run)}"]
        return [self.command, *run.words, *given]

    def measuring(self, run: Run, protocol: str) -> list[str]:
        """Return the words after ``samix`` that measure a run."""
        out = self.results(run, protocol).parent
        return [protocol, f"run={self.folder(run)}", f"out={out}"]

    def results(self, run: Run, protocol: str) -> Path:
        """Return the file that is there when a run has been measured."""
        return self.folder(run) / "results" / f"study-{protocol}" / "results.json"
