"""Files of weights, ours and others': written whole or not at all, read without running code."""

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

# What other projects save beside weights, and is not needed: it is neither read nor run.
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
PICKLE = b"\x80"  # how one begins; torch.save writes a zip file around it
# Of what Lightning goes on with:
NEEDED = ("callbacks", "epoch", "global_step", "loops", "lr_schedulers", "optimizer_states")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plug for reading and writing checkpoints.

    Args:
        meta: Describes this run's encoder; stored in each checkpoint, compared at a resume.
    """

    def __init__(self, meta: dict[str, Any]) -> None:
        super().__init__()
        self.meta = meta

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write atomically."""
        checkpoint[META] = self.meta
        # In memory first: torch's own writer reports a full disk as an error of its own format.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), lambda temporary: temporary.write_bytes(buffer.getbuffer()))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of this run's encoder.

        Raises:
            CheckpointError: If it is damaged, or holds another backbone.
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
        """Refuse images that are not those of the checkpoint, as far as its description tells.

        Raises:
            CheckpointError: If their classes differ, or their number, on which the steps of an
                epoch and so the schedule depend.
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
    """Name a backbone by its settings, in words."""
    return f"{backbone['name']} of width {backbone['width']} ({backbone['stem']} stem)"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one of our checkpoints on the CPU, weights and plain values only.

    Raises:
        CheckpointError: If it is missing, damaged, from elsewhere, or a pickle that runs code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):  # what torch.save writes; nothing else is even opened
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
    """Stands for a value in a pickle that is not needed: takes its parts, and does nothing."""

    def __init__(self, *parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Each under the name that pickles have for it: the class itself is never looked up.
_STAND_INS: list[Any] = [
    type(name.rpartition(".")[2], (_Unread,), {"__module__": name.rpartition(".")[0]})
    for name in UNREAD
]


def described_backbone(meta: dict[str, Any], path: Path) -> Backbone:
    """Build the network that a file describes, with random weights.

    Raises:
        CheckpointError: If it cannot be built.
    """
    try:
        return Backbone(image_size=meta["image_size"], **meta["backbone"])
    except ConfigError as error:
        raise CheckpointError(f"{path} describes what cannot be built: {error}") from error


def load_plain(path: Path) -> Any:
    """Read what ``torch.save`` wrote, of any origin, if it is tensors and plain values only.

    Returns:
        What was saved; in the place of numpy's values, paths and parsed arguments, nothing of use.

    Raises:
        CheckpointError: If it is damaged, or a pickle that runs code.
    """
    with path.open("rb") as file:
        begins = file.read(len(PICKLE))
    if begins != PICKLE and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a checkpoint or a file of weights")
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what makes it refuse the file
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
    """Load weights that a file holds into a module.

    Args:
        module: Takes the weights.
        weights: By the names of the module's state.
        path: Where they were read.
        what: The module in a word, for the error.
        read: The entries that are loaded; others, of the file or the module, are ignored.
            None: all of the module's, and no others.

    Raises:
        CheckpointError: If an entry is missing, unknown, or of another shape.
    """
    own = module.state_dict()
    if read is not None:
        missing = sorted(set(read) - weights.keys())
        if missing:
            raise CheckpointError(f"{path} does not fit the {what} it names: no {missing[0]} in it")
        weights = {**own, **{name: weights[name] for name in read}}
    # Versions of modules stand beside a state, and safetensors has no place for them.
    state = OrderedDict(weights)
    state._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the {what} it names: {reason}") from error


def write_ours(path: Path, weights: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights, and the description of what they are of, as safetensors.

    Raises:
        UserError: If the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save(tensors, metadata={META: json.dumps(meta)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_ours(
    path: Path, in_checkpoint: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description and the weights of a safetensors file of ours, or of a checkpoint.

    Args:
        path: The file.
        in_checkpoint: What the weights' names begin with in a checkpoint -> in a file.

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
    """Take the weights whose names begin in one of these ways, and let them begin in another."""
    return {
        new + name.removeprefix(old): tensor
        for old, new in prefixes.items()
        for name, tensor in weights.items()
        if name.startswith(old)
    }


@contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file of any origin.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file") from error


def is_ours(path: Path) -> bool:
    """Say whether a file was written by this package; files from elsewhere are weights only.

    Raises:
        CheckpointError: If it cannot be read.
    """
    if path.suffix == ".safetensors":
        with opened_safetensors(path) as file:
            return META in (file.metadata() or {})
    found = load_plain(path)
    return isinstance(found, dict) and META in found
