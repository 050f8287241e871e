"""The encoder as a graph, free of this package: ``torch.export``.

TorchScript is not offered: PyTorch has deprecated it in favour of ``torch.export``.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from ssl_samix.checkpoint_io import META
from ssl_samix.errors import UserError
from ssl_samix.evaluation.checkpoint import Encoder
from ssl_samix.export.same import check_same, description
from ssl_samix.files import write_atomically

DESCRIPTION = f"{META}.json"  # extra file of a .pt2 that describes the encoder


def captured(encoder: Encoder) -> ExportedProgram:
    """Record what the encoder computes, for batches of any size.

    Raises:
        UserError: If what it computes depends on the images' values.
    """
    images = torch.zeros(2, 3, encoder.image_size, encoder.image_size)  # 1 would stay 1 for ever
    try:
        program = torch.export.export(
            encoder.backbone, (images,), dynamic_shapes=({0: Dim("batch")},), strict=False
        )
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"{encoder.backbone.name} cannot be written as a graph ({first_line(error)}): "
            "choose format=torchvision or format=timm"
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                # Where the code lies on this machine is nobody else's business.
                node.meta.pop("stack_trace", None)
    return program


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write(encoder: Encoder, path: Path) -> list[str]:
    """Write a ``.pt2``, which ``torch.export.load`` reads without this package.

    Its extra file ``ssl_samix.json`` holds image size, mean, std and feature width.

    Returns:
        Lines of Python that load the file and use it.

    Raises:
        UserError: If the encoder cannot be captured, the features differ, or the file cannot be
            written.
    """
    buffer = io.BytesIO()
    about = {DESCRIPTION: json.dumps(description(encoder))}
    torch.export.save(captured(encoder), buffer, extra_files=about)
    content = buffer.getvalue()
    check_same(encoder, torch.export.load(io.BytesIO(content)).module(), "torch_export")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return [
        "import torch",
        f"model = torch.export.load({str(path)!r}).module()",
        "features = model(images)",
    ]
