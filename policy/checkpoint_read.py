"""Safetensors of a folder: one file or several, read tensor by tensor with one file mapped at a time.

No other format is opened: a pickle runs code when it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from policy.digest import tensor_digest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "lockstep.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """What the header of `file` says of a tensor; dtype as safetensors names it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The tensors of a folder, by name. Raises ValueError naming the file that is missing, damaged or contradictory.

    Where the folder has a manifest with digests, every tensor read is checked against them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}  # one file after another
        self._open: tuple[str, Any] | None = None
        self._digests = _recorded_digests(folder)
        weight_map = _weight_map(folder)
        for file in sorted(set(weight_map.values())) or _files(folder):
            self._read_header(file)
        held = {name: entry.file for name, entry in self.entries.items()}
        lost = [f"{name} in {file}" for name, file in weight_map.items() if held.get(name) != file]
        if lost:
            raise ValueError(f"{INDEX} places {lost[0]}, which does not hold it; restore both from their source")

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored; it may lie in the mapped file, so copy what is to be changed."""
        file = self.entries[name].file
        try:
            tensor: Tensor = self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: tensor {name} is damaged ({error}); restore the file from its source") from None
        if name in self._digests and tensor_digest(tensor) != self._digests[name]:
            raise ValueError(
                f"{file}: tensor {name} does not have the SHA-256 that {MANIFEST} records; restore the file from its "
                f"source, or remove {MANIFEST} if the weights were changed on purpose"
            )
        return tensor

    def digests(self) -> dict[str, str]:
        """Of every tensor, taken of what the disk holds."""
        return {name: tensor_digest(self.read(name)) for name in self.entries}

    def _read_header(self, file: str) -> None:
        handle = self._handle(file)
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            if name in self.entries:
                raise ValueError(f"{name} is both in {self.entries[name].file} and in {file}; remove one of the files")
            part = handle.get_slice(name)
            self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None  # unmaps the file before, so that no more than one counts as memory in use
            try:
                self._open = file, safe_open(self.folder / file, "pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}); restore it from its source") from None
        return self._open[1]


def _files(folder: Path) -> list[str]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = f"{', '.join(pickles[:3])} may run code when opened and never is; " if pickles else ""
    raise ValueError(f"no .safetensors file here; {found}convert the checkpoint to safetensors")


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's own: tensor -> file; empty without an index."""
    if not (folder / INDEX).is_file():
        return {}
    if (folder / SINGLE).exists():
        raise ValueError(f"both {SINGLE} and {INDEX} are here; remove the one that is not meant")
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{INDEX} is damaged: it has no "weight_map" from tensors to files') from None
    foreign = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"{INDEX} names {foreign[0]!r}; only .safetensors files beside it are opened")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{INDEX} names {', '.join(missing)}, of which nothing is here; fetch what is missing")
    return dict(weight_map)


def _recorded_digests(folder: Path) -> dict[str, str]:
    """Those in the manifest of an export of ours; none elsewhere."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        digests = json.loads(path.read_text()).get("tensor_digests", {})
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged: it is not a JSON object; restore it or remove it") from None
    return dict(digests)
