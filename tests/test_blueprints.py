"""The blueprints against the nodes' schemas. `comfyui/test_graphs.py` executes them."""

import pytest

from tests.blueprints import ENTRY, EXIT, FOLDER, NAMES, PICTURE, WIDGETS, read, widgets

PRIMITIVE = "PrimitiveStringMultiline"  # ComfyUI's


@pytest.fixture(params=NAMES)
def blueprint(request):
    return read(request.param)


def test_the_folder_holds_the_two():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.json" for name in NAMES}


def test_the_node_shows_what_the_graph_inside_takes_and_gives(blueprint):
    node, graph = blueprint
    assert node["type"] == graph["id"] and graph["name"] in NAMES and graph["description"] and graph["category"]
    for outer, inner in ((node["inputs"], graph["inputs"]), (node["outputs"], graph["outputs"])):
        assert [(end["name"], end["type"]) for end in outer] == [(end["name"], end["type"]) for end in inner]
    names = [end["name"] for end in node["inputs"]]
    assert {"prompt", "width", "height", "seed", "model"} <= set(names)
    assert ("image" in names) == ("denoise" in names) == (graph["name"] == PICTURE)
    exposed = [end["name"] for end in node["inputs"] if end["type"] in WIDGETS]
    assert node["properties"]["proxyWidgets"] == [["-1", name] for name in exposed]
    assert [end["name"] for end in node["inputs"] if "widget" in end] == exposed
    assert len(node["widgets_values"]) == len(exposed)
    assert [end["type"] for end in node["outputs"]] == ["IMAGE"]


def test_links_join_sockets_of_one_type(blueprint):
    graph = blueprint.graph
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link["id"]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and graph["state"]["lastLinkId"] == max(links)
    for link in graph["links"]:
        origin, target = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        start = graph["inputs"] if link["origin_id"] == ENTRY else origin["outputs"]
        end = graph["outputs"] if link["target_id"] == EXIT else target["inputs"]
        start, end = start[link["origin_slot"]], end[link["target_slot"]]
        assert start["type"] == end["type"] == link["type"]
        assert link["id"] in start["linkIds" if origin is None else "links"]
        assert link["id"] in end["linkIds"] if target is None else link["id"] == end["link"]
    for node in graph["nodes"]:
        for output in node["outputs"]:
            assert all(links[link]["origin_id"] == node["id"] for link in output["links"])


def test_nodes_are_the_schemas(blueprint, nodes):
    for node in blueprint.graph["nodes"]:
        assert node["properties"]["cnr_id"] and node["properties"]["ver"]
        if node["type"] == PRIMITIVE:
            continue
        schema = nodes[node["type"]].define_schema()
        assert len(node["widgets_values"]) == len(list(widgets(schema)))
        outputs = [output["type"] for output in node["outputs"]]
        assert outputs == [output.get_io_type() for output in schema.outputs]
        kinds = {given.id: given.get_io_type() for given in schema.inputs}
        linked = {given["name"]: given for given in node["inputs"]}
        assert {name: given["type"] for name, given in linked.items()} == {name: kinds[name] for name in linked}
        for given in schema.inputs:
            if given.get_io_type() not in WIDGETS:
                assert given.optional or linked[given.id]["link"] is not None


def test_one_seed_serves_both_stages(blueprint):
    (seed,) = (end for end in blueprint.graph["inputs"] if end["name"] == "seed")
    targets = {link["target_id"] for link in blueprint.graph["links"] if link["id"] in seed["linkIds"]}
    kinds = {node["type"] for node in blueprint.graph["nodes"] if node["id"] in targets}
    assert kinds == {"WuerstchenStageCSampler", "WuerstchenStageBSampler"}
