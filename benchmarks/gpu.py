"""Run all GPU measurements within a few minutes of GPU time.

    python benchmarks/gpu.py results/ [--budget 570] [--parts step,epoch]

Runs the tests that need a GPU, every benchmark, and the throughput of ResNet-18 at 32 px and of
ResNet-50 at 224 px. Each part has its own time limit and its own files in the folder (`<part>.md`:
its output; `<part>.log`: progress and errors), so that a failure does not affect the others; parts
that do not fit into the budget are listed as left out. `summary.md` lists how each part ended, and
`targets.md` which targets are met. Exit status 1: a part failed, or was left out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import targets
from common import METHODS, Options, print_table, progress

HERE = Path(__file__).resolve().parent
GRACE = 10  # seconds that a part has to terminate
SHORTEST = 10  # seconds; with less time left, no part is started


@dataclass(frozen=True)
class Part:
    """A command and its limit.

    Attributes:
        words: The command, without the interpreter.
        limit: Time limit in seconds.
    """

    words: tuple[str, ...]
    limit: int


def benchmark(line: str, limit: int) -> Part:
    script, *options = line.split()
    return Part((str(HERE / script), *options), limit)


def throughput(backbone: str, size: int, batch: int, rounds: int) -> str:
    """Return the command that measures images per second, with and without SAMix."""
    sizes = f"--backbone {backbone} --size {size} --batch {batch} --rounds {rounds}"
    return f"step_time.py --no-lightly --no-goals --policies none,samix {sizes}"


def parts(device: str) -> dict[str, Part]:
    """Return the parts, the most important first."""
    tests = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(HERE.parent / "tests"))
    small, large = throughput("resnet18", 32, 512, 5), throughput("resnet50", 224, 128, 3)
    found = {
        "step": benchmark("step_time.py", 150),
        "epoch": benchmark("epoch_time.py", 240),
        "tests": Part(tests, 150),
        "resnet18": benchmark(small, 120),
        "compiled": benchmark(f"{small} --compile default", 240),
        "graphs": benchmark(f"{small} --compile reduce-overhead", 240),
        **{f"resnet50_{m}": benchmark(f"{large} --methods {m}", 90) for m in METHODS},
        "mixer": benchmark("mixer.py", 120),
        "views": benchmark("views.py", 120),
        "eval": benchmark("eval_time.py", 120),
    }
    on = ("--device", device)
    return {
        name: part if name == "tests" else Part((*part.words, *on), part.limit)
        for name, part in found.items()
    }


def run(name: str, part: Part, folder: Path, limit: float) -> tuple[str, float]:
    """Run a part; return how it ended, and its seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths()), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with (folder / f"{name}.md").open("w") as out, (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *part.words],
            stdout=out,
            stderr=log,
            cwd=HERE.parent,
            env=environment,
            start_new_session=True,  # so that its child processes can be ended with it
        )
        try:
            code = process.wait(timeout=limit)
            ended = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            _end(process)
    return ended, time.monotonic() - start


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and its remaining child processes."""
    for wish in (signal.SIGINT, signal.SIGKILL):  # at the first, it prints its results
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _paths() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [str(HERE.parent), *([given] if given else [])]


def summary(ended: dict[str, tuple[str, float]], folder: Path) -> None:
    """Write the summary of the parts, and the targets."""
    rows = [[name, how, f"{spent:.0f}"] for name, (how, spent) in ended.items()]
    with (folder / "summary.md").open("w") as out, contextlib.redirect_stdout(out):
        print_table(("part", "end", "seconds"), rows)
    with (folder / "targets.md").open("w") as out, contextlib.redirect_stdout(out):
        targets.main([str(folder)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Options(
        __doc__,
        cpu={"budget": 570},
        cuda={"budget": 570},
        about={"budget": "seconds for everything"},
    )
    parser.set_defaults(device="cuda")
    parser.add_argument("folder", type=Path, help="is filled")
    known = parts("cuda")
    parser.add_argument("--parts", default=",".join(known), help="comma-separated")
    parser.add_argument("--limit", type=int, help="seconds for a part, in place of its own")
    args = parser.read(arguments)
    chosen = parser.names("parts", args.parts, known)
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    ended: dict[str, tuple[str, float]] = {}
    for name in chosen:
        part = parts(args.device)[name]
        left = end - time.monotonic()
        progress(f"{name}: {' '.join(part.words)}")
        if left < SHORTEST:
            ended[name] = ("left out: the budget is spent", 0.0)
        else:
            ended[name] = run(name, part, args.folder, min(left, args.limit or part.limit))
        progress(f"{name}: {ended[name][0]}, {ended[name][1]:.0f} s")
        summary(ended, args.folder)  # after every part, so that nothing is lost
    print((args.folder / "summary.md").read_text())
    print((args.folder / "targets.md").read_text(), end="")
    return 0 if all(how == "done" for how, _ in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
