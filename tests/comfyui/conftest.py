"""A real ComfyUI, in this process and on the CPU: COMFYUI_DIR is its folder. Nothing is started on the network."""

import asyncio
import contextlib
import importlib
import inspect
import os
from dataclasses import replace

import pytest
import torch

import wuerstchen_core as w
from tests.comfyui.host import CALLED, load_set
from tests.nodes.inputs import QUICK_B, QUICK_C


def pytest_collection_modifyitems(items):
    if "COMFYUI_DIR" not in os.environ:
        needs = pytest.mark.skip(reason="needs a ComfyUI: set COMFYUI_DIR to its folder")
        for item in items:
            if item.path.parent.name == "comfyui":
                item.add_marker(needs)


EXTRAS = (
    "advanced_samplers apg cfg cond custom_sampler differential_diffusion easycache freelunch hooks hypertile latent "
    "lora_extract mahiro mask model_advanced model_downscale model_merging pag perpneg rebatch sag slg stable_cascade "
    "attention_multiply tomesd torch_compile eps tcfg fresca compositing"
).split()


@pytest.fixture(scope="session")
def host_nodes(pack):
    """Id -> class of ComfyUI's own nodes."""
    found = dict(importlib.import_module("nodes").NODE_CLASS_MAPPINGS)
    for name in EXTRAS:
        module = importlib.import_module(f"comfy_extras.nodes_{name}")
        found |= getattr(module, "NODE_CLASS_MAPPINGS", {})
        if hasattr(module, "comfy_entrypoint"):

            async def listed(module=module):
                extension = module.comfy_entrypoint()
                return await (await extension if inspect.isawaitable(extension) else extension).get_node_list()

            found |= {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed())}
    return found


@pytest.fixture(scope="session")
def call(run, nodes, host_nodes):
    """call(node id, **inputs) -> what one of our nodes or of ComfyUI's gives, or a tuple."""

    def call(node_id, **inputs):
        if node_id in nodes:
            return run(node_id, **inputs)
        node = host_nodes[node_id]
        CALLED.add(node_id)
        with torch.inference_mode():
            if hasattr(node, "define_schema"):
                results = node.EXECUTE_NORMALIZED(**inputs).result
            else:
                results = getattr(node(), node.FUNCTION)(**inputs)
        results = results.get("result", ()) if isinstance(results, dict) else results or ()
        return results[0] if len(results) == 1 else results

    return call


@pytest.fixture(scope="session")
def tinies(run):
    """The tiny set on ComfyUI's sockets."""
    return load_set(run, "tiny")


@pytest.fixture(scope="session")
def minis(run):
    """The mini on ComfyUI's sockets."""
    return load_set(run, "mini")


@pytest.fixture(scope="session")
def mini():
    """The mini in Python, without the distilled networks, which nodes have as a LoRA."""
    return replace(w.Wuerstchen.mini(), distilled={})


@pytest.fixture(scope="session")
def text(call, tinies):
    """prompt -> CONDITIONING for either stage of the tiny set"""
    return lambda prompt: call("CLIPTextEncode", clip=tinies.clip_c, text=prompt)


@pytest.fixture(scope="session")
def ksampler(call, tinies, text):
    """KSampler with the tiny set's Stage C, or with what is given."""

    def sample(latent, model=None, positive=None, negative=None, **options):
        options = {"seed": 1, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple",
                   "denoise": 1.0, **options}  # fmt: skip
        return call("KSampler", model=model or tinies.model_c, positive=positive or text("a cat"),
                    negative=negative or text(""), latent_image=latent, **options)  # fmt: skip

    return sample


@pytest.fixture(scope="session")
def empty(run):
    def empty(width=256, height=256, batch_size=1):
        return run("WuerstchenEmptyLatent", width=width, height=height, batch_size=batch_size)

    return empty


@pytest.fixture
def condition_calls(tinies):
    """How often the stages' step-constant work was done: a list of 1s, one for each time."""
    done = []
    with contextlib.ExitStack() as stack:
        for model in (tinies.model_c, tinies.model_b):
            network = model.model.diffusion_model
            condition = network.condition
            network.condition = lambda *inputs, condition=condition: done.append(1) or condition(*inputs)
            stack.callback(delattr, network, "condition")
        yield done


@pytest.fixture(scope="session")
def loaded(tinies):
    """The tiny set's networks by name."""
    return vars(tinies)


@pytest.fixture
def stage_c(run, tinies, text):
    """latent -> what Würstchen Stage C Sampler makes of it"""

    def sample(latent, **options):
        inputs = {"positive": text("a cat"), "negative": text(""), **QUICK_C, **options}
        return run("WuerstchenStageCSampler", model=tinies.model_c, latent=latent, **inputs)

    return sample


@pytest.fixture
def stage_b(run, tinies):
    """The same for Würstchen Stage B Sampler."""

    def sample(latent, **options):
        return run("WuerstchenStageBSampler", model=tinies.model_b, latent=latent, **{**QUICK_B, **options})

    return sample
