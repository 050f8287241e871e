"""Print one table of all targets of this package and the measured values.

    python benchmarks/targets.py results/            # collects printed results of benchmarks
    python benchmarks/targets.py results/ --run      # runs the benchmarks first

The folder holds the output of benchmarks, one file (`*.md`) each, as written by `gpu.py`; if
several files measure the same, the newest one counts. On two CPU cores `--run` takes about a
quarter of an hour: the steps are those of the full network.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common import Options, print_table, progress
from goals import COLUMNS, GOALS

HERE = Path(__file__).resolve().parent
STEPS = "--policies none --width 64 --batch 128 --period 1 --rounds 1"
# file -> benchmark and options, per device; on a GPU the defaults are those of the targets
RUNS = {
    "cpu": {
        "step": f"step_time.py {STEPS}",
        "mixing": "step_time.py --no-lightly --policies none,samix",
        "epoch": "epoch_time.py",
        "eval": "eval_time.py",
    },
    "cuda": {
        "step": "step_time.py --policies none,samix",
        "epoch": "epoch_time.py",
        "eval": "eval_time.py",
    },
}


def collected(folder: Path) -> dict[str, list[str]]:
    """Return the rows of targets in all files of a folder, the newest last."""
    rows = {}
    for file in sorted(folder.glob("*.md"), key=lambda path: path.stat().st_mtime):
        for line in file.read_text().splitlines():
            cells = line[2:-2].split(" | ")
            if line.startswith("| ") and len(cells) == len(COLUMNS):
                rows[cells[0]] = [*cells, file.name]
    return rows


def run(folder: Path, device: str) -> None:
    """Run the benchmarks that have targets; continue if one fails."""
    for name, words in RUNS[device].items():
        script, *options = words.split()
        command = [sys.executable, str(HERE / script), "--device", device, *options]
        progress(f"{name}: {' '.join(command[1:])}")
        with (folder / f"{name}.md").open("w") as out:
            if subprocess.run(command, stdout=out, check=False).returncode:
                progress(f"{name} failed")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    parser.add_argument("folder", type=Path, help="folder of the benchmarks' output")
    parser.add_argument("--run", action="store_true", help="measure first")
    args = parser.parse_args(arguments)
    if args.run:
        parser.read(arguments)
        args.folder.mkdir(parents=True, exist_ok=True)
        run(args.folder, args.device)
    elif not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    rows = collected(args.folder)
    every = [rows.get(goal.what, [*goal.row(), ""]) for goal in GOALS.values()]
    print_table((*COLUMNS, "file"), every)


if __name__ == "__main__":
    main()
