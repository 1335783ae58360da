"""What a file of weights is, in words: `wuerstchen inspect`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ..util.errors import one_line
from .archive import open_archive
from .layouts import foreign
from .load import empty, parts, shapes
from .lora import describe_lora, is_lora
from .mapping import sources


def describe(path: str | Path) -> Iterator[str]:
    """What a file holds, one line per fact.

    Its format, then of every network its loader, configuration, size and dtype; of a LoRA its modules and ranks, the
    width of the Stage C that it is for, and what is left out of it.

    No line has control characters. Raises WuerstchenError as the loaders do; the weights of networks are not read.
    """
    return map(one_line, _facts(path))


def _facts(path: str | Path) -> Iterator[str]:
    archive = open_archive(path)
    head = f"{archive.path}: {archive.format}, {archive.size / 1e6:,.1f} MB"
    if is_lora(archive):
        yield from (head, *describe_lora(archive))
        return
    found = parts(archive)
    yield head
    beside = foreign(archive, tuple(part.prefix for part in found.values()))
    if beside:
        yield f"beside the following: {beside}"
    for kind, part in found.items():
        network = empty(archive, part)
        read = [source for source in sources(archive, part, shapes(network)).values() if source]
        used = [archive.tensors[name] for source in read for name in source.names]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in used if tensor.is_floating_point()})
        yield f"{kind}: load_{kind} takes it"
        yield f"  layout         {part.layout}" + (f", under {part.prefix.rstrip('.')}" if part.prefix else "")
        yield f"  parameters     {sum(parameter.numel() for parameter in network.parameters()):,}"
        yield f"  dtype          {', '.join(dtypes)}"
        for field, value in dataclasses.asdict(part.config).items():
            yield f"  {field:<14} {value}"
