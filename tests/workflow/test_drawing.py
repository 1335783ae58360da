"""The graphs that `generate` writes into its pictures: held against the nodes' own schemas."""

import pytest

from wuerstchen_core.workflow.drawing import Circumstances, graph_of
from wuerstchen_core.workflow.graph import HOSTS, NOTE, PACK, Graph

TOLD = {
    "prompt": "a cat", "negative_prompt": "a dog", "width": 344, "height": 200, "batch_size": 1, "seed": 7,
    "steps_c": 12, "cfg_c": 3.5, "steps_b": 5, "cfg_b": 1.0, "sampler": "ddim", "schedule": "uneven", "device": "cpu",
    "model": "mini", "schedule_b": "even", "cfg_interval": [0.1, 0.9], "cfg_rescale": 0.25,
}  # fmt: skip
CASES = {
    "text": ({}, {}),
    "guided Stage B": ({"cfg_b": 2.0, "seed_b": 3}, {}),
    "no text for Stage B": ({"cfg_b": 2.0, "text_encoder_b": "b.safetensors"}, {"text_for_stage_b": False}),
    "picture": ({"image": "in.png", "denoise": 0.3, "batch_size": 4}, {"transparent": True}),
    "two pictures": ({"image": "in.png", "denoise": 0.3, "batch_size": 2}, {"pictures": 2}),
    "loras": ({"loras": ["a.safetensors:0.8", "b:c.safetensors:-2.5"]}, {}),
    "files": ({"stage_c": "c.pt", "text_encoder_c": "clip.safetensors", "model": "own"}, {}),
    "all files": ({role: f"{role}.safetensors" for role in ("stage_a", "stage_b", "stage_c", "semantic_compressor",
                                                           "text_encoder_c")} | {"image": "in.png"}, {}),
    "two text encoders": ({"text_encoder_c": "c.pt", "text_encoder_b": "b.pt"}, {"one_text_encoder": False}),
}  # fmt: skip
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")


@pytest.fixture(params=CASES)
def graph(request):
    told, around = CASES[request.param]
    return graph_of({**TOLD, **told}, Circumstances(**around))


@pytest.fixture
def catalogue(nodes):
    """Node id -> inputs (name, type, optional, has a seed's control), types of the outputs; from the classes."""
    ours = {}
    for node_id, node in nodes.items():
        schema = node.define_schema()
        inputs = [
            (given.id, given.get_io_type(), given.optional, bool(getattr(given, "control_after_generate", False)))
            for given in schema.inputs
        ]
        ours[node_id] = (inputs, [output.get_io_type() for output in schema.outputs])
    theirs = {
        node_id: (
            [(given["id"], given["type"], False, False) for given in node["inputs"]],
            [kind for _, kind in node["outputs"]],
        )
        for node_id, node in HOSTS.items()
    }
    return ours | theirs


def test_every_input_is_one_that_the_node_has_and_nothing_required_is_open(graph, catalogue):
    api = graph.api()
    for node in api.values():
        inputs, _ = catalogue[node["class_type"]]
        assert node["inputs"].keys() <= {name for name, *_ in inputs}
        for name, kind, optional, _ in inputs:
            value = node["inputs"].get(name)
            if isinstance(value, list):
                source = api[value[0]]
                assert catalogue[source["class_type"]][1][value[1]] == kind
            else:
                assert kind in WIDGETS if value is not None else optional, f"{node['class_type']}: {name}"


def test_the_page_reads_the_same_graph(graph, catalogue):
    """By the page's own rules: sockets by their names, widgets by their places."""
    page, read = graph.page(), {}
    links = {link[0]: link for link in page["links"]}
    for node in page["nodes"]:
        if node["type"] == NOTE:
            continue
        inputs, outputs = catalogue[node["type"]]
        values, found = iter(node["widgets_values"]), {}
        linked = {given["name"]: given for given in node["inputs"]}
        expected = [(name, kind) for name, kind, *_ in inputs if kind not in WIDGETS or name in linked]
        assert [(given["name"], given["type"]) for given in node["inputs"]] == expected
        for name, kind, _, controlled in inputs:
            if kind in WIDGETS:
                found[name] = next(values)
                if controlled or node["type"] == "LoadImage":
                    assert next(values) == ("fixed" if controlled else "image")
        assert not list(values)
        for place, given in enumerate(node["inputs"]):
            if given["link"] is not None:
                _, source, slot, target, position, kind = links[given["link"]]
                assert (target, position, kind) == (node["id"], place, given["type"])
                found[given["name"]] = [str(source), slot]
        assert [output["type"] for output in node["outputs"]] == outputs
        for slot, output in enumerate(node["outputs"]):
            assert output["links"] == [each for each, link in links.items() if link[1:3] == [node["id"], slot]]
        read[str(node["id"])] = {"inputs": found, "class_type": node["type"], "_meta": {"title": node["title"]}}
        assert node["properties"]["cnr_id"] == ("comfy-core" if node["type"] in HOSTS else PACK[0])
    assert read == graph.api()
    assert sorted(node["order"] for node in page["nodes"]) == list(range(len(page["nodes"])))
    assert page["last_node_id"] == max(node["id"] for node in page["nodes"]) and page["last_link_id"] == len(links)


def test_nodes_do_not_overlap(graph):
    boxes = []
    for node in graph.page()["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        box = (x, y - 30, x + width, y + height)  # the title lies above
        assert all(box[2] <= o[0] or o[2] <= box[0] or box[3] <= o[1] or o[3] <= box[1] for o in boxes)
        boxes.append(box)


def of_kind(graph, kind):
    return [node["inputs"] for node in graph.api().values() if node["class_type"] == kind]


def test_all_settings_are_in_the_graph():
    graph = graph_of({**TOLD, "seed_b": 9, "cfg_b": 2.0})
    [stage_c], [stage_b] = of_kind(graph, "WuerstchenStageCSampler"), of_kind(graph, "WuerstchenStageBSampler")
    [empty] = of_kind(graph, "WuerstchenEmptyLatent")
    expected = {"seed": 7, "steps": 12, "cfg": 3.5, "sampler": "ddim", "schedule": "uneven", "denoise": 1.0}
    expected |= {"cfg_interval_low": 0.1, "cfg_interval_high": 0.9, "cfg_rescale": 0.25}
    assert expected.items() <= stage_c.items()
    assert {"seed": 9, "steps": 5, "cfg": 2.0, "sampler": "ddim", "schedule": "even"}.items() <= stage_b.items()
    assert empty == {"width": 344, "height": 200, "batch_size": 1}
    assert [node["value"] for node in of_kind(graph, "PrimitiveStringMultiline")] == ["a cat", "a dog"]
    assert len(of_kind(graph, "WuerstchenTextEncode")) == 4 and not graph.notes


def test_the_prompt_is_the_one_that_the_core_reads():
    graph = graph_of({**TOLD, "prompt": "a “cat” &amp; a dog’s (bone:1.2) "})
    assert of_kind(graph, "PrimitiveStringMultiline")[0]["value"] == 'a "cat" & a dog\'s (bone:1.2)'


@pytest.mark.parametrize(
    "told, says",
    [
        ({"seed": -5}, "no seed of -5"),
        ({"seed": 2**60}, "The page rounds seeds"),
        ({"cfg_c": 0.0}, "cfg 0, which means the model's own"),
        ({"cfg_c": 50.0}, "takes no cfg of 50.0: it is set to 30.0"),
        ({"steps_c": 5000}, "takes no steps of 5000"),
        ({"width": 64}, "was 64x200: nodes take no side below 128"),
        ({"width": 8192}, "takes no width of 8192: it is set to 4096"),
        ({"batch_size": 100}, "takes no batch_size of 100"),
        ({"batch_size": 4, "batch_number": 2}, "number 2 of the 4"),
        ({"loras": ["a.safetensors:1"]}, "`a.safetensors` into `models/loras`"),
        ({"stage_c": "c.pt"}, "`c.pt` into `models/diffusion_models`"),
        ({"model": "own"}, "folder `own` into `models/wuerstchen`"),
        ({"image": "in.png"}, "Choose `in.png` in *Load Image*"),
        ({"prompt": "embedding:cat"}, "name of an embedding"),
        ({"tea": "green"}, "drawn with tea green, which these nodes do not have"),
    ],
)
def test_what_a_graph_cannot_say_or_bring_is_in_its_note(told, says):
    graph = graph_of({**TOLD, **told})
    [note] = [node for node in graph.page()["nodes"] if node["type"] == NOTE]
    assert says in note["widgets_values"][0] and len(graph.notes) <= 2


def test_a_profile_is_told():
    graph = graph_of({**TOLD, "image": "in.jpg", "denoise": 0.5}, Circumstances(has_profile=True))
    assert any("`in.jpg` has a colour profile" in note for note in graph.notes)


def test_a_graph_that_no_node_could_take_is_refused():
    with pytest.raises(ValueError, match="has no input sead"):
        Graph().add("WuerstchenEmptyLatent", sead=1)
    with pytest.raises(ValueError, match="needs model"):
        Graph().add("WuerstchenStageBSampler")
