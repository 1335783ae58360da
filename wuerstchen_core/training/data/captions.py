"""Captions as trainers and data sets write them: text and JSON files beside the pictures, and metadata files."""

import csv
import json
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...util.errors import readable
from .files import check_regular, read_regular

TEXT_SUFFIXES = (".txt", ".caption")
JSON_SUFFIX = ".json"
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("caption", "text", "prompt")
PICTURE_KEYS = ("file_name", "image_path")
LARGEST = 1 << 20  # bytes of a caption's file

log = logging.getLogger(__name__)


def suffixes(key: str) -> tuple[str, ...]:
    """Endings of caption files in the order in which they are looked for: JSON first if its key is given."""
    return (JSON_SUFFIX, *TEXT_SUFFIXES) if key else (*TEXT_SUFFIXES, JSON_SUFFIX)


def decode(content: bytes) -> str:
    """The content of a text file -> the caption. Raises UnicodeDecodeError if it is not UTF-8."""
    return content.decode("utf-8-sig").strip()


def decode_json(content: bytes, key: str) -> str | None:
    """The content of a JSON file -> the caption in it, or None. Raises ValueError if it is no JSON, or no text."""
    record = _json(content)
    return of_record(record, key) if isinstance(record, dict) else None


def of_record(record: Mapping[str, Any], key: str) -> str | None:
    """The caption in a JSON object or a table's row: under `key`, or else under one of CAPTION_KEYS.

    Raises ValueError if it is not a text.
    """
    values = [record.get(name) for name in ((key,) if key else CAPTION_KEYS)]
    value = next((value for value in values if value is not None), None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("its caption is not a text")
    value.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    return value.strip()


class FolderCaptions:
    """The captions of the pictures in a folder, found by their keys: paths from the folder, with slashes.

    They are in NAME.txt or NAME.caption, NAME.jpg.txt or NAME.jpg.caption (in any case), in NAME.json, or in a
    metadata.jsonl or metadata.csv in the same folder or one above it, with a file_name on every line.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, list[str]]], key: str):
        """files: (folder, names) as `walk` gives them"""
        self.folder, self.key = folder, key
        self._names = {
            _lower_suffix(posixpath.join(inside, name)): name
            for inside, names in files
            for name in names
            if name.lower().endswith((*TEXT_SUFFIXES, JSON_SUFFIX))
        }
        self._metadata: dict[str, str] = {}
        for inside, names in sorted(files, key=lambda entry: _depth(entry[0]), reverse=True):
            for name in names:
                if name.lower() in METADATA:
                    for picture, caption in self._rows(posixpath.join(inside, name)):
                        self._metadata.setdefault(picture, caption)

    def find(self, picture: str) -> str | None:
        """The caption of a picture, or None. Raises ValueError or OSError if its file can't be read."""
        in_metadata = self._metadata.get(picture)
        if self.key and in_metadata is not None:
            return in_metadata
        for path in self._files(picture):
            content = read_regular(path, LARGEST)
            is_json = path.name.lower().endswith(JSON_SUFFIX)
            caption = decode_json(content, self.key) if is_json else decode(content)
            if caption is not None:
                return caption
        return in_metadata

    def has(self, picture: str) -> bool:
        """Whether the picture has a caption, be it an empty one or one that can't be read; text files aren't opened."""
        if picture in self._metadata:
            return True
        paths = list(self._files(picture))
        if any(path.name.lower().endswith(TEXT_SUFFIXES) for path in paths):
            return True
        try:
            return bool(paths) and self.find(picture) is not None
        except (OSError, ValueError):
            return True

    def _files(self, picture: str) -> Iterator[Path]:
        stem = posixpath.splitext(picture)[0]
        for suffix in suffixes(self.key):
            for beside in (picture, stem):
                name = self._names.get(beside + suffix)
                if name is not None:
                    yield self.folder / posixpath.dirname(picture) / name

    def _rows(self, metadata: str) -> Iterator[tuple[str, str]]:
        """(key of the picture, caption) of each row of a metadata file; what is wrong with others is reported."""
        path = self.folder / metadata
        read, faulty, first = 0, 0, ""
        try:
            check_regular(path)
            rows: Iterable[bytes | dict | None] = (
                _csv_rows(path) if metadata.lower().endswith(".csv") else _jsonl_rows(path)
            )
            for number, record in enumerate(rows, start=1):
                read = number
                try:
                    row = self._row(record, posixpath.dirname(metadata))
                    if row is not None:
                        yield row
                except ValueError as error:
                    faulty, first = faulty + 1, first or f"row {number}: {error}"
        except (OSError, ValueError, csv.Error) as error:
            faulty, first = faulty + 1, first or f"after {read} rows: {error}"
        if faulty:
            rows_are = "row" if faulty == 1 else "rows"
            log.warning("%s: %d %s can't be used; %s", readable(path, 150), faulty, rows_are, readable(first, 150))

    def _row(self, record: bytes | dict | None, inside: str) -> tuple[str, str] | None:
        if record is None:
            raise ValueError("it can't be read as CSV; a field may have 128 KiB")
        record = _json(record) if isinstance(record, bytes) else record
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        name = next((record[key] for key in PICTURE_KEYS if isinstance(record.get(key), str)), None)
        if name is None:
            raise ValueError("it has no file_name")
        caption = of_record(record, self.key)
        return None if caption is None else (self._picture(name, inside), caption)

    def _picture(self, name: str, inside: str) -> str:
        """The key of a picture that a metadata file in the folder `inside` calls `name`."""
        if os.path.isabs(name):
            return Path(os.path.relpath(name, self.folder)).as_posix()
        return posixpath.normpath(posixpath.join(inside, name.replace("\\", "/")))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def _jsonl_rows(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while line := file.readline(LARGEST):
            if line.strip():
                yield line


def _csv_rows(path: Path) -> Iterator[dict | None]:
    """The rows of a table, None for one that csv can't read, such as one with a field of 128 KiB."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield None


def _depth(folder: str) -> int:
    return len(folder.split("/")) if folder else 0


def _lower_suffix(path: str) -> str:
    stem, suffix = posixpath.splitext(path)
    return stem + suffix.lower()
