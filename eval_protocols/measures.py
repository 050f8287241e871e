"""Measures without labels, and k-means clustering if labels exist.

On training images: RankMe, alignment and uniformity on the unit sphere. On the test images, if
labels exist: k-means with as many clusters as classes, repeated from different starts. The encoder
is not trained, and no setting is chosen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_samix.config.compose import CONFIG_DIR, build, groups, plain
from ssl_samix.data.images import ImageSet
from ssl_samix.data.subsets import stratified
from ssl_samix.data.views import ViewMaker
from ssl_samix.errors import ConfigError, DataError, check_range
from ssl_samix.evaluation.measures import (
    agreement,
    alignment,
    embed_two_views,
    kmeans,
    rankme,
    uniformity,
)
from ssl_samix.evaluation.request import ProtocolRequest
from ssl_samix.evaluation.results import Report, Row, table
from ssl_samix.evaluation.task import Task, open_task

MOST_SAMPLED = 25_600  # images, as in the RankMe paper; uniformity uses all pairs of them
MOST_PAIRS = 1000  # images with two views each, drawn in this process


def check(config: DictConfig) -> None:
    """Check the settings that can be checked without data."""
    check_range("sample", config.sample, 2, MOST_SAMPLED)
    check_range("starts", config.starts, 1, 100)
    if config.clusters != "auto":
        if not isinstance(config.clusters, int):
            raise ConfigError(f"clusters needs a whole number or auto, got '{config.clusters}'")
        check_range("clusters", config.clusters, 2)


def run(request: ProtocolRequest) -> Path:
    """Run the protocol, print its results, and return the folder of the results."""
    config, task = request.config, open_task(request)
    train, clusters = task.splits.train, clusters_of(task, config.clusters)
    if len(train) < 2:
        raise DataError("these measures compare images with each other and need at least 2")
    name, views = view_maker(request, task)
    report = Report(request)
    with report.timed("features"):
        rows = [features_row(task, train, config)]
    with report.timed("views"):
        rows.append(views_row(task, train, config, name, views))
    details: dict[str, Any] = {"views": [asdict(spec) for spec in views.specs]}
    if clusters is None:
        print("no labels, hence no k-means")
    else:
        with report.timed("k-means"):
            row, details["k-means"] = kmeans_row(task, clusters, config)
        rows.append(row)
    report.write(task, rows, details)
    print(table(rows))
    return report.folder


def clusters_of(task: Task, wanted: int | str) -> int | None:
    """Return the number of clusters, or None if there are no labels to compare with.

    Raises:
        DataError: If a number is given although there are no labels, or there are fewer test images
            than clusters.
    """
    test = task.splits.val
    if test is None:
        if wanted != "auto":
            raise DataError(f"clusters={wanted}: there are no labels to compare clusters with")
        return None
    clusters = len(task.splits.classes) if wanted == "auto" else int(wanted)
    if clusters > len(test):
        raise DataError(f"{len(test)} test images cannot make {clusters} clusters: set fewer")
    return clusters


def features_row(task: Task, images: ImageSet, config: DictConfig) -> Row:
    """Return the measures of a stratified sample of un-augmented images."""
    picks = stratified(images.labels, config.sample, config.seed).tolist()
    features = task.embed(images, "training", picks)
    numbers = {"rankme": rankme(features), "uniformity": uniformity(features)}
    return Row("features", numbers, {"images": len(picks)})


def views_row(task: Task, images: ImageSet, config: DictConfig, name: str, views: Any) -> Row:
    """Return the measures of two views of each image, such as alignment."""
    count = min(config.sample, MOST_PAIRS)
    picks = stratified(images.labels, count, config.seed).tolist()
    pair = embed_two_views(
        task.encoder, images, picks, views, task.device, config.seed, config.chunk
    )
    return Row(f"views {name}", {"alignment": alignment(*pair)}, {"images": len(picks)})


def kmeans_row(task: Task, clusters: int, config: DictConfig) -> tuple[Row, dict[str, Any]]:
    """Return the result of k-means on the test images, and the numbers of every start."""
    _, images = task.labelled
    features = task.embed(images, "test")
    starts = [
        agreement(kmeans(features, clusters, config.seed + i)[0], images.labels)
        for i in range(config.starts)
    ]
    values = {key: [start[key] for start in starts] for key in starts[0]}
    spread = {f"{key}_std": stdev(v) for key, v in values.items() if len(v) > 1}
    settings = {"clusters": clusters, "starts": config.starts, **spread}
    return Row("k-means", {key: fmean(v) for key, v in values.items()}, settings), values


def view_maker(request: ProtocolRequest, task: Task) -> tuple[str, ViewMaker]:
    """Return the name and the maker of two views; SimCLR's if the run had no such pair."""
    views = request.config.get("views")
    if views is None and request.origin.run is not None:
        config, choices = request.origin.run.load_config(request.config.config_dir)
        views = config.get("views")
        if views is not None and "_target_" not in views:
            raise ConfigError(
                f"{request.origin.given} has views={choices['views']} of your own: give the folder "
                f"that holds views/{choices['views']}.yaml, config_dir=<folder>, or other views"
            )
    if views is None:
        views = OmegaConf.load(CONFIG_DIR / "views" / "simclr.yaml")
    data, encoder = request.config.data, task.encoder
    specs = build(views).specs(encoder.image_size, data.flip, data.crop_min)
    maker = ViewMaker(specs, encoder.image_size, encoder.mean, encoder.std)
    return views_name(plain(views)), maker


def views_name(views: dict[str, Any]) -> str:
    """Return the names of the papers with exactly these views, or a digest if there are none."""
    papers = [
        name
        for name in groups()["views"]
        if _alike(views, plain(OmegaConf.load(CONFIG_DIR / "views" / f"{name}.yaml")))
    ]
    digest = hashlib.sha256(json.dumps(views, sort_keys=True).encode()).hexdigest()[:6]
    return "/".join(papers) or digest


def _alike(views: Any, published: Any) -> bool:
    """Return whether settings equal the published ones, ignoring published ``auto``."""
    if isinstance(views, dict) and isinstance(published, dict):
        same = views.keys() == published.keys()
        return same and all(_alike(views[name], value) for name, value in published.items())
    return published in (views, "auto")


if __name__ == "__main__":
    import sys

    from ssl_samix.cli.main import main

    main(["measures", *sys.argv[1:]])
