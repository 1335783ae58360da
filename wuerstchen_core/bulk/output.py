"""Where pictures go: a folder, or shards in webdataset's format; each file is there whole or not at all."""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util.atomic import replacing
from ..util.errors import WuerstchenError, readable
from ..workflow import png
from .lines import SETTINGS, BadLine, Line

SHARDS = re.compile(r"(?P<before>.*)\{(?P<first>\d+)\.\.\}(?P<after>[^{}/\\]*\.tar)")
ERRORS = "errors.jsonl"
KEY = "wuerstchen"  # of a latent's metadata
LATENT, PICTURE, PREVIEW = ".safetensors", ".png", ".preview.png"


class Folder:
    """NAME.png of every line; NAME.safetensors and NAME.preview.png instead where Stage C is the last to draw."""

    def __init__(self, folder: Path, latents: bool = False):
        self.folder, self.latents = folder, latents
        folder.mkdir(parents=True, exist_ok=True)
        self._left = list(folder.glob(".*.partial"))

    def has(self, line: Line) -> bool:
        return (self.folder / f"{line.name}{LATENT if self.latents else PICTURE}").exists()

    def begin(self, lines: Sequence[Line]) -> None:
        """Deletes what a process that was killed has left of these pictures, which nobody else draws."""
        names = {f"{line.name}{ending}"[:40] for line in lines for ending in (LATENT, PICTURE, PREVIEW)}
        for left in self._left:
            if left.name[1:].rsplit(".", 2)[0] in names:
                shutil.rmtree(left, ignore_errors=True)

    def write(self, line: Line, picture: Tensor, told: dict, graph) -> None:
        """picture (H, W, 3) in [0, 1], or the preview of one"""
        path = self.folder / f"{line.name}{PREVIEW if self.latents else PICTURE}"
        if not path.exists():
            png.write(picture, path, told, graph)

    def write_latent(self, line: Line, latent: Tensor, told: dict) -> None:
        """latent (16, p, q) of Stage C"""
        path = self.folder / f"{line.name}{LATENT}"
        if path.exists():
            return
        metadata = {KEY: json.dumps({**told, "index": line.index, "loras": line.loras})}
        with replacing(path) as partial:
            save_file({"latent": latent.contiguous().cpu()}, partial, metadata=metadata)


class Shards:
    """`shards/{000000..}.tar`: NAME.png, NAME.txt (the prompt) and NAME.json (the settings) of a block each.

    The pictures of a shard lie in a hidden folder beside it until the last one is there.
    """

    def __init__(self, pattern: str):
        parts = SHARDS.fullmatch(pattern)
        if parts is None:
            raise WuerstchenError(
                f"--out is {readable(pattern, 100)}: shards are named with their first number, such as "
                "'shards/{000000..}.tar'"
            )
        self.before, self.first, self.after = parts["before"], parts["first"], parts["after"]
        self.folder = self.path(0).parent
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, block: int) -> Path:
        return Path(f"{self.before}{int(self.first) + block:0{len(self.first)}}{self.after}")

    def begin(self, block: int) -> bool:
        """Whether the shard is there; what a process that was killed has left of it goes."""
        path = self.path(block)
        for left in path.parent.glob(f".{path.name[:40]}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        if path.exists():
            shutil.rmtree(self._hidden(block), ignore_errors=True)
        return path.exists()

    def _hidden(self, block: int) -> Path:
        return self.path(block).with_name(f".{self.path(block).stem}.parts")

    def parts(self, block: int) -> Folder:
        return Folder(self._hidden(block))

    def pack(self, block: int, lines: Iterable[Line]) -> None:
        """Makes the shard of the pictures in its folder, which goes."""
        parts = self.parts(block)
        with replacing(self.path(block)) as partial, tarfile.open(partial, "w") as archive:
            for line in lines:
                picture = parts.folder / f"{line.name}{PICTURE}"
                if picture.exists():
                    _add(archive, f"{line.name}.png", picture.read_bytes())
                    _add(archive, f"{line.name}.txt", line.settings["prompt"].encode())
                    _add(archive, f"{line.name}.json", json.dumps(dict(line.settings)).encode())
        shutil.rmtree(parts.folder, ignore_errors=True)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, io.BytesIO(content))


class Errors:
    """`errors.jsonl`, a line for each picture that could not be drawn; of several processes, each has its own file."""

    def __init__(self, folder: Path, rank: int, world: int):
        self.path = folder / (ERRORS if world == 1 else f"errors-{rank + 1}-of-{world}.jsonl")
        self.path.unlink(missing_ok=True)
        self.count = 0

    def add(self, line: Line | BadLine, reason: object) -> None:
        self.count += 1
        told: dict[str, Any] = {"line": line.number, "index": line.index, "error": str(reason)}
        if isinstance(line, Line):
            told |= {"id": line.name, "prompt": line.settings["prompt"]}
        elif line.content is not None:
            told["content"] = line.content
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(told, default=str) + "\n")


def read_latents(folder: Path, picked: set[str] | None, changes: dict[str, Any]) -> Iterable[Line]:
    """The latents of a folder that `Folder.write_latent` wrote, by their index; `changes` to their settings.

    Raises WuerstchenError if one is none of these, if there is none, or one that is picked is missing.
    """
    found = []
    for path in folder.glob(f"*{LATENT}"):
        if picked is None or path.stem in picked:
            found.append(_read(path, changes))
    if picked and (missing := sorted(picked - {line.name for line in found})):
        raise WuerstchenError(f"{folder}: there is no {missing[0]}{LATENT}, which --pick names")
    if not found:
        raise WuerstchenError(f"{folder}: there are no latents (NAME{LATENT}) as --until stage-c writes them")
    return sorted(found, key=lambda line: (line.index, line.name))


def _read(path: Path, changes: dict[str, Any]) -> Line:
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()[KEY])
        index, loras = told.pop("index"), tuple(told.pop("loras", ()))
        settings = {name: value for name, value in told.items() if name in ("prompt", *SETTINGS)} | changes
        settings["distilled"] = "distilled" in told
        settings["cfg_interval"] = tuple(settings["cfg_interval"])
        return Line(index, index + 1, path.stem, settings, loras, path)
    except Exception as error:  # of a damaged file safetensors raises its own
        raise WuerstchenError(f"{path}: not a latent as --until stage-c writes it") from error


def load_latent(path: Path) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latent").to(torch.float32)
