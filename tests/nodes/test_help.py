"""The help pages: ComfyUI's page asks for docs/NODE/LOCALE.md and, for any other language, docs/NODE.md.

It looks for pictures beside NODE.md, whichever of the three it shows.
"""

import json
import re

import pytest
from PIL import Image

from tests.nodes.inputs import ROOT

DOCS = ROOT / "web" / "docs"
ZH = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
SECTIONS = {
    "en": ["Connect", "Inputs", "Outputs", "Try", "Common mistakes"],
    "zh": ["怎么连接", "输入", "输出", "试一试", "常见错误"],
}
PICTURES = 600_000  # bytes, all together


def page(node_id, locale):
    return (DOCS / node_id / f"{locale}.md").read_text(encoding="utf-8")


def table(text, heading):
    """(name, type and default) of every row of the table under a heading; where the name is the type, it is given once.

    <wbr> is where a long word may break in a narrow panel.
    """
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.replace("<wbr>", "") for line in section.splitlines() if line.startswith("|")][2:]
    cells = [re.fullmatch(r"\| ([^|]+) \| (?:\*([^*|]+)\*<br>)?[^*|][^|]* \|", row).groups() for row in rows]
    return [(name, kind or name) for name, kind in cells]


def linked(text):
    return re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)


@pytest.fixture(params=("en", "zh"))
def locale(request):
    return request.param


def test_every_node_has_its_pages_and_there_is_nothing_else(nodes):
    """The page would run every script that it finds in this folder."""
    pages = {f"{node}{path}" for node in nodes for path in (".md", "/en.md", "/zh.md")}
    pictures = {picture for node in nodes for picture in linked(page(node, "en"))}
    found = {path.relative_to(DOCS).as_posix() for path in (ROOT / "web").rglob("*") if path.is_file()}
    assert found == pages | pictures


def test_the_page_in_other_languages_is_the_english_one(nodes):
    for node_id in nodes:
        assert (DOCS / f"{node_id}.md").read_bytes() == (DOCS / node_id / "en.md").read_bytes()


def test_a_page_has_the_node_s_name_a_picture_and_the_same_sections(nodes, locale):
    for node_id, node in nodes.items():
        text = page(node_id, locale)
        name = node.define_schema().display_name if locale == "en" else ZH[node_id]["display_name"]
        assert text.startswith(f"# {name}\n")
        assert len(linked(text.split("\n## ")[0])) == 1
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS[locale]
        for heading in (SECTIONS[locale][0], *SECTIONS[locale][3:]):
            assert f"\n## {heading}\n\n- " in text, (node_id, heading)


def test_tables_list_the_inputs_with_their_types_and_defaults(nodes, locale):
    comma, optional = (", ", "optional") if locale == "en" else ("，", "可选")
    for node_id, node in nodes.items():
        expected = []
        for given in node.define_schema().inputs:
            default = getattr(given, "default", None)
            default = str(default).lower() if isinstance(default, bool) else default
            kind = [given.get_io_type()] + [str(default)] * (default not in (None, "")) + [optional] * given.optional
            chinese = ZH[node_id]["inputs"][given.id]["name"]
            name = given.id if locale == "en" or chinese == given.id else f"{chinese}<br>{given.id}"
            expected.append((name, comma.join(kind)))
        assert table(page(node_id, locale), SECTIONS[locale][1]) == expected, node_id


def test_tables_list_the_outputs(nodes, locale):
    for node_id, node in nodes.items():
        expected = []
        for place, output in enumerate(node.define_schema().outputs):
            english = output.display_name or output.get_io_type()
            name = english if locale == "en" else ZH[node_id]["outputs"][str(place)]["name"]
            expected.append((name, output.get_io_type()))
        assert table(page(node_id, locale), SECTIONS[locale][2]) == expected, node_id


def test_pages_name_nodes_as_the_page_does(nodes, locale):
    schemas = [node.define_schema() for node in nodes.values()]
    names = {schema.display_name if locale == "en" else ZH[schema.node_id]["display_name"] for schema in schemas}
    named = [
        (node_id, name)
        for node_id in nodes
        for name in re.findall(r"(?:(?<!\*)\*|“)(Würstchen [^*”]+)[*”]", page(node_id, locale))
    ]
    assert named
    assert [(node_id, name) for node_id, name in named if name not in names] == []


def test_chinese_pages_give_the_name_that_errors_use(nodes):
    for node_id, node in nodes.items():
        assert f"\n英文名：{node.define_schema().display_name}，" in page(node_id, "zh")


def test_chinese_pages_have_the_pictures_of_the_english_ones(nodes):
    for node_id in nodes:
        assert linked(page(node_id, "zh")) == linked(page(node_id, "en"))


def test_pictures_can_be_opened_and_are_small(nodes):
    paths = [DOCS / link for node_id in nodes for link in linked(page(node_id, "en"))]
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width <= 900, path
    assert len(set(paths)) == len(nodes)
    assert sum(path.stat().st_size for path in paths) < PICTURES


def test_comfyui_serves_the_folder_of_the_pages(pack):
    assert (ROOT / pack.WEB_DIRECTORY / "docs").samefile(DOCS)
