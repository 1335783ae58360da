"""Precision, partial loading, memory estimates, previews and interruption."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.allocated import allocated
from tests.comfyui.host import apart, load_set, noise
from tests.reference import distance
from wuerstchen_core import Geometry
from wuerstchen_core.models.stage_b import DiffNeXt
from wuerstchen_core.models.stage_c import Prior

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_are_kept_narrow_and_computed_in_the_devices_precision(call, run, minis, ksampler, empty, weight_dtype):
    narrow = load_set(run, "mini", weight_dtype)
    limit = {"fp16": 1e-5, "bf16": 0.02, "fp8_e4m3fn": 0.2}[weight_dtype]  # the mini's files are of float16
    positive, negative = (
        call("CLIPTextEncode", clip=minis.clip_c, text=text) for text in ("red apple, noto style", "")
    )
    latent = ksampler(empty(), minis.model_c, positive, negative, steps=8)
    conditioned = call("WuerstchenStageBConditioning", latent=latent, positive=positive)
    for ours, exact, start, prompts, steps, cfg in (
        (narrow.model_c, minis.model_c, empty(), (positive, negative), 8, 2.0),
        (narrow.model_b, minis.model_b, conditioned[2], conditioned[:2], 4, 1.0),
    ):
        model = ours.model
        assert {weight.dtype for weight in model.diffusion_model.parameters()} == {DTYPES[weight_dtype]}
        assert (model.manual_cast_dtype or model.get_dtype()) == torch.float32  # on the CPU
        drawn, expected = (ksampler(start, model, *prompts, steps=steps, cfg=cfg) for model in (ours, exact))
        assert apart(drawn, expected) < limit


@pytest.mark.parametrize("stage", ["c", "b"])
def test_a_part_in_memory_is_enough(call, tinies, models, stage):
    """Layers that are left behind are cast when they are used, with what is patched into them."""
    patcher = getattr(tinies, f"model_{stage}").clone()
    network = patcher.model.diffusion_model
    x, t = (noise(1, 16, 6, 6), noise(1, 9, 32)) if stage == "c" else (noise(1, 4, 32, 32), noise(1, 16, 3, 3))
    inputs = (t,) if stage == "c" else (t, noise(1, 9, 32), (32, 32))
    keys = [name for name in patcher.model.state_dict() if name.endswith(("to_q.weight", "mapper.weight"))]
    patcher.add_patches({name: ("diff", (torch.full_like(patcher.model.state_dict()[name], 0.1),)) for name in keys})

    def computed(memory, **options):
        with torch.inference_mode():
            patcher.unpatch_model(patcher.offload_device)
            patcher.load(patcher.load_device, lowvram_model_memory=memory, **options)
            casting = sum(bool(getattr(layer, "comfy_cast_weights", False)) for layer in network.modules())
            return casting, network(x, torch.tensor([0.5]), condition=network.condition(*inputs))

    none, whole = computed(0, full_load=True)
    some, part = computed(patcher.model_size() // 4)
    patcher.unpatch_model(patcher.offload_device)
    patcher.model.model_loaded_weight_memory = 0
    assert none == 0 and some > 10 and distance(part, whole) < 1e-5


def test_every_weight_that_is_stored_narrow_is_cast(run, minis):
    """A layer or parameter that takes its weights as they are would meet other dtypes here and fail."""
    narrow = load_set(run, "mini", "fp8_e4m3fn")
    with torch.inference_mode():
        for model, x, inputs in (
            (narrow.model_c, noise(1, 16, 6, 6), (noise(1, 77, 192),)),
            (narrow.model_b, noise(1, 4, 64, 64), (noise(1, 16, 6, 6), None, (64, 64))),
        ):
            network = model.model.diffusion_model
            assert network(x, torch.tensor([0.5]), condition=network.condition(*inputs)).dtype == torch.float32


def test_the_vaes_are_never_loaded_in_part(tinies):
    assert tinies.stage_a.disable_offload and tinies.semantic.disable_offload


def step_of(network, geometry):
    """A step with guidance."""

    def step():
        tokens = torch.empty(2, 77, network.config.text_width)
        semantic, fine = torch.empty(2, 16, *geometry.stage_c), torch.empty(2, 4, *geometry.stage_a)
        if isinstance(network, Prior):
            condition, x = network.condition(tokens), semantic
        else:
            condition, x = network.condition(semantic, tokens, fine.shape[-2:]), fine
        network.denoise(x, [row[:1] for row in network.modulate(torch.empty(12), torch.float32)], condition)

    return step


@pytest.mark.parametrize(
    ("stage", "kind", "sides"), [("c", Prior, (512, 1024, 4096)), ("b", DiffNeXt, (512, 1024, 4096))]
)
def test_memory_estimates_are_what_the_released_stages_take(tinies, stage, kind, sides):
    """In float32, and with guidance, as ComfyUI asks for it."""
    with torch.device("meta"):
        network = kind().eval()
    model = getattr(tinies, f"model_{stage}").model
    for side in sides:
        geometry = Geometry(side, side)
        shape = [2, *((16, *geometry.stage_c) if stage == "c" else (4, *geometry.stage_a))]
        needed = allocated(network, step_of(network, geometry))
        assert needed <= model.memory_required(shape) <= 1.5 * needed
    longer = model.memory_required(shape, {"c_crossattn": [[1, 77, 32], [1, 154, 32]]})
    assert longer > model.memory_required(shape)


class Bar:
    """ComfyUI's hook for progress, as its server sets it."""

    def __init__(self):
        self.previews = []

    def __call__(self, value, total, preview=None, node_id=None):
        self.previews.append(preview)


@pytest.fixture
def bar(monkeypatch):
    import comfy.utils

    bar = Bar()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", bar)
    return bar


@pytest.mark.parametrize("method", ["auto", "latent2rgb", "taesd", "none"])
@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_live_previews(call, run, tinies, minis, ksampler, empty, bar, monkeypatch, name, method):
    """The mini's previewer shows 8 pixels a position; a set without one, or by latent2rgb, one colour a position."""
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod(method))
    networks = minis if name == "mini" else tinies
    positive = call("CLIPTextEncode", clip=networks.clip_c, text="red apple")
    for sample in (
        lambda: ksampler(empty(), networks.model_c, positive, positive, steps=3),
        lambda: run("WuerstchenStageCSampler", model=networks.model_c, positive=positive, negative=positive,
                    latent=empty(), seed=1, steps=3, cfg=2.0, sampler="ddpm", schedule="even", denoise=1.0),
    ):  # fmt: skip
        bar.previews.clear()
        sample()
        shown = [preview for preview in bar.previews if preview]
        assert len(shown) == (0 if method == "none" else 3)
        side = 48 if name == "mini" and method in ("auto", "taesd") else 6
        assert all(picture.size == (side, side) for _, picture, _ in shown)


def test_stage_b_shows_the_colours_of_its_stage_a(call, run, mini, minis, ksampler, bar, monkeypatch):
    """The latents of two pictures, reduced to a position a pixel, beside what they are shown as."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 64)], indexing="ij")
    disc = (x**2 + y**2 < 0.5)[..., None].float()
    for inner, outer in (((0.9, 0.1, 0.1), (0.1, 0.2, 0.8)), ((0.1, 0.6, 0.2), (0.9, 0.8, 0.2))):
        image = torch.lerp(torch.tensor(outer), torch.tensor(inner), disc)[None]
        latent = mini.stage_a.encode(image.movedim(3, 1))
        shown = latent_preview.get_previewer("cpu", minis.model_b.model.latent_format).decode_latent_to_preview(latent)
        shown = torch.from_numpy(np.array(shown)).float() / 255
        reduced = F.avg_pool2d(image.movedim(3, 1), 4)[0].movedim(0, 2)
        assert (shown - reduced).square().mean().sqrt() < 0.2 < 0.3 < (shown - reduced.flip(2)).square().mean().sqrt()
    positive, negative, start = call("WuerstchenStageBConditioning", latent={"samples": noise(1, 16, 3, 3)})
    ksampler(start, minis.model_b, positive, negative, steps=3, cfg=1.0)
    assert [preview[1].size for preview in bar.previews if preview] == 3 * [(32, 32)]


def test_a_run_can_be_interrupted(run, tinies, text, empty, monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    def interrupt(value, total, preview=None, node_id=None):
        if value == 2:
            raise management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
    options = {"seed": 1, "steps": 6, "cfg": 2.0, "sampler": "ddpm", "schedule": "even", "denoise": 1.0}
    inputs = {"model": tinies.model_c, "positive": text("a cat"), "negative": text(""), "latent": empty(), **options}
    with pytest.raises(management.InterruptProcessingException):
        run("WuerstchenStageCSampler", **inputs)
    monkeypatch.undo()
    assert run("WuerstchenStageCSampler", **inputs)["samples"].isfinite().all()


def test_the_network_is_what_the_host_calls(tinies):
    """Names of weights as LoRAs have them: nothing nests the network."""
    names = list(tinies.model_c.model.state_dict())
    assert "diffusion_model.blocks.2.attention.to_q.weight" in names
