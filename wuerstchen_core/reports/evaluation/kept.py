"""Values of pictures in files, so that an interrupted run goes on and pictures are not measured twice."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...util.atomic import replacing
from ...util.errors import WuerstchenError


class Row(NamedTuple):
    """A picture of a batch."""

    key: str
    caption: str
    content: bytes  # of its file


class Values(NamedTuple):
    """What a scorer gave for the good pictures of a batch, and what is wrong with the others, by their place in it."""

    values: Tensor
    damaged: Mapping[int, str]


class Kept:
    """A file for each batch and scorer, whose name follows from all that the values depend on.

    So a picture or caption that was changed, other weights, or another size of batches are other files. Several
    processes may use one folder, at the same time as well.

    Args:
        folder: is made if it does not exist.
        weights: by each scorer's name, something that changes whenever its weights do.
        captioned: names of those that read captions.

    Raises:
        WuerstchenError: nothing can be written there.
    """

    def __init__(self, folder: str | Path, weights: Mapping[str, str], captioned: Sequence[str] = ("clip", "pick")):
        self.folder, self.weights, self.captioned = Path(folder), weights, captioned
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / ".writable") as partial:
                partial.touch()
            (self.folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise WuerstchenError(f"{folder}: nothing can be kept there ({error.strerror})") from error

    def find(self, name: str, rows: Sequence[Row]) -> Values | None:
        """What an earlier run kept, if it did and the file can be read."""
        try:
            with safe_open(self._path(name, rows), "pt") as file:
                damaged = json.loads(file.metadata()["damaged"])
                return Values(file.get_tensor("values"), {int(i): told for i, told in damaged.items()})
        except (OSError, SafetensorError):
            return None

    def add(self, name: str, rows: Sequence[Row], values: Values) -> None:
        """Raises WuerstchenError if the file can't be written."""
        path = self._path(name, rows)
        try:
            with replacing(path, sync=False) as partial:
                save_file({"values": values.values.contiguous()}, partial, {"damaged": json.dumps(values.damaged)})
        except (OSError, SafetensorError) as error:
            raise WuerstchenError(f"{path}: could not be written ({error})") from error

    def _path(self, name: str, rows: Sequence[Row]) -> Path:
        about = [name, self.weights[name]]
        for key, caption, content in rows:
            about += [key, caption if name in self.captioned else "", hashlib.sha256(content).hexdigest()]
        return self.folder / f"{hash_of_texts(about)}.safetensors"


def hash_of(path: str | Path) -> str:
    """SHA-256 of a file, or of all files in a folder with their names. Raises OSError if it can't be read."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(one for one in path.rglob("*") if one.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {hash_of(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
