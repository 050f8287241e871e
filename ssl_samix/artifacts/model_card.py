"""The model card of a pushed run: what it was trained on, how, and how good it is.

Imports no torch.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_samix.artifacts.hub import is_remote
from ssl_samix.artifacts.results import read_rows
from ssl_samix.artifacts.run_folder import RunFolder, command_of, own_choices, read_metrics
from ssl_samix.config.compose import (
    PRETRAINED,
    compose,
    dotted,
    groups,
    in_hydras_grammar,
    parse,
    plain,
)
from ssl_samix.config.key_types import OPEN_KEYS, PATHS
from ssl_samix.errors import ConfigError
from ssl_samix.files import write_atomically

# All values are escaped before they are filled in.
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Image encoder, trained with ssl_samix.

| | |
|---|---|
{% for name, value in facts -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Use

```python
import ssl_samix
from PIL import Image

encoder = ssl_samix.load_encoder("hf://{{ repo }}")
features = encoder(encoder.prepare(Image.open("photo.jpg"))[None])  # (1, {{ feature_dim }})
```
{% if usage %}
Without this package (images: float32 (B, 3, {{ size }}, {{ size }}), RGB in [0, 1] minus
{{ mean }}, divided by {{ std }}):

```python
{{ usage }}
```
{% endif %}
## Quality

{% if results -%}
| protocol | data | variant | top-1, % | test images | seed |
|---|---|---|---|---|---|
{% for row in results -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- else -%}
Not measured.
{% endif %}
## Training

{% if images_needed -%}
On images of the author's own, which are not published here. The same settings on others:
{% else -%}
To repeat it:
{% endif %}
{{ fence }}bash
{{ command }}
{{ fence }}
"""
MARKUP = r"([\\`*_{}\[\]()<>#|~!&$])"  # what Markdown, HTML or a table would read
OWN_IMAGES = ("folder", "webdataset")
# Arguments of any function of a library: some are paths.
FREE_ARGUMENTS = tuple(key for key in OPEN_KEYS if key != "backbone.options")


def write_card(
    path: Path,
    run: RunFolder,
    repo: str,
    meta: dict[str, Any],
    usage: list[str],
    license: str | None,
) -> None:
    """Write the model card of a run.

    Args:
        path: The file, ``README.md``.
        run: The run, whose folder may hold results of protocols.
        repo: ``<user>/<name>``.
        meta: The description of the run's encoder.
        usage: Lines of Python that load the encoder by timm alone; may be empty.
        license: The hub's name of the licence; None: not stated.

    Raises:
        UserError: If a file of the run is damaged.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, _ = run.load_config()
    data = ModelCardData(
        license=license,
        library_name="timm" if any("hf-hub:" in line for line in usage) else "ssl_samix",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "ssl_samix"],
    )
    command = command_line(run)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=escaped(repo.partition("/")[2]),
        repo=repo,
        facts=[(name, escaped(value)) for name, value in _facts(run, meta, license)],
        feature_dim=meta["feature_dim"],
        size=meta["image_size"],
        mean=meta["mean"],
        std=meta["std"],
        usage="\n".join(usage),
        results=[[escaped(cell) for cell in row] for row in _results(run)],
        images_needed=config.data.name in OWN_IMAGES,
        command=command,
        # Longer than any row of backticks inside, so that the block ends where it should.
        fence="`" * (1 + max(2, *map(len, re.findall("`+", command)), 0)),
    )
    write_atomically(path, lambda temporary: temporary.write_text(str(card), "utf-8"))


def escaped(value: Any) -> str:
    """Return a value as one line of text that Markdown and HTML show as it is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(MARKUP, r"\\\1", line)


def _facts(run: RunFolder, meta: dict[str, Any], license: str | None) -> list[tuple[str, Any]]:
    config, choices = run.load_config()
    backbone, rows = meta["backbone"], read_metrics(run.metrics)
    stem = f", width {backbone['width']}, {backbone['stem']} stem"
    network = backbone["name"] + (stem if backbone["name"].startswith(("res", "wide_res")) else "")
    seconds = sum(float(row.get("seconds") or 0) for row in rows)
    return [
        ("network", f"{network}; {meta['feature_dim']} features"),
        ("data", f"{meta.get('data')}: {meta.get('train_images', 'unknown number of')} images"),
        ("image size", f"{meta['image_size']} px"),
        ("method", meta.get("method")),
        ("mixing", choices["mixup"]),
        ("epochs", len(rows)),
        ("seed", config.seed),
        ("hardware", f"{_hardware(run)}, {seconds / 60:.1f} minutes of training"),
        ("licence", license or "not stated"),
    ]


def _hardware(run: RunFolder) -> str:
    """Return the devices of the run's last start, or the number of CPU threads."""
    try:
        last = json.loads(run.environment.read_text("utf-8"))[-1]
        return ", ".join(last["devices"]) or f"CPU, {last['threads']} threads"
    except (OSError, ValueError, LookupError, TypeError):  # of an older version
        return "not recorded"


def _results(run: RunFolder) -> list[list[Any]]:
    """Return the rows of measured top-1 accuracies: of the monitor, and of each evaluation."""
    found: dict[str, float] = {}
    for row in read_metrics(run.metrics):
        found |= {k: float(v) for k, v in row.items() if v and k.endswith("/top1")}
    data = run.load_config()[0].data.name
    rows: list[list[Any]] = [
        [f"{name.partition('/')[0]}, during training", data, "last", f"{top1:.2f}", "", ""]
        for name, top1 in found.items()
    ]
    columns = ("protocol", "data", "variant", "top1", "test_images", "seed")
    measured = {row.get("folder"): row for row in reversed(read_rows(run.path / "results.csv"))}
    for row in reversed(measured.values()):  # the first row of each evaluation
        if row.get("top1") and row.get("weights") == "own":
            given = {**row, "top1": f"{float(row['top1']):.2f}"}
            rows.append([given.get(name) or "" for name in columns])
    return rows


def command_line(run: RunFolder) -> str:
    """Return the command that trains a run like this one, without paths of this machine."""
    config, choices = run.load_config()
    command = command_of(choices)
    _, usual = compose(command, [])
    own = own_choices(command, choices)
    known = groups(command)
    chosen = [
        f"{group}={name}"
        for group, name in choices.items()
        if group in known and group != "logger" and name != usual.get(group) and name is not None
    ]
    try:
        fitting = [word for word in chosen if word.partition("=")[0] not in own]
        default = dotted(plain(compose(command, fitting)[0]))
    except ConfigError:  # a recipe that is no longer there
        default = {}
    left = {*PATHS, *FREE_ARGUMENTS, *run.automatic()}
    keys = [
        f"{key}={_word(value)}"
        for key, value in dotted(plain(config)).items()
        if key not in left
        and not key.startswith("logger.")
        and "_target_" not in key
        and key.partition(".")[0] not in own
        and default.get(key, value) != value
    ]
    words = ["samix", command, *map(shlex.quote, [*chosen, *keys])]
    words += ["data.root=<images>"] if config.data.name in OWN_IMAGES else []
    words += [_start(key, config) for key in ("init", "mixup.mixer") if _at(config, key)]
    words += ["config_dir=<folder of own choices>"] if own else []
    return " ".join(words)


def _at(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key)


def _start(key: str, config: DictConfig) -> str:
    """Return the argument for the weights that a run began with, without paths."""
    value = str(_at(config, key))
    public = value == PRETRAINED or is_remote(value)
    return f"{key}={shlex.quote(value)}" if public else f"{key}=<run>"


def _word(value: Any) -> str:
    """Return a value as it is typed: without quotes, where they change nothing."""
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value):
        return value if parse([f"a={value}"])[0].value() == value else in_hydras_grammar(value)
    return in_hydras_grammar(value)
