"""Where a tensor's bytes lie in a file, and how they are read: into memory of their own.

Nothing of a file is mapped. What has been loaded stays as it is whatever becomes of the file, and loading takes the
memory of one copy.
"""

import json
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..util.errors import WuerstchenError, first_line

LONGEST_NAME = 400  # letters


class RegularFile:
    """A file on disk, read by position.

    Raises:
        WuerstchenError: there is no such file, it cannot be read or is not a regular one (a pipe, a device, a folder);
            from `read` also where it has changed since it was opened.
    """

    def __init__(self, path: Path):
        self.path = path
        status = file_status(path)
        if not stat.S_ISREG(status.st_mode):
            raise WuerstchenError(f"{path}: not a regular file: give a file of weights, no folder, pipe or device")
        self.size, self._version = status.st_size, _version(status)

    def read(self, offset: int, size: int) -> bytearray:
        content = bytearray(size)
        self.read_into(memoryview(content), offset)
        return content

    def read_into(self, buffer: memoryview, offset: int) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                file.seek(offset)
                while buffer:
                    count = file.readinto(buffer)
                    if not count:
                        break
                    buffer = buffer[count:]
                changed = {_version(before), _version(os.fstat(file.fileno()))} != {self._version}
        except OSError as error:
            raise WuerstchenError(f"{self.path}: cannot be read ({error.strerror})") from error
        if buffer or changed:
            raise WuerstchenError(f"{self.path}: the file was changed while it was read: load it again")


def file_status(path: Path) -> os.stat_result:
    """Raises WuerstchenError where there is no such file or it cannot be reached."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except OSError as error:
        raise WuerstchenError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a name with a zero byte
        raise WuerstchenError(f"{path}: not a name that a file can have ({error})") from error


def is_there(path: Path) -> bool:
    """Whether there is anything of that name. Raises WuerstchenError where that cannot be told."""
    try:
        file_status(path)
    except WuerstchenError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return False
        raise
    return True


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Stored:
    """The bytes of a tensor, from the first that it uses. `crc`, if known, is that of all of them."""

    file: RegularFile
    offset: int
    crc: int | None = None

    def read(self, outline: Tensor) -> Tensor:
        """The tensor that `outline` describes: its shape, strides and dtype."""
        if outline.numel() == 0:
            return torch.empty(outline.shape, dtype=outline.dtype)
        elements = span(outline)
        try:
            content = torch.empty(elements * outline.dtype.itemsize, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise WuerstchenError(f"{self.file.path}: there is not enough memory for it") from error
        view = memoryview(content.numpy())
        self.file.read_into(view, self.offset)
        if self.crc is not None and zlib.crc32(view) != self.crc:
            raise WuerstchenError(f"{self.file.path}: damaged: its content is not that of its checksum; fetch it again")
        tensor = content.view(outline.dtype).as_strided(outline.shape, outline.stride())
        return tensor if elements == outline.numel() else tensor.contiguous()


def span(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor that is not empty."""
    return 1 + sum((side - 1) * stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_name(path: Path, name: str) -> str:
    """Raises WuerstchenError for a name that no tensor has: the work for a name grows with its length."""
    if len(name) > LONGEST_NAME:
        raise WuerstchenError(f"{path}: not a model: a tensor's name has {len(name):,} letters ({name[:60]}…)")
    return name


def json_object(source: object, text: str | bytearray) -> dict:
    """The object that JSON text, in UTF-8, holds. Raises WuerstchenError, which begins with `source`."""
    try:
        text = text if isinstance(text, str) else text.decode()
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise WuerstchenError(f"{source} is nested too deeply for any configuration") from error
    except ValueError as error:
        raise WuerstchenError(f"{source} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise WuerstchenError(f"{source} is not a JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice} is in it twice")
    return content
