"""The encoder as an ONNX file; needs the packages of ``ssl_samix[export]``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_samix.checkpoint_io import META
from ssl_samix.errors import ConfigError, UserError
from ssl_samix.evaluation.checkpoint import Encoder
from ssl_samix.export.graph import captured, first_line
from ssl_samix.export.same import check_same, description
from ssl_samix.files import write_atomically

INPUT, OUTPUT = "images", "features"
OPSET = 18  # what torch's exporter writes without converting; onnxruntime reads it since 1.14
LARGEST = 2**31 - 2**24  # bytes of weights: a file holds 2 GiB, some of it the graph
PROPERTIES = ("image_size", "mean", "std", "feature_dim")


def write(encoder: Encoder, path: Path) -> list[str]:
    """Write an ONNX file that maps ``images`` (B, 3, S, S) to ``features`` (B, feature_dim).

    B is dynamic, S is the encoder's image size. ``metadata_props`` holds ``image_size``, ``mean``,
    ``std`` and ``feature_dim`` as JSON, and all that is known of the encoder as ``ssl_samix``.
    onnxruntime's features are compared before the file is put in place.

    Returns:
        Lines of Python that load the file and use it.

    Raises:
        ConfigError: If the weights are larger than an ONNX file.
        UserError: If ONNX cannot express the encoder, the features differ, or the file cannot be
            written.
    """
    size = sum(t.numel() * t.element_size() for t in encoder.state_dict().values())
    if size > LARGEST:
        raise ConfigError(
            f"the weights take {size / 2**30:.1f} GiB and an ONNX file holds 2: "
            "choose format=torch_export"
        )
    content = _model(encoder).SerializeToString()
    try:
        check_same(encoder, _in_onnxruntime(content), "onnx")
    except Exception as error:  # onnxruntime's have no base that says more
        if type(error).__module__.startswith("onnxruntime"):
            raise _unfit("onnxruntime does not take", encoder, error) from error
        raise
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({str(path)!r})",
        f'features = session.run(None, {{"{INPUT}": images}})[0]  # NumPy arrays',
    ]


def _unfit(who: str, encoder: Encoder, error: Exception) -> UserError:
    return UserError(
        f"{who} {encoder.backbone.name} ({first_line(error)}): choose format=torch_export"
    )


def _model(encoder: Encoder) -> Any:
    """Return an ``onnx.ModelProto``."""
    from onnx.helper import set_model_props

    program = captured(encoder)
    try:
        exported = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise _unfit("ONNX cannot express", encoder, error) from error
    assert exported is not None  # it is for a program
    model = exported.model_proto
    # The exporter names the batch after a variable of its own, in all the shapes it notes.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    about = description(encoder)
    properties = {key: json.dumps(about[key]) for key in PROPERTIES}
    set_model_props(model, {**properties, META: json.dumps(about)})
    return model


def _in_onnxruntime(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return features
