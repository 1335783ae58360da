"""PyTorch's files: a zip of a pickle and of one record per storage, or all in one stream, as it was before 1.6.

PyTorch's own restricted unpickler reads the pickle, which runs no code. Of a zip it is given storages without memory;
their records are read when a tensor is.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# torch.load's, which reads tensors and plain containers only. It is used by itself since torch.load maps or copies
# every storage of a file.
from torch._weights_only_unpickler import Unpickler

from ..util.errors import WuerstchenError, first_line
from .stored import RegularFile, Stored, check_name, span

SAFE_TORCH = (2, 10)  # before it files could run code (CVE-2025-32434) or write beyond a tensor (CVE-2026-24747)
LARGEST_PICKLE = 8 << 20  # bytes: a checkpoint with its optimizer has about 1 MB
BYTES_PER_ENTRY = 4  # of a dictionary, at least; more entries than that are the same ones over and over


def refuse_old_torch(path: Path) -> None:
    """Raises WuerstchenError where this PyTorch is not safe with files from strangers."""
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_TORCH:
        raise WuerstchenError(
            f"{path}: PyTorch files may run code or corrupt memory before torch {'.'.join(map(str, SAFE_TORCH))}, and "
            f"this is torch {torch.__version__}: use the safetensors file, or convert this one elsewhere"
        )


def read_zip(file: RegularFile) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """The tensors on the meta device and where their bytes are, by name.

    Raises WuerstchenError where the file is cut short, damaged, compressed, carries code or asks for more than it has.
    """
    refuse_old_torch(file.path)
    records = _Records(file)
    pickled = records.content("data.pkl", LARGEST_PICKLE)
    if records.content("byteorder", 16, b"little") != b"little":
        raise WuerstchenError(f"{file.path}: its numbers are stored the other way round (big-endian): save it again")
    unpickler = Unpickler(io.BytesIO(pickled), encoding="utf-8")
    unpickler.persistent_load = records.storage  # type: ignore[method-assign]
    try:
        tensors = _unpickled(file.path, unpickler.load, limit=len(pickled) // BYTES_PER_ENTRY)
    finally:  # torch keeps what is sparse for the end of its own `load`: the next one in this process would meet it
        torch._utils._sparse_tensors_to_validate.clear()
    stored = {}
    for name, tensor in tensors.items():
        record = records.of(tensor)
        if record is not None and _is_plain(tensor):
            first = int(tensor.storage_offset()) * tensor.dtype.itemsize
            size = span(tensor) * tensor.dtype.itemsize if tensor.numel() else 0
            if first + size > record.size:
                raise WuerstchenError(f"{file.path}: damaged: {name} reaches beyond the bytes that are there for it")
            stored[name] = Stored(file, record.start + first, record.crc if size == record.size else None)
    return tensors, stored


def read_stream(file: RegularFile) -> dict[str, Tensor]:
    """The tensors of a file from before the zip format, in memory. Raises WuerstchenError as `read_zip` does."""
    refuse_old_torch(file.path)
    limit = min(file.size, LARGEST_PICKLE) // BYTES_PER_ENTRY
    tensors = _unpickled(file.path, lambda: torch.load(file.path, map_location="cpu", weights_only=True), limit)
    if sum(tensor.numel() for tensor in tensors.values() if _is_plain(tensor)) > file.size:
        raise WuerstchenError(f"{file.path}: damaged: its tensors have more values than the file has bytes")
    return tensors


def _unpickled(path: Path, load: Callable[[], object], limit: int) -> dict[str, Tensor]:
    try:
        return dict(_flattened(path, load(), limit))
    except WuerstchenError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        code = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error)[:1000])
        if code:
            raise WuerstchenError(
                f"{path}: it carries code or Python objects ({code[1]}) where only tensors belong; none of it was run"
            ) from error
        raise WuerstchenError(
            f"{path}: not a whole PyTorch file, cut short or damaged ({first_line(error)})"
        ) from error


def _flattened(path: Path, content: object, limit: int) -> Iterator[tuple[str, Tensor]]:
    """Nested dictionaries joined with dots, in their order. `limit`: how many entries they can have between them."""
    waiting: list[tuple[str, object]] = [("", content)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, Tensor):
            if prefix:
                yield prefix, value.detach()
        elif isinstance(value, Mapping):
            limit -= len(value)
            if limit < 0:
                raise WuerstchenError(f"{path}: its dictionaries repeat or hold each other without end: not a model")
            inner = [
                (check_name(path, f"{prefix}.{key}" if prefix else str(key)), item)
                for key, item in value.items()
                if isinstance(item, Tensor | Mapping)
            ]
            waiting.extend(reversed(inner))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


@dataclass(frozen=True)
class _Record:
    start: int
    size: int
    crc: int | None


class _Records:
    """The records of a zip, none of them compressed, and the storages that the pickle has asked for."""

    def __init__(self, file: RegularFile):
        self.file = file
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.asked: dict[int, _Record] = {}  # by the storage that stands for it
        try:
            with zipfile.ZipFile(file.path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, OverflowError, NotImplementedError) as error:
            raise self._damaged(first_line(error)) from error
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) < len(entries):
            raise self._damaged("a record is in it twice")
        for entry in entries:
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or entry.flag_bits & 1
                or entry.file_size != entry.compress_size
            ):
                raise self._damaged(f"{entry.filename} is compressed, which PyTorch's records never are")
        roots = [name[: -len("data.pkl")] for name in self.entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise self._damaged(f"it has {len(roots)} records data.pkl where one belongs")
        self.root = roots[0]
        if f"{self.root}constants.pkl" in self.entries:
            raise WuerstchenError(f"{file.path}: a program (TorchScript), where only tensors belong")

    def _damaged(self, why: str) -> WuerstchenError:
        return WuerstchenError(f"{self.file.path}: not a whole PyTorch file, cut short or damaged ({why})")

    def _record(self, name: str) -> _Record | None:
        entry = self.entries.get(self.root + name)
        if entry is None:
            return None
        head = self.file.read(entry.header_offset, 30) if entry.header_offset + 30 <= self.file.size else b""
        if head[:4] != b"PK\x03\x04":
            raise self._damaged(f"{entry.filename} is not where it should be")
        start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:], "little")
        if start + entry.file_size > self.file.size:
            raise self._damaged(f"{entry.filename} reaches beyond the end of the file")
        return _Record(start, entry.file_size, entry.CRC or None)  # 0: torch.save was told to leave it out

    def content(self, name: str, largest: int, default: bytes | None = None) -> bytes:
        record = self._record(name)
        if record is None and default is not None:
            return default
        if record is None or record.size > largest:
            raise WuerstchenError(
                f"{self.file.path}: not a PyTorch file of weights: its {name} is missing or too large"
            )
        outline = torch.empty(record.size, dtype=torch.uint8, device="meta")
        return Stored(self.file, record.start, record.crc).read(outline).numpy().tobytes()

    def storage(self, asked: tuple):
        """What the pickle calls a storage: its size, and no memory."""
        word, kind, key, _, count = asked
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        record = self._record(f"data/{key}")
        if word != "storage" or type(count) is not int or record is None or count * dtype.itemsize != record.size:
            raise ValueError(f"its storage {key} is missing or of another size")
        if key not in self.storages:
            self.storages[key] = torch.UntypedStorage(record.size, device="meta")
            self.asked[self.storages[key]._cdata] = record
        return torch.storage.TypedStorage(wrap_storage=self.storages[key], dtype=dtype, _internal=True)

    def of(self, tensor: Tensor) -> _Record | None:
        """The record of a tensor's storage; None for one that has none."""
        try:
            return self.asked.get(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):
            return None
