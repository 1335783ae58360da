"""Networks of which a part lies on the device, as with --lowvram and --novram.

The device is torch's "meta": a weight that was left on the CPU and is not brought to it when it is used meets tensors
of another device, and torch refuses that.
"""

import pytest
import torch

from tests.comfyui.host import load_set
from tests.comfyui.test_patches import lora_file
from tests.reference import distance

META = torch.device("meta")


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("stage", ["c", "b"])
def test_what_is_left_behind_is_brought_when_it_is_used(run, stage, weight_dtype, share):
    """Normalisation's gammas, the mappers of the semantic latent and all else."""
    patcher = getattr(load_set(run, "mini", weight_dtype), f"model_{stage}")
    network = patcher.model.diffusion_model
    with torch.inference_mode():
        patcher.partially_load(META, share * patcher.model_size() + 0.1)
        devices = [weight.device.type for weight in (*network.parameters(), *network.buffers())]
        assert devices.count("cpu") > (1 - share) * len(devices) / 4 and ("meta" in devices) >= (share > 0)
        with META:
            x, text, t = torch.empty(1, *((16, 6, 6) if stage == "c" else (4, 64, 64))), torch.empty(1, 77, 192), [0.5]
            inputs = (text,) if stage == "c" else (torch.empty(1, 16, 6, 6), text, (64, 64))
            noise = network(x, torch.tensor(t), condition=network.condition(*inputs))
    assert noise.device == META and noise.shape == x.shape and noise.dtype == torch.float32


@pytest.fixture
def sparing(monkeypatch):
    """sparing(state) -> ComfyUI takes the CPU for a device with little memory, and counts the layers it casts."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    counted, load = [], ModelPatcher.load

    def sparingly(patcher, device, memory=0, **options):
        whole = memory == 0  # which the VAEs ask for
        options = {**options, "lowvram_model_memory": 0 if whole else min(memory, patcher.model_size() / 4)}
        load(patcher, device, **{**options, "full_load": whole})
        layers = patcher.model.modules()
        counted.append(sum(hasattr(layer, "prev_comfy_cast_weights") for layer in layers))

    def sparing(state):
        management.unload_all_models()
        monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
        monkeypatch.setattr(ModelPatcher, "load", lambda patcher, device_to=None, lowvram_model_memory=0, **options:
                            sparingly(patcher, device_to, lowvram_model_memory, **options))  # fmt: skip
        return counted

    yield sparing
    monkeypatch.undo()
    management.unload_all_models()


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_little_memory_gives_the_same_picture(call, run, tinies, text, ksampler, empty, sparing, models, state):
    """Text to image with a LoRA by the KSamplers, and the latent of that picture."""
    lora_file(models / "loras" / "a.safetensors", "diffusers")

    def draw():
        model = call("LoraLoaderModelOnly", model=tinies.model_c, lora_name="a.safetensors", strength_model=1.0)
        latent = ksampler(empty(), model)
        positive, negative, start = call("WuerstchenStageBConditioning", latent=latent, positive=text("a cat"))
        fine = ksampler(start, tinies.model_b, positive, negative, cfg=1.0)
        image = run("WuerstchenVQGANDecode", vae=tinies.stage_a, latent=fine)
        return image, call("VAEEncode", vae=tinies.semantic, pixels=image)["samples"]

    plain = draw()
    counted = sparing(state)
    for ours, expected in zip(draw(), plain, strict=True):
        assert distance(ours, expected) < 1e-4
    assert sum(count > 0 for count in counted) >= 3  # text encoder, Stage C and Stage B


@pytest.mark.parametrize("name", ["stage_a", "semantic"])
def test_vaes_are_loaded_whole_even_with_no_memory_to_spare(run, monkeypatch, name):
    import comfy.model_management as management

    vae = getattr(load_set(run, "tiny"), name)
    vae.patcher.detach()  # loading a set has used Stage A
    vae.patcher.load_device = META
    management.LoadedModel(vae.patcher).model_load(0.1)  # as --novram does
    tensors = (*vae.first_stage_model.parameters(), *vae.first_stage_model.buffers())
    assert {tensor.device for tensor in tensors} == {META}
