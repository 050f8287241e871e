"""``samix export``: write a trained encoder for other libraries and runtimes.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ssl_samix.artifacts.hub import is_remote, local, short_name
from ssl_samix.artifacts.run_folder import weights_file
from ssl_samix.config.compose import compose
from ssl_samix.errors import CheckpointError, ConfigError, check_choice
from ssl_samix.files import expanded

SUFFIXES = {"torchvision": ".pth", "timm": ".pth", "onnx": ".onnx", "torch_export": ".pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportRequest:
    """Checked arguments of ``samix export``.

    Attributes:
        run: A run folder, a checkpoint, or an ``encoder.safetensors``.
        format: A key of ``SUFFIXES``.
        out: File to write.
    """

    run: Path
    format: str
    out: Path


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        path: The file that was written.
        usage: Lines of Python that load the file and compute ``features`` from ``images``.
    """

    path: Path
    usage: str


def parse_export(words: list[str]) -> ExportRequest:
    """Return the checked request of ``key=value`` arguments.

    Raises:
        UserError: For the first error in them.
    """
    config, _ = compose("export", words)
    if config.run is None:
        raise ConfigError(
            "export needs an encoder: run=<run folder, checkpoint or encoder.safetensors>"
        )
    _check_format(config.format)
    run = local(str(config.run))
    _check_run(run)
    suffix = SUFFIXES[config.format]
    beside = (run / "encoder" if run.is_dir() else run).with_suffix(suffix)
    if is_remote(str(config.run)):  # not in the cache, into the current folder
        beside = Path(f"{short_name(config.run)}{suffix}")
    out = beside if config.out is None else expanded(str(config.out))
    if out.suffix.lower() != suffix:
        raise ConfigError(
            f"out={out}: give the file of format={config.format} a name that ends in {suffix}"
        )
    if out.resolve() == run.resolve():
        raise ConfigError(f"out={out} is the encoder itself: give another name")
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}")
    return ExportRequest(run, config.format, out)


def _check_format(name: object) -> None:
    if name is None:
        raise ConfigError(f"export needs a format: format=<{' or '.join(SUFFIXES)}>")
    if name == "torchscript":
        raise ConfigError(
            "format=torchscript is not offered, PyTorch has deprecated it: "
            "choose format=torch_export"
        )
    check_choice("format", name, SUFFIXES)
    missing = [p for p in ONNX_PACKAGES if name == "onnx" and find_spec(p) is None]
    if missing:
        raise ConfigError(f"format=onnx needs {missing[0]}: pip install 'ssl_samix[export]'")


def _check_run(run: Path) -> None:
    if not run.exists():
        raise CheckpointError(
            f"run={run} does not exist: give a run folder, a checkpoint or encoder.safetensors"
        )
    weights_file(run, "encoder.safetensors")


def export(request: ExportRequest) -> Exported:
    """Write the encoder in another format, after checking that it gives the same features.

    Raises:
        UserError: If there is no encoder, the format cannot hold it, its features would differ, or
            the file cannot be written. An existing file at ``out`` is then unchanged.
    """
    from ssl_samix.artifacts.encoder import load_encoder
    from ssl_samix.artifacts.export_formats import (
        write_onnx,
        write_program,
        write_timm,
        write_torchvision,
    )

    writers = {
        "torchvision": write_torchvision,
        "timm": write_timm,
        "onnx": write_onnx,
        "torch_export": write_program,
    }
    encoder = load_encoder(request.run)
    size = encoder.image_size
    reads = (
        f"# images: float32 (B, 3, {size}, {size}), RGB in [0, 1] minus {encoder.mean}, "
        f"divided by {encoder.std}"
    )
    lines = writers[request.format](encoder, request.out)
    return Exported(request.out, "\n".join([reads, *lines]))
