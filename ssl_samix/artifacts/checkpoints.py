"""Reading and writing files of weights: atomic writes, and reads that never run code."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ssl_samix.artifacts.description import META, check_description, described
from ssl_samix.data.folder import join_names
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.files import write_atomically
from ssl_samix.models.backbone import Backbone

# Classes that other projects save beside weights. They are not needed: neither read nor run.
UNREAD = (
    "argparse.Namespace",
    *(f"{m}.{n}Path" for m in ("pathlib", "pathlib._local") for n in ("Posix", "Windows")),
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"numpy.{core}.multiarray.{function}"
        for core in ("core", "_core")  # before numpy 2, and since
        for function in ("scalar", "_reconstruct")
    ),
)
PICKLE = b"\x80"  # first byte of a pickle; torch.save writes a zip file around it
# Entries that Lightning needs to resume:
NEEDED = ("callbacks", "epoch", "global_step", "loops", "lr_schedulers", "optimizer_states")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints atomically and checks them when it reads them.

    Args:
        meta: Description of this run's encoder; stored in each checkpoint, compared on resume.
    """

    def __init__(self, meta: dict[str, Any]) -> None:
        super().__init__()
        self.meta = meta

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint atomically, with the description of the encoder."""
        checkpoint[META] = self.meta
        # To memory first: torch's writer reports a full disk as an error in its file format.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), lambda temporary: temporary.write_bytes(buffer.getbuffer()))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint and check that it is of this run's encoder.

        Raises:
            CheckpointError: If it is damaged, or its backbone, classes or number of training
                images are not this run's.
        """
        checkpoint = read_checkpoint(Path(path))
        missing = [key for key in NEEDED if key not in checkpoint]
        if missing:
            raise CheckpointError(f"{path} is damaged: no run goes on without its {missing[0]}")
        theirs, ours = checkpoint[META]["backbone"], self.meta["backbone"]
        if theirs != ours:
            raise CheckpointError(
                f"{path} holds the backbone {describe(theirs)}, this run has {describe(ours)}"
            )
        self._check_images(Path(path), checkpoint[META])
        return checkpoint

    def _check_images(self, path: Path, theirs: dict[str, Any]) -> None:
        """Check that the training images match the checkpoint's description of them.

        Raises:
            CheckpointError: If the classes or the number of images differ. The steps per epoch, and
                so the schedule, depend on the number.
        """
        learned, given = (list(m.get("classes", ())) for m in (theirs, self.meta))
        if learned != given:
            raise CheckpointError(
                f"{path} holds a classifier of {len(learned)} classes, the data have {len(given)}: "
                f"{join_names(learned)} there, {join_names(given)} in the data; rename the folders "
                f"back, or start a new run with init={path}"
            )
        before, now = theirs.get("train_images"), self.meta.get("train_images")
        if before not in (None, now):
            way = f" with init={path}" if given else ""
            raise CheckpointError(
                f"{path} is of a run on {before} training images, the data now hold {now}: put "
                f"the images back as they were, or start a new run{way}"
            )


def describe(backbone: dict[str, Any]) -> str:
    """Return the name, width and stem of a backbone as text."""
    return f"{backbone['name']} of width {backbone['width']} ({backbone['stem']} stem)"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ssl_samix on the CPU: weights and plain values only.

    Raises:
        CheckpointError: If it is missing, damaged, not of ssl_samix, or a pickle that runs code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):  # torch.save writes zip files; other files are not opened
        raise CheckpointError(f"{path} is damaged or no checkpoint")
    checkpoint = load_plain(path)
    if not isinstance(checkpoint, dict) or META not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of ssl_samix")
    check_description(checkpoint[META], path)
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} is damaged: it holds no weights")
    return checkpoint


class _Unread:
    """Placeholder for a pickled value that is not needed: accepts its parts and ignores them."""

    def __init__(self, *parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Each has the name used in pickles: the real class is never looked up.
_STAND_INS: list[Any] = [
    type(name.rpartition(".")[2], (_Unread,), {"__module__": name.rpartition(".")[0]})
    for name in UNREAD
]


def described_backbone(meta: dict[str, Any], path: Path) -> Backbone:
    """Return the backbone that a file describes, with random weights.

    Raises:
        CheckpointError: If it cannot be built.
    """
    try:
        return Backbone(image_size=meta["image_size"], **meta["backbone"])
    except ConfigError as error:
        raise CheckpointError(f"{path} describes what cannot be built: {error}") from error


def load_plain(path: Path) -> Any:
    """Read a ``torch.save`` file of any origin, if it holds tensors and plain values only.

    Returns:
        The saved object, with useless placeholders for NumPy values, paths and parsed arguments.

    Raises:
        CheckpointError: If it is damaged, or a pickle that runs code.
    """
    with path.open("rb") as file:
        begins = file.read(len(PICKLE))
    if begins != PICKLE and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a checkpoint or a file of weights")
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the cause of the error raised below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        runs = re.search(r"GLOBAL (\S+)", str(error))
        if "Weights only load failed" in str(error) and runs:
            raise CheckpointError(
                f"{path} is refused: loading it would run code ({runs[1]}), which weights never "
                "need: save model.state_dict() alone"
            ) from error
        raise CheckpointError(f"{path} is damaged or no checkpoint") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint") from error


def load_strictly(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    path: Path,
    what: str,
    read: Collection[str] | None = None,
) -> None:
    """Load the weights of a file into a module.

    Args:
        module: Module that the weights are loaded into.
        weights: Tensors by the names of the module's state dict.
        path: File that they were read from, for the error.
        what: What the module is, in one word, for the error.
        read: Entries to load; other entries of the file or the module are ignored.
            None: exactly those of the module.

    Raises:
        CheckpointError: If an entry is missing, is unknown, or has another shape.
    """
    own = module.state_dict()
    if read is not None:
        missing = sorted(set(read) - weights.keys())
        if missing:
            raise CheckpointError(f"{path} does not fit the {what} it names: no {missing[0]} in it")
        weights = {**own, **{name: weights[name] for name in read}}
    # A state dict also carries module versions, which safetensors cannot store.
    state = OrderedDict(weights)
    state._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the {what} it names: {reason}") from error


def write_ours(path: Path, weights: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights and their description as safetensors.

    Raises:
        UserError: If the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save(tensors, metadata={META: json.dumps(meta)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_ours(
    path: Path, in_checkpoint: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read description and weights from a safetensors file or checkpoint of ssl_samix.

    Args:
        path: The file.
        in_checkpoint: Prefix of the weights' names in a checkpoint -> in a safetensors file.

    Raises:
        CheckpointError: If it is missing or damaged, or was not written by ssl_samix.
    """
    if path.suffix != ".safetensors":
        checkpoint = read_checkpoint(path)
        return checkpoint[META], renamed(checkpoint["state_dict"], in_checkpoint)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with opened_safetensors(path) as file:
        text = (file.metadata() or {}).get(META)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if text is None:
        raise CheckpointError(f"{path} is not a file of ssl_samix: it does not describe itself")
    return described(text, path), tensors


def renamed(weights: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the weights whose names have one of these prefixes, with the prefixes replaced."""
    return {
        new + name.removeprefix(old): tensor
        for old, new in prefixes.items()
        for name, tensor in weights.items()
        if name.startswith(old)
    }


@contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file of any origin, for use in ``with``.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file") from error


def is_ours(path: Path) -> bool:
    """Return whether this package wrote a file; files from elsewhere hold weights only.

    Raises:
        CheckpointError: If it cannot be read.
    """
    if path.suffix == ".safetensors":
        with opened_safetensors(path) as file:
            return META in (file.metadata() or {})
    found = load_plain(path)
    return isinstance(found, dict) and META in found
