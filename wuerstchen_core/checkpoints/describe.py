"""What a file of weights is, in words: `wuerstchen inspect`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ..util.errors import one_line
from .archive import Archive, members, open_archive
from .layouts import foreign
from .load import empty, parts, shapes
from .lora import describe_lora, is_lora
from .mapping import sources


def describe(path: str | Path) -> Iterator[str]:
    """What a file holds, one line per fact; of a bundle that of each file in it.

    Its format, then of every network its loader, configuration, size and dtype; of a LoRA its modules and ranks, the
    width of the Stage C that it is for, and what is left out of it.

    No line has control characters. Raises WuerstchenError as the loaders do; the weights of networks are not read.
    """
    return map(one_line, _facts(path))


def _facts(path: str | Path) -> Iterator[str]:
    archive = open_archive(path)
    head = f"{archive.path}: {archive.format}, {archive.size / 1e6:,.1f} MB"
    bundled = members(archive)
    if not bundled:
        facts = list(_facts_within(archive))
        yield from (head, *facts)
        return
    yield f"{head}, a bundle of {', '.join(bundled)}"
    for name in bundled:
        yield f"{name}:"
        yield from (f"  {fact}" for fact in _facts_within(open_archive(archive.path / name)))


def _facts_within(archive: Archive) -> Iterator[str]:
    if is_lora(archive):
        yield from describe_lora(archive)
        return
    found = parts(archive)
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
