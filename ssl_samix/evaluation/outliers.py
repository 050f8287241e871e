"""``samix outliers``: the most isolated and the most alike images of a folder or data set.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_samix.config.compose import compose
from ssl_samix.errors import DataError, check_range
from ssl_samix.evaluation.embed import EmbedRequest, checked, read_names, write_features

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame


@dataclass(frozen=True)
class Outliers:
    """The most isolated and the most alike images.

    Attributes:
        folder: The folder with ``outliers.csv``, ``near_duplicates.csv`` and the features.
        isolated: (R, ...) all images, the most isolated first: ``distance``, the mean cosine
            distance to its nearest neighbours, and the columns of ``paths.csv``.
        alike: Pairs of an image and its nearest neighbour, each once, the most alike first:
            ``cosine``, and the columns of ``paths.csv`` for both, the second with ``other_``.
    """

    folder: Path
    isolated: DataFrame
    alike: DataFrame


def parse_outliers(words: list[str]) -> EmbedRequest:
    """Parse and check ``key=value`` arguments.

    Raises:
        UserError: For the first error found.
    """
    config, _ = compose("outliers", words)
    check_range("neighbours", config.neighbours, 1)
    check_range("shown", config.shown, 0)
    return checked("outliers", config, "outliers")


def find_outliers(request: EmbedRequest) -> Outliers:
    """Rank the images of a request, and write both tables beside the features.

    Raises:
        UserError: If there is no encoder, fewer than two images can be read, or a file cannot be
            written.
    """
    import numpy as np

    from ssl_samix.evaluation.embedding import TEXT
    from ssl_samix.files import write_atomically

    folder = write_features(request).folder
    features, names = np.load(folder / "features.npy", mmap_mode="r"), read_names(folder)
    isolated, alike = ranked(features, names, request.config.neighbours)
    for name, table in (("outliers.csv", isolated), ("near_duplicates.csv", alike)):
        write_atomically(folder / name, lambda file, t=table: t.to_csv(file, index=False, **TEXT))  # type: ignore[misc]
    return Outliers(folder, isolated, alike)


def ranked(features: np.ndarray, names: DataFrame, neighbours: int) -> tuple[DataFrame, DataFrame]:
    """Return the images from the most isolated on, and the pairs from the most alike on.

    An image is isolated if the mean cosine distance to its nearest neighbours is large (Ramaswamy
    et al., SIGMOD 2000; for embeddings Kuan and Mueller, arXiv 2207.03061).

    Args:
        features: (R, D) of R images.
        names: (R, ...) the columns of ``paths.csv``.
        neighbours: Number of neighbours; at most R - 1 are used.

    Returns:
        The tables ``isolated`` and ``alike`` of ``Outliers``.

    Raises:
        DataError: If there are fewer than two images.
    """
    from pandas import DataFrame, concat

    from ssl_samix.evaluation.embedding import neighbourhoods

    if len(features) < 2:
        raise DataError("only one image can be read: give at least two")
    cosines, rows = neighbourhoods(features, min(neighbours, len(features) - 1))
    isolated = names.copy()
    isolated.insert(0, "distance", (1 - cosines.mean(dim=1)).numpy())
    isolated = isolated.sort_values("distance", ascending=False, kind="stable")
    ends = [sorted(pair) for pair in enumerate(rows[:, 0].tolist())]
    pairs = DataFrame(ends, columns=["a", "b"]).assign(cosine=cosines[:, 0].numpy())
    pairs = pairs.drop_duplicates(["a", "b"]).sort_values("cosine", ascending=False, kind="stable")
    both = [names.iloc[pairs["a"]], names.iloc[pairs["b"]].add_prefix("other_")]
    columns = [pairs["cosine"], *both]
    alike = concat([column.reset_index(drop=True) for column in columns], axis=1)
    return isolated.reset_index(drop=True), alike


def summary(found: Outliers, shown: int) -> str:
    """Return the first rows of both tables as text, with the folder in the last line."""
    lines = ["most isolated: mean cosine distance to the nearest neighbours, id"]
    lines += [f"{row.distance:.4f}  {row.id}" for row in found.isolated[:shown].itertuples()]
    lines += ["most alike: cosine, ids"]
    lines += [
        f"{row.cosine:.4f}  {row.id}  {row.other_id}" for row in found.alike[:shown].itertuples()
    ]
    return "\n".join([*(map(_printable, lines) if shown else ()), str(found.folder)])


def _printable(line: str) -> str:
    """Return a line in which line breaks and control codes of file names are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
