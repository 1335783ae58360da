"""The data set that the embedded model is trained on: emoji drawn from vector files, with names and keywords.

The pictures are Microsoft's Fluent Emoji in two styles, shaded and flat (MIT), and Google's Noto Emoji (Apache-2.0), as
packed by Iconify; the words are emojibase's (MIT), which are those of Unicode's CLDR. All of them come from npm.
"""

import io
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..util.errors import WuerstchenError

PACKAGES = {
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "emojibase-data": "17.0.0",
}
STYLES = {
    "fluent": "@iconify-json/fluent-emoji",
    "noto": "@iconify-json/noto",
    "flat": "@iconify-json/fluent-emoji-flat",
}

# Icons of Fluent, shaded and flat, whose names are not the slugs of today's CLDR names.
FLUENT_ICONS = {
    "black bird": "blackbird",
    "deaf man": "man-deaf",
    "deaf person": "person-deaf",
    "deaf woman": "woman-deaf",
    "elf": "person-elf",
    "enraged face": "pouting-face",
    "face with crossed-out eyes": "knocked-out-face",
    "fairy": "person-fairy",
    "genie": "person-genie",
    "keycap: #": "keycap-hashtag",
    "keycap: *": "keycap-asterisk",
    "mage": "person-mage",
    "man: blond hair": "man-blonde-hair",
    "men with bunny ears": "man-with-bunny-ears",
    "men wrestling": "man-wrestling",
    "mermaid": "woman-merpeople",
    "merman": "man-merpeople",
    "merperson": "person-merpeople",
    "people with bunny ears": "person-with-bunny-ears",
    "people wrestling": "person-wrestling",
    "person: blond hair": "person-blonde-hair",
    "phoenix": "phoenix-bird",
    "piñata": "piata",
    "red triangle pointed up": "red-triangle",
    "smiling face with open hands": "hugging-face",
    "superhero": "person-superhero",
    "supervillain": "person-supervillain",
    "vampire": "person-vampire",
    "woman: blond hair": "woman-blonde-hair",
    "women with bunny ears": "woman-with-bunny-ears",
    "women wrestling": "woman-wrestling",
    "zombie": "person-zombie",
}

COMPONENTS = 2  # emojibase's group of skin tones and hair styles, which are no pictures of their own

COLOURS = {  # sRGB; far enough from one another, and from white, that jitter leaves a colour its name
    "red": (0.88, 0.12, 0.14),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.88, 0.15),
    "green": (0.18, 0.65, 0.22),
    "blue": (0.14, 0.36, 0.90),
    "purple": (0.52, 0.18, 0.68),
    "pink": (1.00, 0.60, 0.75),
    "brown": (0.47, 0.28, 0.13),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.55, 0.55, 0.55),
    "teal": (0.00, 0.50, 0.50),
    "cyan": (0.25, 0.88, 0.95),
    "navy": (0.06, 0.09, 0.36),
    "beige": (0.93, 0.86, 0.70),
}
COLOUR_JITTER = 0.05

SCALE = 13 / 16  # an emoji's side in a plain picture, as a share of the picture's
SIZES = {"tiny": (0.30, 0.36), "small": (0.46, 0.54), "big": (0.95, 0.99)}  # the range of that share

PLACES = {  # (x, y) as shares of the room that a small emoji can move in
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
PLACE_JITTER = 0.12


@dataclass(frozen=True)
class Description:
    """What a picture shows. `None` stands for the plain picture's: white, the standard size, the centre."""

    name: str
    keywords: tuple[str, ...]
    style: str
    background: str | None = None
    size: str | None = None
    place: str | None = None


class EmojiSet:
    """The data set that `build` wrote: `len(emoji)` emoji to draw pictures of.

    Raises `WuerstchenError` if `folder` holds no such data set.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            contents = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
            self.sources: list[dict] = contents["sources"]
            self.entries: list[dict] = contents["emoji"]
            self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise WuerstchenError(f"no emoji data set in {folder}: {error}") from error
        if self.pictures.ndim != 4 or len(self.pictures) != len(self.entries):
            raise WuerstchenError(f"the emoji data set in {folder} is damaged: build it again")

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def size(self) -> int:
        """The side of every picture, in pixels."""
        return self.pictures.shape[1]

    def plain(self, i: int) -> Tensor:
        """Emoji `i` at the standard size in the middle of white: (3, size, size) in [0, 1]."""
        return self.compose(i)

    def compose(
        self,
        i: int,
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        scale: float = SCALE,
        centre: tuple[float, float] = (0.5, 0.5),
    ) -> Tensor:
        """Emoji `i` over a background of one colour: (3, size, size) in [0, 1], sRGB.

        `background` is in [0, 1]; `scale`, in (0, 1], is the emoji's side and `centre` the (x, y) of its middle, as
        shares of the picture's side. An emoji that would stick out is moved inside.
        """
        side = max(1, round(scale * self.size))
        left, top = (min(max(round(c * self.size - side / 2), 0), self.size - side) for c in centre)
        emoji = torch.from_numpy(np.array(self.pictures[i])).permute(2, 0, 1)
        emoji = F.interpolate(emoji[None], size=(side, side), mode="bilinear", antialias=True)[0].float() / 255

        picture = torch.tensor(background, dtype=torch.float32).view(3, 1, 1).repeat(1, self.size, self.size)
        covered = picture[:, top : top + side, left : left + side]
        covered.mul_(1 - emoji[3]).add_(emoji[:3]).clamp_(0, 1)
        return picture

    def draw(self, i: int, generator: random.Random) -> tuple[Tensor, Description]:
        """A picture of emoji `i`, (3, size, size) in [0, 1], and its description, as `arrange` has it."""
        description, arrangement = self.arrange(i, generator)
        return self.compose(i, **arrangement), description

    def describe(self, i: int) -> Description:
        """What the plain picture of emoji `i` shows."""
        entry = self.entries[i]
        return Description(entry["name"], tuple(entry["keywords"]), entry["style"])

    def arrange(self, i: int, generator: random.Random, plain: float = 0.5) -> tuple[Description, dict]:
        """What a random picture of emoji `i` shows, and the arguments of `compose` for it; a share `plain` is plain.

        The others have a coloured background, another size or both; the smaller ones may have another place.
        """
        if generator.random() < plain:
            return self.describe(i), {}

        coloured, resized = False, False
        while not (coloured or resized):
            coloured, resized = generator.random() < 0.7, generator.random() < 0.4
        background, size, place = None, None, None
        colour: tuple[float, ...] = (1.0, 1.0, 1.0)
        scale = SCALE
        centre: tuple[float, ...] = (0.5, 0.5)
        if coloured:
            background = generator.choice(list(COLOURS))
            jitter = [generator.uniform(-COLOUR_JITTER, COLOUR_JITTER) for _ in range(3)]
            colour = tuple(min(max(c + j, 0.0), 1.0) for c, j in zip(COLOURS[background], jitter, strict=True))
        if resized:
            size = generator.choice(list(SIZES))
            scale = generator.uniform(*SIZES[size])
        if size in ("tiny", "small") and generator.random() < 0.6:
            place = generator.choice(list(PLACES))
            shares = [p + generator.uniform(-PLACE_JITTER, PLACE_JITTER) for p in PLACES[place]]
            centre = tuple(scale / 2 + min(max(s, 0.0), 1.0) * (1 - scale) for s in shares)
        arrangement = {"background": colour, "scale": scale, "centre": centre}
        return replace(self.describe(i), background=background, size=size, place=place), arrangement


def build(folder: str | Path, size: int = 256, progress: Callable[[int, int], None] | None = None) -> None:
    """Build the data set: install the packages with npm, draw every emoji, write the result to `folder`.

    Written are `pictures.npy`, (N, size, size, 4) uint8 RGBA with premultiplied alpha, and `emoji.json`,
    {"sources": [{"package", "version", "license"}], "emoji": [{"name", "keywords", "style", "emoji"}]}.
    `progress` is called with the number of pictures drawn and of all. The folder appears when it is complete.

    Raises `WuerstchenError` if the folder is in use, npm or resvg_py is missing, the packages cannot be
    installed, or an emoji cannot be drawn.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WuerstchenError(f"{folder} exists already: name a new or an empty folder")
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise WuerstchenError(
            f"drawing emoji needs resvg_py, which could not be imported ({reason}): pip install resvg-py"
        ) from error

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        packages, result = Path(temporary, "packages"), Path(temporary, "result")
        install(packages)
        result.mkdir()
        write(result, packages / "node_modules", size, progress)
        if folder.exists():
            folder.rmdir()
        result.rename(folder)


def install(folder: Path) -> None:
    """Install `PACKAGES` into `folder`/node_modules with npm. Raises `WuerstchenError`."""
    npm = shutil.which("npm")
    if npm is None:
        raise WuerstchenError("building the emoji data set needs npm: install Node.js, which brings it")
    names = [f"{name}@{version}" for name, version in PACKAGES.items()]
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run([npm, "install", "--prefix", folder, *options, *names], capture_output=True, text=True)
    if done.returncode:
        lines = re.findall(r"^npm (?:error|ERR!) (.*)", done.stderr, re.MULTILINE) or [f"exit code {done.returncode}"]
        raise WuerstchenError(f"npm could not install the emoji packages: {'; '.join(lines[:3])}")


def write(folder: Path, packages: Path, size: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Draw the emoji of the packages installed in `packages` and write the data set's two files to `folder`."""
    entries, svgs = collect(packages)
    pictures = np.lib.format.open_memmap(folder / "pictures.npy", "w+", np.uint8, (len(svgs), size, size, 4))
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            for i, picture in enumerate(pool.map(render, svgs, [size] * len(svgs), chunksize=8)):
                if not picture[..., 3].mean() > 1:
                    raise WuerstchenError(f"the {entries[i]['style']} emoji {entries[i]['name']!r} came out empty")
                pictures[i] = picture
                if progress:
                    progress(i + 1, len(svgs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    pictures.flush()

    sources = [json.loads((packages / name / "package.json").read_text(encoding="utf-8")) for name in PACKAGES]
    sources = [{"package": s["name"], "version": s["version"], "license": s["license"]} for s in sources]
    contents = json.dumps({"sources": sources, "emoji": entries}, ensure_ascii=False, indent=1)
    (folder / "emoji.json").write_text(contents, encoding="utf-8")


def collect(packages: Path) -> tuple[list[dict], list[str]]:
    """The data set's entries and the SVG of each, without skin tones, so that a style has a name once only."""
    emoji = json.loads((packages / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    entries, svgs = [], []
    for style, package in STYLES.items():
        icons = json.loads((packages / package / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((packages / package / "chars.json").read_text(encoding="utf-8"))
        chars = {_code(code): name for code, name in chars.items()}
        taken = set()
        for e in sorted(emoji, key=lambda e: e.get("order", len(emoji))):
            name = words(e["label"])
            icon = chars.get(_code(e["hexcode"])) or FLUENT_ICONS.get(e["label"]) or _slug(e["label"])
            svg = icon_svg(icons, icon)
            if svg is None or name in taken or e.get("group") == COMPONENTS:
                continue
            taken.add(name)
            keywords = [words(tag) for tag in e.get("tags", [])]
            keywords = [k for k in dict.fromkeys(keywords) if k and k != name]
            entries.append({"name": name, "keywords": keywords, "style": style, "emoji": e["emoji"]})
            svgs.append(svg)
    return entries, svgs


def words(label: str) -> str:
    """A CLDR name as one would type it: "kiss: woman, man" is "kiss woman man", "piñata" is "pinata"."""
    label = unicodedata.normalize("NFKD", label.replace("’", "'").replace("–", "-").replace(".", ""))
    label = label.encode("ascii", "ignore").decode().lower()
    label = re.sub(r"[^a-z0-9#*!?%&+'-]+", " ", label)
    return " ".join(word for word in label.split() if word != "-")


def icon_svg(icons: dict, name: str) -> str | None:
    """The icon `name` of an Iconify pack as an SVG document, or `None` if the pack has none.

    Source: https://iconify.design/docs/types/iconify-json.html
    """
    flipped = False
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or not alias.keys() <= {"parent", "hFlip", "hidden"}:
            return None
        flipped ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(k, icons.get(k, default)) for k, default in defaults.items())
    body = icon["body"]
    if flipped:
        body = f'<g transform="matrix(-1 0 0 1 {2 * left + width} 0)">{body}</g>'
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{left} {top} {width} {height}">{body}</svg>'


def render(svg: str, size: int) -> np.ndarray:
    """Draw an SVG document, centred in a square: (size, size, 4) uint8 RGBA with premultiplied alpha."""
    import resvg_py

    # Fluent's filters cut their shapes out with hard edges: drawn at twice the size and averaged, edges are smooth.
    svg = svg.replace("<svg ", f'<svg width="{2 * size}" height="{2 * size}" ', 1)
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    except ValueError as error:
        raise WuerstchenError(f"an emoji could not be drawn: {error}") from error
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32)
    picture[..., :3] *= picture[..., 3:] / 255
    return picture.reshape(size, 2, size, 2, 4).mean((1, 3)).round().astype(np.uint8)


def _code(hexcode: str) -> str:
    return hexcode.upper().replace("-FE0F", "")


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words(label).replace("'", "")).strip("-")
