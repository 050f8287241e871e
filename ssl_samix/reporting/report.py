"""``samix report``: runs as one HTML file that opens without a network.

Everything that comes from a run or a file name is escaped: by Jinja2's autoescape in the page, by
Bokeh in the plots, whose data the page holds as JSON. A content security policy is the second wall:
only the page's own scripts run, and nothing is fetched.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_samix.artifacts.results import NUMBERS, read_rows
from ssl_samix.artifacts.run_folder import RunFolder, command_of, own_choices, read_metrics
from ssl_samix.config.compose import (
    CONFIG_DIR,
    compose,
    dotted,
    in_hydras_grammar,
    is_hydras,
    plain,
    quote_paths,
    quoted,
)
from ssl_samix.config.extras import check_report
from ssl_samix.errors import ConfigError, UserError, check_range, nearest
from ssl_samix.evaluation.embed import EmbedRequest
from ssl_samix.evaluation.outliers import parse_outliers
from ssl_samix.files import expanded, write_atomically
from ssl_samix.processes import is_main_process
from ssl_samix.reporting.runs import ACCURACIES, read_run

if TYPE_CHECKING:
    from PIL import Image

    from ssl_samix.evaluation.embed import Written

MOST_RUNS = 8  # in one report; samix compare takes any number
MOST_POINTS = 5000  # on all maps together: 12 MB of thumbnails
POINT, TILE = 48, 96  # px, side of a thumbnail on the map and in the lists
NEIGHBOURS, ASKED, ISOLATED, ALIKE = 9, 8, 22, 15  # columns, rows, images and pairs shown
LARGEST_PICTURE = 2**20  # bytes of a picture that is taken as it is; larger ones become JPEG
WIDEST_PICTURE = (1400, 2400)  # px, of those
MOST_MB = 30  # of the file
MARK = b'<meta name="generator" content="ssl_samix report">'
HEAD = 512  # bytes of a file in which the mark is
# Of a run's environment.json -> what it is called.
MACHINE = {"time": "started", "git_revision": "git revision", "python": "Python",
           "system": "system", "devices": "GPUs", "threads": "threads",
           "precision": "precision"}  # fmt: skip

HELP = """samix report: runs as one HTML file that opens without a network.

Usage: samix report run=<run folder> [key=value]...
       samix report <run folder>... [key=value]...

The file shows the runs' settings, results of all protocols and curves; the last picture of mixtures
and that of views; a map of the embeddings (PCA and t-SNE) with a thumbnail for each point; nearest
neighbours; the most isolated and the most alike images; and the command that repeats each run. It
needs pip install 'ssl_samix[report]'. A report at the same place is replaced.

Keys and their current values:

"""


@dataclass(frozen=True)
class ReportRequest:
    """A checked ``samix report`` command.

    Attributes:
        runs: The run folders.
        images: For each run what to embed, or why its images are not shown.
        out: The file to write.
        points: Number of images on each map.
    """

    runs: list[RunFolder]
    images: list[EmbedRequest | str]
    out: Path
    points: int


def main(words: list[str]) -> str:
    """Write the report of a command line, and return its path."""
    if {"-h", "--help"} & set(words):
        keys = (CONFIG_DIR / "report.yaml").read_text("utf-8").partition("_self_")[2]
        return HELP + keys.strip()
    return str(write_report(parse_report(words)))


def parse_report(words: list[str]) -> ReportRequest:
    """Parse and check folders and ``key=value`` arguments.

    Raises:
        UserError: For the first error: an unknown key or value, a folder that is not a run folder,
            a missing package.
    """
    keys, folders = [], []
    known = [key for key, _ in dotted(plain(compose("report", [])[0])).items()]
    for word in words:
        key, equals, _ = word.partition("=")
        if key in known and equals:
            keys.append(word)
        elif word.startswith("-") or (equals and key.isidentifier() and not Path(word).exists()):
            raise ConfigError(nearest(key, known, "key"))
        else:
            folders.append(word)
    config, _ = compose("report", quote_paths(keys))
    check_range("points", config.points, 10, MOST_POINTS)
    folders += [] if config.run is None else [str(config.run)]
    runs = list({run.path.resolve(): run for run in map(RunFolder, folders)}.values())
    if not runs:
        raise ConfigError("report needs runs: samix report run=<run folder>")
    if len(runs) > MOST_RUNS:
        raise ConfigError(
            f"a report shows at most {MOST_RUNS} runs, not {len(runs)}: samix compare takes all"
        )
    check_report("samix report")
    for run in runs:
        run.load_config()
    shared = {key: config[key] for key in ("images", "limit", "seed", "device", "chunk", "workers")}
    images = [_images(run, shared) for run in runs]
    beside = runs[0].path if len(runs) == 1 else Path()
    out = beside / "report.html" if config.out is None else expanded(str(config.out))
    _check_out(out)
    return ReportRequest(runs, images, out, max(10, config.points // len(runs)))


def _images(run: RunFolder, keys: dict[str, Any]) -> EmbedRequest | str:
    """Return what to embed of a run; a sentence if its encoder or its own images are missing."""
    words = [f"run={quoted(str(run.path))}"]
    words += [f"{key}={in_hydras_grammar(value)}" for key, value in keys.items()]
    if not (run.encoder.exists() or run.last.exists()):
        return "the run has no encoder yet"
    try:
        return parse_outliers(words)
    except UserError as error:
        if keys["images"] is not None:
            raise
        return str(error)


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give a file, such as report.html")
    if out.exists():
        with out.open("rb") as file:
            if MARK not in file.read(HEAD):
                raise UserError(f"out={out} is not a report of samix: choose another out")
    elif not out.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.parent}")


def write_report(request: ReportRequest) -> Path:
    """Write the report and return its path.

    Raises:
        UserError: If a run's files are damaged, its images cannot be read, or the file cannot be
            written.
    """
    from ssl_samix.reporting.report_plots import bokeh_script, curves

    names = _names(request.runs)
    metrics = [read_metrics(run.metrics) for run in request.runs]
    drawn = curves(dict(zip(names, metrics, strict=True)))
    plots: dict[str, Any] = {f"curve{i}": plot for i, (_, plot) in enumerate(drawn)}
    runs = []
    for number, (run, images) in enumerate(zip(request.runs, request.images, strict=True)):
        shown = _shown(images, request.points, f"map{number}", plots)
        runs.append({**_told(run, names[number]), **shown})
    page = _template().render(
        runs=runs,
        results=_results(request.runs, names),
        curves=[title for title, _ in drawn],
        plots=plots,
        script=bokeh_script(),
        nonce=secrets.token_hex(16),
    )
    content = page.encode()
    if len(content) > MOST_MB * 1e6:
        raise UserError(
            f"the report would have {len(content) / 1e6:.0f} MB, and {MOST_MB} are the most: "
            "give fewer runs or a smaller points"
        )
    write_atomically(request.out, lambda temporary: temporary.write_bytes(content))
    return request.out


def write_wanted(run: RunFolder) -> None:
    """Write the report of a run that has ended, if its configuration has ``report=true``."""
    if is_main_process() and run.load_config()[0].get("report"):
        print(write_report(parse_report([f"run={run.path}"])), flush=True)


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (files("ssl_samix.reporting") / "report.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # unsorted: Bokeh's references need their order
    return environment.from_string(text)


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """Return a name for each run: its folder's, or its path if two have the same."""
    names = [_text(run.path.resolve().name) for run in runs]
    return names if len({*names}) == len(names) else [_text(str(run.path)) for run in runs]


def _text(text: str) -> str:
    """Return text that UTF-8 can hold: names of files may hold other bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _told(run: RunFolder, name: str) -> dict[str, Any]:
    """Return what the page says of a run, apart from its images' embeddings."""
    config, choices = run.load_config()
    listed = read_run(run.path)
    values = dotted(plain(config))
    accuracies = {ACCURACIES[k]: f"{v:.2f}" for k, v in listed.accuracies.items()}
    return {
        "name": name,
        "path": _text(str(run.path.resolve())),
        "state": listed.state,
        "epochs": f"{listed.done} of {listed.epochs}",
        "accuracies": accuracies,
        "command": command_of(choices),
        "choices": {group: str(choice) for group, choice in choices.items() if choice is not None},
        "automatic": {key: str(value) for key, value in run.automatic().items()},
        "settings": {key: json.dumps(v, ensure_ascii=False) for key, v in values.items()
                     if not any(map(is_hydras, key.split(".")))},
        "repeat": repeating(run),
        "machine": _machine(run.environment),
        "pictures": [
            (title, picture)
            for title, folder in (("Mixtures", run.pictures), ("Views", run.views))
            if (picture := _picture(folder)) is not None
        ],
    }  # fmt: skip


def repeating(run: RunFolder) -> str:
    """Return the command that trains this run again: the choices and keys that are not default."""
    config, choices = run.load_config()
    command = command_of(choices)
    own = own_choices(command, choices)
    words: list[str] = []
    # The method first, since views follow it.
    for group, name in sorted(choices.items(), key=lambda choice: choice[0] != "method"):
        if group in own or group == "experiment":  # a recipe's values are in the configuration
            continue
        if name is not None and compose(command, words)[1].get(group) != name:
            words.append(f"{group}={name}")
    defaults = dotted(plain(compose(command, words)[0]))
    now = dotted(plain(config)) | dict.fromkeys(run.automatic(), "auto")
    keys = [
        f"{key}={in_hydras_grammar(value) if not isinstance(value, str) else value}"
        for key, value in now.items()
        if key not in ("out", "resume", "report") and defaults.get(key, value is None) != value
        if not any(map(is_hydras, key.split(".")))
    ]
    words += [f"{group}={name}" for group, name in own.items()]
    return shlex.join(["samix", command, *map(_text, [*words, *keys])])


def _machine(file: Path) -> dict[str, str]:
    """Return where a run was started last, from its environment.json, which may be damaged."""
    try:
        said = json.loads(file.read_text("utf-8"))[-1]
        packages = ", ".join(f"{k} {v}" for k, v in said["packages"].items())
        shown = {title: said.get(key) for key, title in MACHINE.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    shown = {title: v if isinstance(v, str) else json.dumps(v) for title, v in shown.items() if v}
    return {**shown, "packages": packages}


def _picture(folder: Path) -> str | None:
    """Return the last picture of a folder as an address of its data; None if there is none."""
    from ssl_samix.data.sources import UNREADABLE, open_image

    found = sorted(folder.glob("*.png"), key=lambda path: (len(path.name), path.name))
    if not found:
        return None
    try:
        with open_image(str(found[-1])) as image:
            if found[-1].stat().st_size <= LARGEST_PICTURE and image.format == "PNG":
                return _address(found[-1].read_bytes(), "png")
            return thumbnail(image, WIDEST_PICTURE)
    except UNREADABLE:
        return None


def thumbnail(image: Image.Image, size: tuple[int, int]) -> str:
    """Return an image as the address of a JPEG of at most this size in px; never enlarged."""
    from PIL import Image

    image = image.convert("RGB")
    image.thumbnail(size, Image.Resampling.BICUBIC)
    held = io.BytesIO()
    image.save(held, "JPEG", quality=80, optimize=True)
    return _address(held.getvalue(), "jpeg")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _results(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the table of all results of all runs, without empty columns; None if there are none.

    Raises:
        UserError: If a results.csv is damaged.
    """
    rows = [
        {"run": name, **row}
        for run, name in zip(runs, names, strict=True)
        for row in read_rows(run.path / "results.csv")
    ]
    columns = ["run"] if len(runs) > 1 else []
    columns += ["protocol", "variant", "weights", "data", "test_images", *NUMBERS, "seed", "time"]
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    cells = [[_text(row.get(column) or "") for column in columns] for row in rows]
    return {"header": columns, "rows": cells} if rows else None


def _shown(
    request: EmbedRequest | str, points: int, name: str, plots: dict[str, Any]
) -> dict[str, Any]:
    """Return what the page shows of a run's images; their map is added to ``plots`` as ``name``."""
    if isinstance(request, str):
        return {"missing": _text(request)}
    import numpy as np

    from ssl_samix.evaluation.embed import read_names, write_features
    from ssl_samix.evaluation.embedding import nearest_rows
    from ssl_samix.evaluation.outliers import ranked
    from ssl_samix.reporting.report_plots import embedding_map

    with tempfile.TemporaryDirectory() as temporary:
        written = write_features(replace(request, out=Path(temporary) / "features"))
        features, names = np.load(written.folder / "features.npy"), read_names(written.folder)
    total = len(features)
    tiles = Tiles(written, names)
    shown: dict[str, Any] = {"images": total}
    if total < 2:
        return {"missing": "only one image can be read"}
    isolated, alike = ranked(features, names, request.config.neighbours)
    shown["isolated"] = [
        tiles.tile(row.row, f"distance {row.distance:.3f}")
        for row in isolated[:ISOLATED].itertuples()
    ]
    shown["alike"] = [
        (f"{row.cosine:.4f}", [tiles.tile(row.row), tiles.tile(row.other_row)])
        for row in alike[:ALIKE].itertuples()
    ]
    generator = np.random.default_rng(request.config.seed)
    asked = generator.permutation(total)[:ASKED].tolist()
    cosines, rows = nearest_rows(features, asked, min(NEIGHBOURS, total - 1))
    shown["neighbours"] = [
        (tiles.tile(row), [tiles.tile(n, f"cos {c:.3f}") for c, n in zip(*pair, strict=True)])
        for row, *pair in zip(asked, cosines.tolist(), rows.tolist(), strict=True)
    ]
    picks = np.sort(generator.permutation(total)[:points])
    labels = None if "label" not in names else [tiles.label(i) for i in picks]
    points_shown = {
        "id": [tiles.id(i) for i in picks],
        "thumb": [tiles.address(i, POINT) for i in picks],
    }
    plots[name] = embedding_map(features[picks], points_shown, labels, request.config.seed)
    return {**shown, "missing": None, "map": name, "points": len(picks)}


class Tiles:
    """The thumbnails, ids and labels of the images that have a row.

    Args:
        written: The images.
        names: Their table, as ``read_names`` returns it.
    """

    def __init__(self, written: Written, names: Any) -> None:
        self.written, self.names = written, names

    def id(self, row: int) -> str:
        """Return the id of a row's image."""
        return _text(self.names["id"].iloc[row])

    def label(self, row: int) -> str:
        """Return the label of a row's image; empty if it has none."""
        return _text(self.names["label"].iloc[row]) if "label" in self.names else ""

    def address(self, row: int, side: int) -> str:
        """Return a row's image as the address of a JPEG of at most ``side`` px."""
        from ssl_samix.data.images import to_rgb

        # Decoded at a reduced size where that is faster.
        image = self.written.gallery.pictures.image(self.written.rows[row], 2 * side)
        return thumbnail(to_rgb(image), (side, side))

    def tile(self, row: int, note: str = "") -> dict[str, str]:
        """Return what the page shows of an image in a list."""
        return {
            "src": self.address(row, TILE),
            "id": self.id(row),
            "label": self.label(row),
            "note": note,
        }
