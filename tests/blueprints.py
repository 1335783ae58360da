"""The blueprints of subgraphs/: each file is one node of the page and, in `definitions`, the graph inside it."""

import json
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "subgraphs"
TEXT, PICTURE = NAMES = ("Würstchen Text to Picture", "Würstchen Picture to Picture")
ENTRY, EXIT = -10, -20  # the ids of a subgraph's own ends
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")


class Blueprint(NamedTuple):
    node: dict
    graph: dict


def read(name):
    file = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (node,), (graph,) = file["nodes"], file["definitions"]["subgraphs"]
    return Blueprint(node, graph)


def widgets(schema):
    """The names of a node's widgets as their values are saved; None for the page's own that follows a seed."""
    for given in schema.inputs:
        if given.get_io_type() in WIDGETS:
            yield given.id
            if getattr(given, "control_after_generate", None):
                yield None


def flat(blueprint, names, **outside):
    """The graph in API format, as the page sends it. names: of each type's widgets; outside: what is linked to the
    node, by its inputs' names."""
    values = iter(blueprint.node["widgets_values"])
    given = {socket["name"]: next(values) for socket in blueprint.node["inputs"] if "widget" in socket} | outside
    links = {link["id"]: link for link in blueprint.graph["links"]}

    def source(link):
        if link["origin_id"] == ENTRY:
            return given[blueprint.graph["inputs"][link["origin_slot"]]["name"]]
        return [str(link["origin_id"]), link["origin_slot"]]

    api = {}
    for node in blueprint.graph["nodes"]:
        widgets_values = zip(names[node["type"]], node["widgets_values"], strict=True)
        inputs = {name: value for name, value in widgets_values if name}
        inputs |= {i["name"]: source(links[i["link"]]) for i in node["inputs"] if i["link"] is not None}
        api[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": node["type"]}}
    (end,) = (link for link in links.values() if link["target_id"] == EXIT)
    picture = [str(end["origin_id"]), end["origin_slot"]]
    api["save"] = {"inputs": {"images": picture, "filename_prefix": "x"}, "class_type": "SaveImage", "_meta": {}}
    return api
