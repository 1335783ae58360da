"""The safetensors format: the length of a header, the header as JSON, the tensors' bytes one after another."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..util.errors import WuerstchenError
from .stored import RegularFile, Stored, json_object

LARGEST_HEADER = 32 << 20  # bytes; 100,000 names take about a third
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(file: RegularFile) -> tuple[dict[str, Tensor], dict[str, Stored], dict[str, str]]:
    """The tensors on the meta device and where their bytes are, by name, and the metadata.

    Raises WuerstchenError where the header does not describe the whole file, byte by byte and each once.
    """
    damaged = f"{file.path}: not a whole safetensors file, cut short or damaged"
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(LARGEST_HEADER, file.size - 8):
        raise WuerstchenError(f"{damaged} (its header would have {length:,} bytes)")
    header = json_object(f"{damaged}: its header", file.read(8, length))
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WuerstchenError(f"{damaged} (its metadata are not names and texts)")
    entries = {name: _entry(damaged, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise WuerstchenError(f"{damaged} (the bytes of {name} do not begin where those before it end)")
        end = stop
    if 8 + length + end != file.size:
        raise WuerstchenError(f"{damaged} ({file.size:,} bytes, and its header tells of {8 + length + end:,})")
    outlines = {name: outline for name, (outline, _, _) in entries.items()}
    stored = {name: Stored(file, 8 + length + start) for name, (_, start, _) in entries.items()}
    return outlines, stored, metadata


def _entry(damaged: str, name: str, entry: object) -> tuple[Tensor, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WuerstchenError(f"{damaged} ({name} is not described by dtype, shape and data_offsets)")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise WuerstchenError(f"{damaged}, or of a dtype that is not supported ({name} is {kind})")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise WuerstchenError(f"{damaged} (the shape or the offsets of {name} are no sizes)")
    dtype = DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise WuerstchenError(f"{damaged} ({name} does not have the bytes of its shape)")
    try:
        return torch.empty(shape, dtype=dtype, device="meta"), *offsets
    except (RuntimeError, TypeError, OverflowError) as error:  # sides beyond all counting, next to one that is zero
        raise WuerstchenError(f"{damaged} ({name} has the shape {shape})") from error


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes tensors, contiguous and on the CPU, to `path`, one after another; the umask decides who may read it.

    With `read` they are outlines, and `read(name)` gives the values when their turn comes.
    """
    header: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    by_alignment = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in by_alignment:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in by_alignment:
            if tensor.numel():
                values = tensor if read is None else read(name)
                file.write(values.view(-1).view(torch.uint8).numpy().data)
