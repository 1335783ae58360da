"""JSON for people and programs."""

import json
from collections.abc import Mapping
from pathlib import Path

from .atomic import replacing
from .errors import WuerstchenError


def write_json(path: Path, content: Mapping) -> None:
    """Whole or not at all. Raises WuerstchenError if the file can't be written."""
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error
