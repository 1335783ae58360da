"""Defaults that follow the model, live previews on request, named progress, and runs that are interrupted."""

import asyncio

import pytest
import torch

import wuerstchen_core as w
from tests.comfyui.host import apart
from tests.nodes.inputs import QUICK_B, QUICK_C
from tests.pictures import psnr
from tests.reference import fill_zeros
from wuerstchen_core.models.stage_c import Prior, StageCConfig

C = {**QUICK_C, "cfg": 2.0, "steps": 6}


@pytest.fixture
def shown(pack):
    """What ComfyUI's page is told: (step, steps, picture or None); `shown.stop_at` interrupts at that step."""
    import comfy.model_management as management
    import comfy.utils

    class Shown(list):
        stop_at = None

    shown = Shown()

    def hook(value, total, preview, *more, **others):
        shown.append((value, total, preview))
        if value == shown.stop_at:
            raise management.InterruptProcessingException

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    yield shown
    comfy.utils.set_progress_bar_global_hook(before)


def defaults(nodes, node_id):
    """A node's widgets as they are when it is dragged in."""
    inputs = nodes[node_id].define_schema().inputs
    return {given.id: given.default for given in inputs if getattr(given, "default", None) is not None}


def test_nodes_with_their_defaults_draw_what_generate_draws_by_default(run, nodes, mini, minis):
    def encode(clip, text):
        return run("WuerstchenTextEncode", clip=clip, text=text)

    apple = "red apple, noto style"
    latent = run("WuerstchenEmptyLatent", **defaults(nodes, "WuerstchenEmptyLatent"))
    latent = run("WuerstchenStageCSampler", model=minis.model_c, positive=encode(minis.clip_c, apple), latent=latent,
                 negative=encode(minis.clip_c, ""), **defaults(nodes, "WuerstchenStageCSampler"))  # fmt: skip
    latent = run("WuerstchenStageBSampler", model=minis.model_b, positive=encode(minis.clip_b, apple), latent=latent,
                 **defaults(nodes, "WuerstchenStageBSampler"))  # fmt: skip
    image = run("WuerstchenVQGANDecode", vae=minis.stage_a, latent=latent)
    assert image.shape == (1, 256, 256, 3)
    assert psnr(image, mini.generate(apple)) > 50


@pytest.fixture
def released_width(run, models, call):
    """A small Stage C that reads texts as wide as the released ones, and such texts."""
    torch.manual_seed(2)
    stage_c = Prior(StageCConfig(width=32, depth=2, heads=2, text_width=1280))
    stage_c.out[1].weight.data.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    w.save(fill_zeros(stage_c), models / "diffusion_models" / "c.safetensors")
    texts = torch.randn(2, 1, 77, 1280, generator=torch.Generator().manual_seed(1))
    return run("WuerstchenLoadStageC", file="c.safetensors", weight_dtype="default"), [[[text, {}]] for text in texts]


def test_a_released_stage_c_has_other_defaults(run, nodes, released_width, ksampler):
    model, (positive, negative) = released_width
    empty = defaults(nodes, "WuerstchenEmptyLatent")
    own = {**defaults(nodes, "WuerstchenStageCSampler"), "steps": 2}
    told = {"model": model, "positive": positive, "negative": negative}
    drawn = run("WuerstchenStageCSampler", latent=run("WuerstchenEmptyLatent", **empty), **told, **own)
    assert drawn["samples"].shape == (1, 16, 24, 24)
    given = run("WuerstchenEmptyLatent", width=1024, height=1024, batch_size=1)
    assert apart(run("WuerstchenStageCSampler", latent=given, **told, **{**own, "cfg": 4.0}), drawn) == 0
    linked = run("WuerstchenEmptyLatent", **empty, model=model)
    assert linked["samples"].shape == given["samples"].shape == (1, 16, 24, 24)
    assert ksampler(linked, **told)["samples"].shape == (1, 16, 24, 24)
    with pytest.raises(
        ValueError, match="no size yet: set width and height of Würstchen Empty Latent, or link Stage C"
    ):
        ksampler(run("WuerstchenEmptyLatent", **empty), **told)


def test_the_compressor_takes_the_sets_own_size(run, nodes, minis):
    image = torch.rand(1, 300, 500, 3)
    own = run("WuerstchenSemanticCompress", vae=minis.semantic, image=image, width=0, height=0)
    given = run("WuerstchenSemanticCompress", vae=minis.semantic, image=image, width=256, height=256)
    assert apart(own, given) == 0


@pytest.mark.parametrize("name, side", [("minis", 48), ("tinies", 6)])
def test_a_preview_that_is_asked_for_is_shown_where_comfyui_shows_none(run, request, name, side, shown, empty):
    """By the set's previewer, or else a colour per position."""
    loaded = request.getfixturevalue(name)
    text = run("WuerstchenTextEncode", clip=loaded.clip_c, text="fox in fluent style")
    told = {"model": loaded.model_c, "positive": text, "negative": text, "latent": empty(), **C}
    without = run("WuerstchenStageCSampler", **told)
    assert [picture for *_, picture in shown if picture is not None] == []
    shown.clear()
    with_it = run("WuerstchenStageCSampler", **told, preview=True)
    pictures = [(step, picture[1]) for step, _, picture in shown if picture is not None]
    assert [step for step, _ in pictures] == [1, 2, 3, 4, 5, 6]
    assert all(picture.size == (side, side) for _, picture in pictures)
    assert pictures[0][1].tobytes() != pictures[-1][1].tobytes()
    assert apart(with_it, without) == 0


def test_stage_b_is_shown_too_where_its_colours_are_known(run, tinies, minis, shown):
    semantic = {"samples": torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(4))}
    run("WuerstchenStageBSampler", model=minis.model_b, latent=semantic, **QUICK_B, preview=True)
    pictures = [picture[1] for *_, picture in shown if picture is not None]
    assert len(pictures) == QUICK_B["steps"] and all(picture.size == (64, 64) for picture in pictures)


def test_progress_names_the_stage(run, tinies, text, empty, capfd):
    latent = run("WuerstchenStageCSampler", model=tinies.model_c, positive=text("a cat"), negative=text(""),
                 latent=empty(), **C)  # fmt: skip
    run("WuerstchenStageBSampler", model=tinies.model_b, latent=latent, **QUICK_B)
    told = capfd.readouterr().err
    assert "Stage C: 100%" in told and "6/6" in told and "Stage B: 100%" in told and "2/2" in told


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_a_run_that_was_interrupted_leaves_nothing_behind(run, call, tinies, text, shown, empty, stop_at):
    """Between two that are not: a mask, a replaced attention and a preview included."""
    import comfy.model_management as management

    model = call("PerturbedAttentionGuidance", model=tinies.model_c, scale=2.0)
    mask = torch.zeros(1, 256, 256)
    mask[:, :, 128:] = 1
    start = {"samples": torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(4)), "noise_mask": mask}

    def stage_c():
        return run("WuerstchenStageCSampler", model=model, positive=text("a cat"), negative=text(""), latent=start,
                   **C, preview=True)  # fmt: skip

    def stage_b():
        return run("WuerstchenStageBSampler", model=tinies.model_b, latent=drawn, **{**QUICK_B, "steps": 6})

    def ksampler():
        return call("KSampler", model=model, seed=1, steps=6, cfg=2.0, sampler_name="dpmpp_2m_sde", scheduler="simple",
                    positive=text("a cat"), negative=text(""), latent_image=empty(), denoise=1.0)  # fmt: skip

    drawn = stage_c()
    network = tinies.model_c.model.diffusion_model
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for draw in (stage_c, stage_b, ksampler):
        shown.stop_at = None
        before = draw()
        shown.stop_at = stop_at
        with pytest.raises(management.InterruptProcessingException):
            draw()
        shown.stop_at = None
        assert apart(draw(), before) == 0
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_missing_file_is_told_by_comfyui_before_the_run(nodes, host_nodes, models, monkeypatch):
    import execution

    import nodes as comfyui

    monkeypatch.setattr(comfyui, "NODE_CLASS_MAPPINGS", {**host_nodes, **nodes})
    graph = {
        "1": {"class_type": "WuerstchenLoadStageA", "inputs": {"file": "wuerstchen_stage_a.safetensors"}},
        "2": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 0], "samples": ["3", 0]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }
    valid, _, _, wrong = asyncio.run(execution.validate_prompt("p", graph, None))
    [error] = wrong["1"]["errors"]
    assert not valid and "about 74 MB" in error["details"] and "huggingface.co/warp-ai/wuerstchen/" in error["details"]
