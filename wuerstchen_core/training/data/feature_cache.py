"""A cache on disk of the features that frozen networks compute from pictures and captions."""

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...checkpoints.safetensors_file import save_file
from ...util.atomic import replacing
from ...util.errors import WuerstchenError
from .files import check_regular

Features = dict[str, Tensor]  # such as {"semantic": (16, p, q), "latent": (4, h, w), "text": (L, width)}

CHECKSUM = "crc32"


class FeatureCache:
    """A folder with a small safetensors file for each sample, which holds its tensors as they were given.

    `fingerprint` chooses a subfolder, so that features of other weights (see the function of that name), or computed in
    another way, are kept apart. A sample is found by its address, from `address`; where features are of pictures alone
    (`of_captions` is false), whatever the caption.

    Raises WuerstchenError if the folder can't be made.
    """

    def __init__(self, folder: str | Path, fingerprint: str, of_captions: bool = True):
        self.of_captions = of_captions
        self.folder = Path(folder) / _digest(fingerprint)[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WuerstchenError(f"{folder}: features can't be kept there ({error.strerror})") from error

    def find(self, address: str) -> Features | None:
        """The features of one sample, or None if they are missing or the file is damaged."""
        try:
            check_regular(self._path(address))
            with safe_open(self._path(address), framework="pt") as file:
                features = {name: file.get_tensor(name) for name in file.keys()}
                whole = file.metadata() == {CHECKSUM: _checksum(features)}
        except (OSError, ValueError, SafetensorError):
            return None
        return features if whole else None

    def read(self, addresses: Sequence[str]) -> Features | None:
        """The features of some samples, stacked: (B, …) each. None if one has none, or if they can't be stacked."""
        found = [self.find(address) for address in addresses]
        whole = [features for features in found if features is not None]
        return stacked(whole) if len(whole) == len(found) else None

    def write(self, addresses: Sequence[str], features: Features) -> None:
        """Keeps stacked features, (B, …) each, for B samples. Raises WuerstchenError if they can't be written."""
        for number, address in enumerate(addresses):
            own = {name: tensor[number].detach().cpu().contiguous().clone() for name, tensor in features.items()}
            path = self._path(address)
            try:
                path.parent.mkdir(exist_ok=True)
                with replacing(path, sync=False) as partial:  # a damaged file is found by its checksum
                    save_file(own, partial, metadata={CHECKSUM: _checksum(own)})
            except (OSError, SafetensorError) as error:
                raise WuerstchenError(f"{path}: features could not be written ({error})") from error

    def _path(self, address: str) -> Path:
        return self.folder / address[:2] / f"{address[2:]}.safetensors"


def address(key: str, stamp: str, size: tuple[int, int], caption: str) -> str:
    """Where the features of a sample are: another address for each picture (`stamp`), size in pixels and caption."""
    return _digest(repr((key, stamp, size, caption)))


def fingerprint(*paths: str | Path) -> str:
    """A hash of the content of some files, or folders of files, in this order.

    Reads them whole. Raises WuerstchenError naming one that can't be read.
    """
    content = hashlib.blake2b(digest_size=32)
    for path in map(Path, paths):
        files = sorted(inside for inside in path.rglob("*") if inside.is_file()) if path.is_dir() else [path]
        for file in files:
            content.update(_content_digest(file))
    return content.hexdigest()


def stacked(features: Sequence[Features]) -> Features | None:
    """Features of single samples -> (B, …) each, or None if their names or shapes differ."""
    kinds = {tuple((name, one[name].shape, one[name].dtype) for name in sorted(one)) for one in features}
    if len(kinds) != 1:
        return None
    return {name: torch.stack([one[name] for one in features]) for name in features[0]}


def _content_digest(path: Path) -> bytes:
    content = hashlib.blake2b(digest_size=32)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                content.update(chunk)
    except OSError as error:
        raise WuerstchenError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise WuerstchenError(f"{path}: cannot be read ({error})") from error
    return content.digest()


def _checksum(features: Features) -> str:
    total = 0
    for name in sorted(features):
        total = zlib.crc32(features[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return str(total)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
