"""Writers of export formats: graphs (``torch.export``, ONNX), torchvision and timm weights.

TorchScript is not offered: PyTorch has deprecated it in favour of ``torch.export``.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.models.resnet import BasicBlock

from ssl_samix.artifacts.checkpoints import META
from ssl_samix.artifacts.encoder import Encoder
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from ssl_samix.files import write_atomically
from ssl_samix.models.backbone import check_library
from ssl_samix.models.libraries import TimmTrunk, remove_classifier
from ssl_samix.models.resnet import RESNETS, ResNetTrunk

TOLERANCE = 1e-5  # relative to the largest feature, or to 1 if that is larger
DESCRIPTION = f"{META}.json"  # extra file of a .pt2 that describes the encoder
INPUT, OUTPUT = "images", "features"
OPSET = 18  # written by torch's exporter without conversion; onnxruntime reads it since 1.14
LARGEST = 2**31 - 2**24  # bytes of weights: an ONNX file holds 2 GiB, graph included
PROPERTIES = ("image_size", "mean", "std", "feature_dim")
PUBLISHED_WIDTH = 64  # of the ResNets that torchvision and timm have names for


@torch.no_grad()
def check_same(encoder: Encoder, exported: Callable[[Tensor], Tensor], kind: str) -> None:
    """Check that an export gives the encoder's features, on random batches of one and of three.

    Args:
        encoder: Gives the expected features.
        exported: Maps images (B, 3, S, S) to features (B, feature_dim); read back from the bytes
            that will be written.
        kind: Value of ``format=``, for the error.

    Raises:
        CheckpointError: If the encoder's own features are not finite.
        UserError: If the features differ by more than ``TOLERANCE``.
    """
    size = encoder.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    for batch in (images[:1], images):
        wanted, given = encoder(batch), exported(batch)
        if not wanted.isfinite().all():
            raise CheckpointError("the encoder's features are not finite: its training diverged")
        if given.shape != wanted.shape:
            raise _differs(kind, f"of shape {tuple(given.shape)}, not {tuple(wanted.shape)}")
        apart, largest = (given - wanted).abs().max().item(), wanted.abs().max().item()
        if not apart <= TOLERANCE * max(1.0, largest):  # also true for NaN
            raise _differs(kind, f"{apart:.1e} away, the largest being {largest:.1e}")


def _differs(kind: str, how: str) -> UserError:
    return UserError(
        f"format={kind} would not give this encoder's features (they are {how}): "
        "nothing was written, choose another format"
    )


def description(encoder: Encoder) -> dict[str, Any]:
    """Return the encoder's description in plain values, for formats that can store one."""
    return {**encoder.meta, "feature_dim": encoder.feature_dim}


def captured(encoder: Encoder) -> ExportedProgram:
    """Return the encoder as a ``torch.export`` graph with a dynamic batch size.

    Raises:
        UserError: If its computation depends on the values of the images.
    """
    # A batch of 1 would be exported as a constant size.
    images = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
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
                # Removes the paths of source files on this machine from the export.
                node.meta.pop("stack_trace", None)
    return program


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_program(encoder: Encoder, path: Path) -> list[str]:
    """Write a ``.pt2`` file, which ``torch.export.load`` reads without this package.

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


def write_onnx(encoder: Encoder, path: Path) -> list[str]:
    """Write an ONNX file that maps ``images`` (B, 3, S, S) to ``features`` (B, feature_dim).

    B is dynamic, S is the encoder's image size. ``metadata_props`` holds ``image_size``, ``mean``,
    ``std`` and ``feature_dim`` as JSON, and the encoder's whole description as ``ssl_samix``.
    onnxruntime's features are compared with the encoder's before the file is written.

    Returns:
        Lines of Python that load the file and use it.

    Raises:
        ConfigError: If the weights are too large for an ONNX file.
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
    except Exception as error:  # onnxruntime's errors have no narrower base class
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
    """Return the encoder as an ``onnx.ModelProto``."""
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
    assert exported is not None  # never None for an ExportedProgram
    model = exported.model_proto
    # The exporter gives the batch dimension an internal name in all recorded shapes.
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


def write_weights(
    encoder: Encoder, path: Path, library: str, network: nn.Module, lines: list[str]
) -> list[str]:
    """Write a state dict that ``torch.load`` reads with ``weights_only=True``.

    Args:
        encoder: Encoder whose weights are written, under the library's parameter names.
        path: The file.
        library: ``torchvision`` or ``timm``.
        network: Model of the library; must load the weights with strict=True.
        lines: Lines of Python that make this model.

    Returns:
        These lines and those that load the file into ``model`` and use it.

    Raises:
        UserError: If the features differ, or the file cannot be written.
    """
    buffer = io.BytesIO()
    # Not converted to a plain dict: some networks read the version stored in the OrderedDict.
    torch.save(library_weights(encoder), buffer)
    content = buffer.getvalue()
    network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True), strict=True)
    check_same(encoder, network.eval(), library)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return [
        *lines,
        f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True))",
        "features = model.eval()(images)",
    ]


def library_weights(encoder: Encoder) -> dict[str, Tensor]:
    """Return the encoder's state dict under the parameter names of its library."""
    trunk: Any = encoder.backbone.trunk
    weights: dict[str, Tensor]
    weights = (trunk if isinstance(trunk, ResNetTrunk) else trunk.model).state_dict()
    return weights


def call(function: str, *positional: str, **named: Any) -> str:
    """Return the Python text of a function call."""
    arguments = [*map(repr, positional), *(f"{key}={value!r}" for key, value in named.items())]
    return f"{function}({', '.join(arguments)})"


def write_timm(encoder: Encoder, path: Path) -> list[str]:
    """Write a state dict that timm's model loads with ``strict=True``.

    timm's ResNets have torchvision's parameter names.

    Returns:
        Lines of Python that make the model, load the file and use it.

    Raises:
        ConfigError: If timm has no such model.
        UserError: If the features differ, or the file cannot be written.
    """
    return write_weights(encoder, path, "timm", *timm_network(encoder))


def timm_network(encoder: Encoder) -> tuple[nn.Module, list[str]]:
    """Return timm's network of an encoder, with random weights, and the lines that make it.

    Raises:
        ConfigError: If timm has no such model.
    """
    check_library("timm", encoder.backbone.name)
    made = timm_call(encoder)
    if made is None:
        network, lines = _timm_resnet(encoder)
    else:
        name, arguments = made
        network = timm.create_model(name, pretrained=False, **arguments)
        lines = [f"model = {call('timm.create_model', name, **arguments)}"]
    return network, ["import timm", "import torch", *lines]


def timm_call(encoder: Encoder) -> tuple[str, dict[str, Any]] | None:
    """Return name and arguments of the ``timm.create_model`` that makes an encoder's network.

    None if no call makes it: a model of torchvision, or a ResNet of another width or stem, since
    timm's have 64 channels and a stride of 4 before the first block.
    """
    trunk, name = encoder.backbone.trunk, encoder.backbone.name
    arguments: dict[str, Any] = {"num_classes": 0}
    if isinstance(trunk, TimmTrunk):
        arguments |= encoder.backbone.settings["options"]
        if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
            arguments["img_size"] = encoder.image_size
        return name, arguments
    return (name, arguments) if _is_published(encoder) and timm.is_model(name) else None


def _is_published(encoder: Encoder) -> bool:
    settings = encoder.backbone.settings
    narrow_or_wide = settings["width"] != PUBLISHED_WIDTH
    resnet = isinstance(encoder.backbone.trunk, ResNetTrunk)
    return resnet and not narrow_or_wide and settings["stem"] == "standard"


def _timm_resnet(encoder: Encoder) -> tuple[nn.Module, list[str]]:
    """Return timm's ResNet of the encoder's width and stem, and the lines that make it."""
    trunk: Any = encoder.backbone.trunk
    width: int = encoder.backbone.settings["width"]
    own, blocks, groups, per_group = RESNETS[encoder.backbone.name]
    block, text = getattr(timm.models.resnet, own.__name__), f"timm.models.resnet.{own.__name__}"
    channels = tuple(width * 2**stage for stage in range(4))
    shape = {"cardinality": groups, "base_width": per_group}
    arguments = {"num_classes": 0, "channels": channels, **shape}
    network = timm.models.resnet.ResNet(block, blocks, **arguments)
    lines = [
        f"block = {text}",
        f"model = timm.models.resnet.ResNet(block, {blocks}, **{arguments})",
    ]
    _set_stem(network, trunk, lines)
    # timm's constructor made the first block for a stem of 64 channels.
    if own is BasicBlock:
        network.layer1[0] = block(width, width)
        lines.append(f"model.layer1[0] = block({width}, {width})")
    else:
        wide = width * block.expansion
        down = timm.models.resnet.downsample_conv(width, wide, 1)
        network.layer1[0] = block(width, width, downsample=down, **shape)
        lines += [
            f"down = timm.models.resnet.downsample_conv({width}, {wide}, 1)",
            f"model.layer1[0] = block({width}, {width}, downsample=down, **{shape})",
        ]
    return network, lines


def write_torchvision(encoder: Encoder, path: Path) -> list[str]:
    """Write a state dict that torchvision's model loads with ``strict=True``.

    Returns:
        Lines of Python that make the model, load the file and use it.

    Raises:
        ConfigError: If torchvision has no such model.
        UserError: If the features differ, or the file cannot be written.
    """
    name, arguments = encoder.backbone.name, {}
    check_library("torchvision", name)
    if isinstance(encoder.backbone.trunk, ResNetTrunk) and not _is_published(encoder):
        network, lines = _torchvision_resnet(encoder)
    else:
        if name == "googlenet":  # torchvision's has auxiliary classifiers, an encoder has none
            arguments = {"aux_logits": False, "init_weights": False}
        network = torchvision.models.get_model(name, weights=None, **arguments)
        lines = [f"model = {call(f'torchvision.models.{name}', **arguments)}"]
    lines.append(_without_classifier(network))
    return write_weights(
        encoder, path, "torchvision", network, ["import torch", "import torchvision", *lines]
    )


def _torchvision_resnet(encoder: Encoder) -> tuple[nn.Module, list[str]]:
    """Return torchvision's ResNet of the encoder's width and stem, and the lines that make it."""
    trunk: Any = encoder.backbone.trunk
    width: int = encoder.backbone.settings["width"]
    block, blocks, groups, per_group = RESNETS[encoder.backbone.name]
    arguments = {"groups": groups, "width_per_group": per_group}
    network = torchvision.models.ResNet(block, list(blocks), **arguments)
    lines = [
        f"block = torchvision.models.resnet.{block.__name__}",
        f"model = torchvision.models.ResNet(block, {list(blocks)}, **{arguments})",
    ]
    _set_stem(network, trunk, lines)
    if width != PUBLISHED_WIDTH:
        network.inplanes = width
        lines.append(f"model.inplanes = {width}")
        for stage, count in enumerate(blocks):
            channels, stride = width * 2**stage, min(stage, 1) + 1
            layer = network._make_layer(block, channels, count, stride)
            setattr(network, f"layer{stage + 1}", layer)
            made = f"model._make_layer(block, {channels}, {count}, {stride})"
            lines.append(f"model.layer{stage + 1} = {made}")
    return network, lines


def _set_stem(network: nn.Module, trunk: Any, lines: list[str]) -> None:
    """Replace the parts of a ResNet's stem that differ from ours; add the lines that do so."""
    conv, width = trunk.conv1, trunk.conv1.out_channels
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    texts = {
        "conv1": f"Conv2d(3, {width}, {kernel}, {stride}, padding={kernel // 2}, bias=False)",
        "bn1": f"BatchNorm2d({width})",
        "maxpool": "Identity()",  # differs in the stem for small images only
    }
    for part, text in texts.items():
        own = getattr(trunk, part)
        if repr(getattr(network, part)) != repr(own):
            setattr(network, part, copy.deepcopy(own))
            lines.append(f"model.{part} = torch.nn.{text}")


def _without_classifier(network: nn.Module) -> str:
    """Remove the classifier of a network and return the line of Python that does the same."""
    name = remove_classifier(network)
    if name is None:  # SqueezeNet
        return "model.classifier = torch.nn.AdaptiveAvgPool2d(1)"
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".")]
    return f"model{''.join(parts)} = torch.nn.Identity()"
