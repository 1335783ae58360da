"""Nodes that users put one behind the other: what they do together is what they do one by one."""

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.host import apart, noise, picture

HALVES = {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)}


@pytest.fixture
def two_loras(call, tinies, models):
    """Takes a MODEL through two LoRAs."""
    for name, module in (("keys", "to_k"), ("values", "to_v")):
        tensors = {
            f"prior.blocks.2.attention.{module}.{half}": noise(*shape, seed=len(half)) / 3
            for half, shape in HALVES.items()
        }
        save_file(tensors, models / "loras" / f"{name}.safetensors")

    def chained(model):
        for name, strength in (("keys", 1.0), ("values", 0.7)):
            model = call("LoraLoaderModelOnly", model=model, lora_name=f"{name}.safetensors", strength_model=strength)
        return model

    return chained


def test_two_loras_and_a_compiled_model_in_either_order(call, tinies, ksampler, empty, two_loras):
    def compiled(model):
        return call("TorchCompileModel", model=model, backend="eager")

    plain, changed = ksampler(empty()), ksampler(empty(), two_loras(tinies.model_c))
    assert apart(changed, plain) > 1e-3
    for model in (compiled(two_loras(tinies.model_c)), two_loras(compiled(tinies.model_c))):
        assert apart(ksampler(empty(), model), changed) < 1e-4
    assert apart(ksampler(empty()), plain) < 1e-6


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_a_patched_model_is_saved_with_its_patches(
    call, run, tinies, models, tmp_path, monkeypatch, ksampler, empty, two_loras, compiled
):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patched = two_loras(tinies.model_c)
    saved = call("TorchCompileModel", model=patched, backend="eager") if compiled else patched
    call("ModelSave", model=saved, filename_prefix="patched")
    [file] = tmp_path.glob("patched*.safetensors")
    file.rename(models / "diffusion_models" / file.name)
    again = run("WuerstchenLoadStageC", file=file.name, weight_dtype="default")
    assert apart(ksampler(empty(), again), ksampler(empty(), patched)) < 1e-5


def test_a_soft_mask_lets_go_column_by_column(call, tinies, ksampler):
    """The darker a mask is, the later DifferentialDiffusion frees a position of the latent; where it is black, never.
    Six columns of the mask, each a position of Stage C wide."""
    kept = call("VAEEncode", vae=tinies.semantic, pixels=picture(256, 256))
    shades = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    mask = torch.tensor(shades).repeat_interleave(32).expand(1, 192, -1).contiguous()
    masked = call("SetLatentNoiseMask", samples=kept, mask=mask)
    model = call("DifferentialDiffusion", model=tinies.model_c)
    steps = 20
    free = ksampler(kept, steps=steps, cfg=1.0)["samples"]
    drawn = ksampler(masked, model[0] if isinstance(model, tuple) else model, steps=steps, cfg=1.0)["samples"]
    change, whole = ((one - kept["samples"]).square().mean(dim=(0, 1, 2)).sqrt() for one in (drawn, free))
    assert change[0] < 1e-5 and (change[1:] > 0.05 * whole[1:]).all()
    assert change[-1] > change[1]


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "uni_pc"])
def test_three_ksamplers_go_the_way_of_one(call, tinies, text, ksampler, empty, sampler):
    """But for the steps that a multistep sampler remembers, which it begins anew."""
    latent = empty()
    for number, (start, end) in enumerate(((0, 8), (8, 16), (16, 10_000))):
        latent = call("KSamplerAdvanced", model=tinies.model_c, noise_seed=1, steps=24, cfg=2.0, sampler_name=sampler,
                      scheduler="simple", positive=text("a cat"), negative=text(""), latent_image=latent,
                      add_noise="disable" if number else "enable", start_at_step=start, end_at_step=end,
                      return_with_leftover_noise="disable" if number == 2 else "enable")  # fmt: skip
    whole = ksampler(empty(), steps=24, sampler_name=sampler)
    assert apart(latent, whole) < (1e-4 if sampler in ("euler", "ddim") else 0.1)


def test_a_cache_skips_steps_of_the_mini(call, minis, ksampler, empty, monkeypatch):
    """The network runs the fewer times the higher EasyCache's threshold is, and at every step without one."""
    prompt, nothing = (call("CLIPTextEncode", clip=minis.clip_c, text=words) for words in ("red apple", ""))
    network, runs = minis.model_c.model.diffusion_model, []
    denoise = network.denoise
    monkeypatch.setattr(network, "denoise", lambda *given: runs.append(1) or denoise(*given))
    counts, latents = [], []
    for threshold in (0.0, 0.2, 1.0):
        model = call("EasyCache", model=minis.model_c, reuse_threshold=threshold, start_percent=0.15,
                     end_percent=0.95, verbose=False)  # fmt: skip
        runs.clear()
        latents.append(ksampler(empty(), model, prompt, nothing, steps=30))
        counts.append(len(runs))
    assert counts[0] == 30 > counts[1] > counts[2]
    assert all(0.05 < apart(latent, latents[0]) < 0.8 for latent in latents[1:])
