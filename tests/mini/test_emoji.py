"""The emoji data set, built from tiny Iconify packs: no npm, no network."""

import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch

from wuerstchen_core.mini import emoji as data
from wuerstchen_core.mini.emoji import COLOUR_JITTER, COLOURS, PLACES, SIZES, EmojiSet
from wuerstchen_core.util.errors import WuerstchenError

SQUARE = '<path fill="{}" d="M0 0h32v32H0z"/>'
EMOJI = [
    {"label": "red circle", "hexcode": "1F534", "emoji": "🔴", "tags": ["Ball", "red circle", "red"], "order": 2},
    {"label": "enraged face", "hexcode": "1F621", "emoji": "😡", "tags": ["angry", "mad"], "order": 1},
    {"label": "piñata", "hexcode": "1FA85", "emoji": "🪅", "order": 3, "skins": [
        {"label": "piñata: light skin tone", "hexcode": "1FA85-1F3FB", "emoji": "🪅🏻"}]},
    {"label": "right arrow", "hexcode": "27A1-FE0F", "emoji": "➡️", "tags": ["a b", "♪"], "order": 4},
    {"label": "light skin tone", "hexcode": "1F3FB", "emoji": "🏻", "group": 2, "order": 5},
    {"label": "unknown to the packs", "hexcode": "1FFFF", "emoji": "?", "order": 6},
]  # fmt: skip
FLUENT = {
    "prefix": "fluent-emoji", "width": 32, "height": 32,
    "icons": {
        "red-circle": {"body": '<circle cx="16" cy="16" r="12" fill="#f00"/>'},
        "pouting-face": {"body": '<path fill="#0f0" fill-opacity=".5" d="M8 8h16v16H8z"/>'},
        "piata": {"body": '<path fill="#804020" d="M0 0h64v32H0z"/>', "width": 64},
        "left-arrow": {"body": '<path fill="#00f" d="M0 0h16v32H0z"/>'},
        "light-skin-tone": {"body": SQUARE.format("#fff")},
        "red-circle-light": {"body": SQUARE.format("#fff")},
    },
    "aliases": {"right-arrow": {"parent": "left-arrow", "hFlip": True}},
}  # fmt: skip
NOTO = {
    "prefix": "noto", "height": 32, "width": 32,
    "icons": {
        "disc": {"body": SQUARE.format("#c00")},
        "red-circle": {"body": SQUARE.format("#123")},  # a wrong picture under the right name: chars.json decides
        "pinata-light-skin-tone": {"body": SQUARE.format("#123")},
        "arrow": {"body": SQUARE.format("#00f")},
    },
}  # fmt: skip
FLAT = SQUARE.format("#ff8")
CHARS = {"1f534": "disc", "27a1": "arrow", "1fa85-1f3fb": "pinata-light-skin-tone"}


def write_packages(folder, fluent=FLUENT):
    modules = folder / "node_modules"
    flat = {"prefix": "fluent-emoji-flat", "width": 32, "height": 32, "icons": {"red-circle": {"body": FLAT}}}
    files = (
        {"icons.json": fluent, "chars.json": {}}, {"icons.json": NOTO, "chars.json": CHARS},
        {"icons.json": flat, "chars.json": {}}, {},
    )  # fmt: skip
    for package, contents in zip(data.PACKAGES, files, strict=True):
        (modules / package).mkdir(parents=True)
        about = {"name": package, "version": data.PACKAGES[package], "license": "MIT"}
        for name, value in {"package.json": about, **contents}.items():
            (modules / package / name).write_text(json.dumps(value))
    (modules / "emojibase-data/en").mkdir()
    (modules / "emojibase-data/en/data.json").write_text(json.dumps(EMOJI))


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "deep" / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "install", write_packages)
        seen = []
        data.build(folder, 64, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 7) for i in range(1, 8)]
    assert [path.name for path in folder.parent.iterdir()] == ["set"]
    return EmojiSet(folder)


def index(emoji, style, name):
    return [(e["style"], e["name"]) for e in emoji.entries].index((style, name))


def rgb(picture, x, y):
    return picture[:, y, x].tolist()


def test_entries(emoji):
    names = [(e["style"], e["name"]) for e in emoji.entries]
    fluent = ["enraged face", "red circle", "pinata", "right arrow"]
    assert names == [("fluent", n) for n in fluent] + [("noto", n) for n in ("red circle", "right arrow")] + [
        ("flat", "red circle")
    ]
    assert len(set(names)) == len(names) == len(emoji) == 7
    assert emoji.entries[1] == {"name": "red circle", "keywords": ["ball", "red"], "style": "fluent", "emoji": "🔴"}
    assert emoji.entries[3]["keywords"] == ["a b"]
    assert {s["package"]: s["version"] for s in emoji.sources} == data.PACKAGES
    assert emoji.pictures.dtype == np.uint8 and emoji.pictures.shape == (7, 64, 64, 4) and emoji.size == 64


def test_the_right_icon_in_the_right_channels(emoji):
    middle = emoji.pictures[:, 32, 32].tolist()
    assert middle[index(emoji, "fluent", "red circle")] == [255, 0, 0, 255]
    assert middle[index(emoji, "fluent", "pinata")] == [0x80, 0x40, 0x20, 255]
    assert middle[index(emoji, "flat", "red circle")] == [255, 255, 0x88, 255]
    assert middle[index(emoji, "noto", "red circle")] == [0xCC, 0, 0, 255]
    assert middle[index(emoji, "noto", "right arrow")] == [0, 0, 255, 255]
    arrow = emoji.pictures[index(emoji, "fluent", "right arrow")]  # an alias, mirrored
    assert arrow[32, 16].tolist() == [0, 0, 0, 0] and arrow[32, 48].tolist() == [0, 0, 255, 255]
    wide = emoji.pictures[index(emoji, "fluent", "pinata")][..., 3]  # 2:1, centred in the square
    assert wide[:16].max() == 0 and wide[16:48].min() == 255 and wide[48:].max() == 0


def test_alpha_is_premultiplied(emoji):
    assert (emoji.pictures[..., :3].max(-1) <= emoji.pictures[..., 3]).all()
    half = emoji.pictures[index(emoji, "fluent", "enraged face")][32, 32].tolist()
    assert half == pytest.approx([0, 128, 0, 128], abs=1)


def test_compose_is_exact(emoji):
    red, half = index(emoji, "fluent", "red circle"), index(emoji, "fluent", "enraged face")
    blue, gray = (0.0, 0.0, 1.0), (0.2, 0.4, 0.6)
    for scale in (1.0, 0.8125, 0.5):
        picture = emoji.compose(red, blue, scale)
        assert picture.shape == (3, 64, 64) and picture.dtype == torch.float32
        assert rgb(picture, 32, 32) == [1, 0, 0] and rgb(picture, 0, 0) == [0, 0, 1]
        blended = rgb(emoji.compose(half, gray, scale), 32, 32)
        assert blended == pytest.approx([0.1, 0.7, 0.3], abs=1.01 / 255)


def test_no_fringes(emoji):
    """Red over red stays red up to the edge, where straight alpha would leave a dark rim."""
    red = index(emoji, "fluent", "red circle")
    for scale in (1.0, 0.8125, 0.33):
        assert (emoji.compose(red, (1.0, 0.0, 0.0), scale)[0] > 1 - 1.5 / 255).all()
    between = emoji.compose(red, (0.0, 0.0, 1.0))
    assert (between.sum(0) - 1).abs().max() < 2 / 255


def test_plain(emoji):
    square = index(emoji, "noto", "red circle")
    picture = emoji.plain(square)
    inside = picture[1] < 0.5
    assert inside.sum() == 52 * 52 and inside[6:58, 6:58].all()
    assert picture[:, ~inside].min() == 1 and rgb(picture, 32, 32) == pytest.approx([0.8, 0, 0])


def test_compose_stays_inside(emoji):
    square = index(emoji, "noto", "red circle")
    for centre in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.1), (-1.0, 2.0)):
        for scale in (0.3, 0.97, 1.0):
            side = round(scale * 64)
            assert (emoji.compose(square, (1.0, 1.0, 1.0), scale, centre)[1] < 0.5).sum() == side * side
    left = emoji.compose(square, (1.0, 1.0, 1.0), 0.5, (0.25, 0.5))[1] < 0.5
    assert left[16:48, :32].all()


def test_a_colour_keeps_its_name_when_jittered():
    table = np.array([*COLOURS.values(), (1, 1, 1)])
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + 9 * np.eye(len(table))
    assert distances.min() > 2 * COLOUR_JITTER * 3**0.5


def test_drawings_are_as_described(emoji):
    square = index(emoji, "noto", "red circle")
    generator, descriptions = random.Random(0), []
    for _ in range(1500):
        picture, d = emoji.draw(square, generator)
        assert 0 <= picture.min() and picture.max() <= 1 and (d.name, d.style) == ("red circle", "noto")
        corners = picture[:, [0, 0, -1, -1], [0, -1, 0, -1]].T
        background = corners[(corners - torch.tensor([0.8, 0, 0])).norm(dim=1).argmax()]
        nearest = min(COLOURS, key=lambda c: (torch.tensor(COLOURS[c]) - background).norm())
        assert (background == 1).all() if d.background is None else nearest == d.background

        rows, columns = torch.where((picture - background[:, None, None]).abs().amax(0) > 0.05)
        share = (int(rows.max()) - int(rows.min()) + 1) / 64
        low, high = SIZES[d.size] if d.size else (0.8125, 0.8125)
        assert low - 1 / 64 <= share <= high + 1 / 64
        place = d.place or ""
        for where, near, far in ((columns, "left", "right"), (rows, "top", "bottom")):
            mean = (where.float().mean().item() + 0.5) / 64
            assert mean < 0.46 if near in place else mean > 0.54 if far in place else abs(mean - 0.5) < 0.1
        assert d.place is None or d.size in ("tiny", "small")
        descriptions.append(d)
    plain = sum((d.background, d.size, d.place) == (None, None, None) for d in descriptions)
    assert 0.45 < plain / len(descriptions) < 0.55
    assert {d.background for d in descriptions} == {None, *COLOURS}
    assert {d.size for d in descriptions} == {None, *SIZES}
    assert {d.place for d in descriptions} == {None, *PLACES}


def test_draw_depends_on_the_generator_alone(emoji):
    a, b = (emoji.draw(0, random.Random(7)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("label, name", [
    ("Japanese “no vacancy” button", "japanese no vacancy button"), ("kiss: woman, man", "kiss woman man"),
    ("twelve o’clock", "twelve o'clock"), ("flag: Congo - Kinshasa", "flag congo kinshasa"), ("T-Rex", "t-rex"),
    ("keycap: #", "keycap #"), ("flag: U.S. Virgin Islands", "flag us virgin islands"), ("♪", ""),
])  # fmt: skip
def test_names_are_plain_typing(label, name):
    assert data.words(label) == name


def test_two_names_alike_are_one_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EMOJI", EMOJI + [{**EMOJI[0], "label": "Red: circle", "order": 9}])
    write_packages(tmp_path)
    entries, svgs = data.collect(tmp_path / "node_modules")
    assert len(entries) == len(svgs) == 7


def test_a_folder_in_use_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "install", write_packages)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("mine")
    for used in ("set", "set/mine.txt"):
        with pytest.raises(WuerstchenError, match="exists already"):
            data.build(tmp_path / used, 16)
    assert (tmp_path / "set/mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "install", write_packages)
    (tmp_path / "set").mkdir()
    data.build(tmp_path / "set", 16)
    assert len(EmojiSet(tmp_path / "set")) == 7


@pytest.mark.parametrize("body", ["", '<path d="M0 0h1v1H0z"/>', "<path"])
def test_an_empty_or_broken_icon_leaves_nothing_behind(tmp_path, monkeypatch, body):
    fluent = {**FLUENT, "icons": {**FLUENT["icons"], "red-circle": {"body": body}}}
    monkeypatch.setattr(data, "install", lambda folder: write_packages(folder, fluent))
    with pytest.raises(WuerstchenError, match="'red circle' came out empty|could not be drawn"):
        data.build(tmp_path / "set", 64)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(WuerstchenError, match="npm"):
            data.build(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resvg_py", None)
        with pytest.raises(WuerstchenError, match="pip install resvg-py"):
            data.build(tmp_path / "set")
    failed = data.subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error no network\n")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: "npm")
        patch.setattr(data.subprocess, "run", lambda *args, **options: failed)
        with pytest.raises(WuerstchenError, match="packages: code ENOTFOUND; no network$"):
            data.build(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_data_set(tmp_path, emoji):
    with pytest.raises(WuerstchenError, match="no emoji data set in"):
        EmojiSet(tmp_path)
    (tmp_path / "emoji.json").write_text(json.dumps({"sources": [], "emoji": emoji.entries[:2]}))
    (tmp_path / "pictures.npy").write_bytes(b"")
    with pytest.raises(WuerstchenError, match="no emoji data set in"):
        EmojiSet(tmp_path)
    np.save(tmp_path / "pictures.npy", emoji.pictures)
    with pytest.raises(WuerstchenError, match="damaged"):
        EmojiSet(tmp_path)
