"""PNG files that carry how they were drawn, as ComfyUI's do.

The text keys "workflow" (the page's graph) and "prompt" (the API's) are ComfyUI's: dropped on its page, the picture
opens as the graph that draws it. "wuerstchen" holds our settings as JSON, "Description" is for people.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.stored import json_object
from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from ..util.pictures import texts_of
from .graph import Graph
from .reading import Asked, settings_of_graph, settings_of_record

LONGEST = 8 * 2**20  # letters of a graph


def write(picture, path: Path, told: Mapping, graph: Graph) -> None:
    """picture (H, W, 3) in [0, 1] -> PNG, whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("workflow", json.dumps(graph.page()))
    info.add_text("prompt", json.dumps(graph.api()))
    info.add_text("wuerstchen", json.dumps(told))
    info.add_itxt("Description", _readable(told).encode("utf-8", "backslashreplace").decode())
    image = Image.fromarray((picture.cpu() * 255).round().byte().numpy())
    try:
        with replacing(path) as partial:
            image.save(partial, format="PNG", pnginfo=info)
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error


def _readable(told: Mapping) -> str:
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value for name, value in told.items()
    }
    return "\n".join(
        [told["prompt"], *(f"{name}: {value}" for name, value in shown.items() if name != "prompt" and value != "")]
    )


def read(path: str | Path) -> Asked:
    """What a PNG file says of how it was drawn: one of `write`'s, or one that ComfyUI drew with our nodes.

    Raises:
        WuerstchenError: it is no such file, says nothing of it, or what it says cannot be done by `generate`.
    """
    texts = texts_of(path)
    for key, settings_of in (("wuerstchen", settings_of_record), ("prompt", settings_of_graph)):
        if key in texts:
            if len(texts[key]) > LONGEST:
                raise WuerstchenError(f"{path}: its text {key!r} has {len(texts[key]):,} letters: no graph is as long")
            return settings_of(json_object(f"{path}: its text {key!r}", texts[key]), str(path))
    raise WuerstchenError(f"{path}: nothing in it says how it was drawn (texts: {', '.join(texts) or 'none'})")
