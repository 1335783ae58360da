"""Graphs of ComfyUI's nodes, in its two formats: the page's ("workflow") and the API's ("prompt").

`nodes.json` beside this module has the schemas of the pack's own nodes; a test holds them against it.
"""

import json
import uuid
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

PACK, HOST = ("wuerstchen", "1.0.0"), ("comfy-core", "0.3.64")  # what brings a node, and its version
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
NOTE = "MarkdownNote"  # the page's own

WIDTH, GAP = 320, 60  # of a node, and around it, in the page's units
TITLE, SOCKET, WIDGET, TEXT, PICTURE = 30, 22, 26, 110, 290  # heights


@cache
def schemas() -> dict[str, dict]:
    """Node id -> title, inputs and outputs: the pack's own, and those of ComfyUI's that `generate` needs."""
    ours = json.loads(files(__package__).joinpath("nodes.json").read_text(encoding="utf-8"))
    return {**ours, **HOSTS}


def _input(name: str, kind: str, **more) -> dict:
    return {"id": name, "type": kind, "optional": False, **more}


HOSTS: dict[str, dict] = {
    "LoadImage": {
        "title": "Load Image",
        "inputs": [_input("image", "COMBO", upload=True)],
        "outputs": [["IMAGE", "IMAGE"], ["MASK", "MASK"]],
    },
    "JoinImageWithAlpha": {
        "title": "Join Image with Alpha",
        "inputs": [_input("image", "IMAGE"), _input("alpha", "MASK")],
        "outputs": [["IMAGE", "IMAGE"]],
    },
    "RepeatLatentBatch": {
        "title": "Repeat Latent Batch",
        "inputs": [_input("samples", "LATENT"), _input("amount", "INT", default=1, min=1, max=64)],
        "outputs": [["LATENT", "LATENT"]],
    },
    "PrimitiveStringMultiline": {
        "title": "String (Multiline)",
        "inputs": [_input("value", "STRING", default="", multiline=True)],
        "outputs": [["STRING", "STRING"]],
    },
    "SaveImage": {
        "title": "Save Image",
        "inputs": [_input("images", "IMAGE"), _input("filename_prefix", "STRING", default="ComfyUI")],
        "outputs": [],
    },
}


class Output(NamedTuple):
    """One output of a node, to be given to another's input."""

    node: "Node"
    slot: int


@dataclass
class Node:
    id: int
    kind: str
    title: str
    inputs: dict[str, Any]  # a value or an Output

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)

    @property
    def schema(self) -> dict:
        return schemas()[self.kind]

    @property
    def linked(self) -> dict[str, Output]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, Output)}


@dataclass
class Graph:
    """Nodes are added in an order in which they can be executed."""

    nodes: list[Node] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines of a note on the page

    def add(self, kind: str, title: str | None = None, **inputs) -> Node:
        """A node with values and Outputs for its inputs; what is not given has its default, and None is left open.

        A number beyond what the widget takes is set to its limit, which the note tells.
        """
        known = {given["id"]: given for given in schemas()[kind]["inputs"]}
        if unknown := inputs.keys() - known.keys():
            raise ValueError(f"{kind} has no input {', '.join(unknown)}")
        node = Node(len(self.nodes) + 1, kind, title or schemas()[kind]["title"], {})
        for name, given in known.items():
            value = inputs.get(name, given.get("default"))
            if value is None and not given["optional"]:
                raise ValueError(f"{kind} needs {name}")
            if value is not None:
                node.inputs[name] = self._within(node.title, given, value)
        self.nodes.append(node)
        return node

    def _within(self, title: str, given: dict, value):
        if given["type"] not in ("INT", "FLOAT") or isinstance(value, Output):
            return value
        within = min(max(value, given.get("min", value)), given.get("max", value))
        if within != value:
            self.notes.append(f"*{title}* takes no {given['id']} of {value}: it is set to {within}.")
        return within

    def api(self) -> dict:
        """The format that ComfyUI executes."""
        return {
            str(node.id): {
                "inputs": {
                    name: [str(value.node.id), value.slot] if isinstance(value, Output) else value
                    for name, value in node.inputs.items()
                },
                "class_type": node.kind,
                "_meta": {"title": node.title},
            }
            for node in self.nodes
        }

    def page(self) -> dict:
        """The format that ComfyUI's page opens, laid out in columns from left to right."""
        links: list[list] = []
        for node in self.nodes:
            sockets = _sockets(node)
            for place, given in enumerate(sockets):
                if given["id"] in node.linked:
                    source = node.linked[given["id"]]
                    links.append([len(links) + 1, source.node.id, source.slot, node.id, place, given["type"]])
        places = _layout(self.nodes)
        nodes = [_page_node(node, order, places[node.id], links) for order, node in enumerate(self.nodes)]
        if self.notes:
            nodes.append(_note(len(nodes) + 1, len(nodes), "\n".join(f"- {line}" for line in self.notes)))
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(self.api()))),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def _sockets(node: Node) -> list[dict]:
    """Inputs that are sockets on the page: those without a widget, and widgets that a link feeds."""
    return [given for given in node.schema["inputs"] if given["type"] not in WIDGETS or given["id"] in node.linked]


def _widgets(node: Node) -> list[dict]:
    return [given for given in node.schema["inputs"] if given["type"] in WIDGETS]


def _height(node: Node) -> int:
    widgets = _widgets(node)
    rows = max(len(_sockets(node)), len(node.schema["outputs"])) * SOCKET
    extra = sum(given.get("control_after_generate", False) + given.get("upload", False) for given in widgets)
    texts = sum(given.get("multiline", False) and given["id"] not in node.linked for given in widgets)
    picture = PICTURE if node.kind in ("LoadImage", "SaveImage") else 0
    return 10 + rows + (len(widgets) + extra) * WIDGET + texts * TEXT + picture


def _layout(nodes: list[Node]) -> dict[int, tuple[int, int]]:
    """Node id -> position: a column to the right of all that it takes its inputs from; what takes none, left of what
    reads it first."""
    columns: dict[int, int] = {}
    readers: dict[int, list[int]] = {node.id: [] for node in nodes}
    for node in nodes:
        columns[node.id] = 1 + max((columns[source.node.id] for source in node.linked.values()), default=-1)
        for source in node.linked.values():
            readers[source.node.id].append(columns[node.id])
    heights: dict[int, int] = {}
    places = {}
    for node in nodes:
        column = columns[node.id] if node.linked or not readers[node.id] else min(readers[node.id]) - 1
        places[node.id] = (column * (WIDTH + GAP), heights.get(column, 0))
        heights[column] = heights.get(column, 0) + _height(node) + TITLE + GAP
    return places


def _page_node(node: Node, order: int, place: tuple[int, int], links: list[list]) -> dict:
    into = {(link[3], link[4]): link[0] for link in links}
    inputs = []
    for position, given in enumerate(_sockets(node)):
        told = {"name": given["id"], "type": given["type"], "link": into.get((node.id, position))}
        if given["type"] in WIDGETS:
            told["widget"] = {"name": given["id"]}
        elif given["optional"]:
            told["shape"] = 7
        inputs.append(told)
    outputs = [
        {"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [node.id, slot]]}
        for slot, (name, kind) in enumerate(node.schema["outputs"])
    ]
    values: list = []
    for given in _widgets(node):
        value = node.inputs.get(given["id"])
        values.append("" if isinstance(value, Output) else value)
        values += ["fixed"] * given.get("control_after_generate", False) + ["image"] * given.get("upload", False)
    name, version = HOST if node.kind in HOSTS else PACK
    return {
        "id": node.id,
        "type": node.kind,
        "pos": list(place),
        "size": [WIDTH, _height(node)],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "title": node.title,
        "properties": {"cnr_id": name, "ver": version, "Node name for S&R": node.kind},
        "widgets_values": values,
    }


def _note(node_id: int, order: int, text: str) -> dict:
    """Above the graph's first column."""
    height = 60 + 50 * text.count("\n- ") + 20 * (len(text) // 40)
    return {
        "id": node_id,
        "type": NOTE,
        "pos": [0, -height - TITLE - GAP],
        "size": [WIDTH * 2, height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What this picture needs",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }
