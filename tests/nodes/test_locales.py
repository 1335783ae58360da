"""The Chinese face: locales/zh, in the format of ComfyUI's page."""

import json
import re

from tests.nodes.inputs import ROOT

FOLDER = ROOT / "locales" / "zh"
ZH = json.loads((FOLDER / "nodeDefs.json").read_text(encoding="utf-8"))
FROM_FOLDERS = ("file", "model", "previewer")  # files by name, and what begins with a word of ours
OURS = ("mini", "none")


def texts(found, path=()):
    """(path, text) of every text in nested dictionaries"""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from texts(value, (*path, key))
        else:
            yield (*path, key), value


def pairs(nodes):
    """(English, Chinese) of every description and tooltip"""
    for node_id, node in nodes.items():
        schema, zh = node.define_schema(), ZH[node_id]
        yield schema.description, zh["description"]
        yield from ((given.tooltip, zh["inputs"][given.id]["tooltip"]) for given in schema.inputs)
        yield from ((output.tooltip, zh["outputs"][str(i)]["tooltip"]) for i, output in enumerate(schema.outputs))


def test_every_node_input_option_and_output_is_translated_and_nothing_else(nodes):
    assert list(ZH) == list(nodes)
    for node_id, node in nodes.items():
        schema, zh = node.define_schema(), ZH[node_id]
        expected = {"display_name", "description", "inputs", "outputs"}
        for place in range(len(schema.outputs)):
            expected |= {f"outputs {place} name", f"outputs {place} tooltip"}
        for given in schema.inputs:
            expected |= {f"inputs {given.id} name", f"inputs {given.id} tooltip"}
            if given.get_io_type() == "COMBO":
                options = [o for o in given.options if given.id not in FROM_FOLDERS or o.split(":")[0] in OURS]
                expected |= {f"inputs {given.id} options {option}" for option in options}
        found = {" ".join(path) for path, _ in texts(zh)} | {"inputs", "outputs"}
        assert found == expected, node_id


def test_inputs_are_in_the_schema_s_order(nodes):
    for node_id, node in nodes.items():
        assert list(ZH[node_id]["inputs"]) == [given.id for given in node.define_schema().inputs]


def test_names_are_unique_within_a_node_and_among_nodes():
    assert len({node["display_name"] for node in ZH.values()}) == len(ZH)
    for node in ZH.values():
        names = [given["name"] for given in node["inputs"].values()]
        assert len(set(names)) == len(names)


def test_descriptions_and_tooltips_are_chinese(nodes):
    for english, chinese in pairs(nodes):
        assert len(re.findall("[一-鿿]", chinese)) >= 2, english


def test_numbers_and_names_of_files_are_those_of_the_english_texts(nodes):
    """4 times smaller: 1/4."""
    for english, chinese in pairs(nodes):
        for token in re.findall(r"\w*_\w+|\d+\.\d+|\d+", english):
            assert token in chinese, (token, english, chinese)


def test_the_page_can_read_every_text():
    """vue-i18n takes {}, @ and | for its own syntax, and a full stop in a key for a step down."""
    for path, text in texts(ZH):
        assert isinstance(text, str) and text and text == text.strip()
        assert not re.search(r"[{}@|]", text), path
        assert not any("." in key for key in path), path


def test_every_category_has_its_chinese_name(nodes):
    main = json.loads((FOLDER / "main.json").read_text(encoding="utf-8"))
    categories = {part for node in nodes.values() for part in node.define_schema().category.split("/")}
    assert main == {"nodeCategories": dict.fromkeys(categories, "Würstchen")}


def test_the_chinese_readme_names_every_node_and_template_and_links_to_what_exists(nodes):
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for node_id, node in nodes.items():
        assert f"\n| {ZH[node_id]['display_name']} | {node.define_schema().display_name} | " in chinese
    for workflow in (ROOT / "workflows").glob("*.json"):
        assert f"| `{workflow.stem}` |" in chinese
    headings = re.findall(r"^#+ (.+)$", english, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"README\.md#([\w-]+)", chinese)) <= anchors
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", chinese):
        assert (ROOT / link).exists(), link
    assert "](README.zh.md)" in english.split("\n## ")[0] and "](README.md)" in chinese.split("\n## ")[0]
