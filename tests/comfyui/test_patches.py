"""What changes the weights: LoRAs of every writer, merges, hooks, and models that ComfyUI saves."""

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.host import apart, noise
from tests.reference import distance

MODULES = [f"blocks.{block}.attention.to_{name}" for block in (2, 5) for name in ("q", "k", "v", "out.0")]
LAYOUTS = {  # of a module -> the names of its two halves and of its alpha
    "comfyui": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "diffusers": ("prior.{}", ".lora_A.weight", ".lora_B.weight", None),
    "peft": ("base_model.model.{}", ".lora_A.weight", ".lora_B.weight", None),
    "peft, named": ("{}", ".lora_A.default.weight", ".lora_B.default.weight", None),
    "bare": ("{}", ".lora_A.weight", ".lora_B.weight", None),
    "older diffusers": ("unet.{}", ".lora.down.weight", ".lora.up.weight", None),
    "processor": ("prior.{processor}", "_lora.down.weight", "_lora.up.weight", None),
    "kohya": ("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "OneTrainer": ("lora_prior_unet_{flat}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
}


def halves(module):
    generator = torch.Generator().manual_seed(len(module))
    return [torch.randn(shape, generator=generator) / 4 for shape in ((4, 32), (32, 4))]


def lora_file(path, layout, alpha=2.0, **more):
    name, down, up, scale = LAYOUTS[layout]
    tensors = dict(more)
    for module in MODULES:
        processor = module.replace("attention.to_", "attention.processor.to_").replace("to_out.0", "to_out")
        stem = name.format(module, flat=module.replace(".", "_"), processor=processor)
        tensors[stem + down], tensors[stem + up] = halves(module)
        if scale:
            tensors[stem + scale] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def weights_of(model):
    """The weights that a MODEL computes with."""
    import comfy.model_management as management

    management.load_models_gpu([model], force_patch_weights=True)
    network = model.model.diffusion_model
    return {module: network.get_submodule(module).weight.clone() for module in MODULES}


@pytest.fixture
def loras(models):
    return models / "loras"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoader", "WuerstchenLoadLoRA"])
def test_loras_of_every_writer_change_what_they_should(call, tinies, loras, layout, node):
    lora_file(loras / "a.safetensors", layout)
    options = {
        "LoraLoaderModelOnly": {"lora_name": "a.safetensors", "strength_model": 0.5},
        "LoraLoader": {
            "lora_name": "a.safetensors",
            "strength_model": 0.5,
            "strength_clip": 1.0,
            "clip": tinies.clip_c,
        },
        "WuerstchenLoadLoRA": {"file": "a.safetensors", "strength": 0.5},
    }[node]
    before = weights_of(tinies.model_c)
    changed = call(node, model=tinies.model_c, **options)
    after = weights_of(changed[0] if isinstance(changed, tuple) else changed)
    scale = 2.0 / 4 if LAYOUTS[layout][3] else 1.0
    for module in MODULES:
        down, up = halves(module)
        assert distance(after[module] - before[module], 0.5 * scale * up @ down) < 1e-4
    assert all(torch.equal(weight, before[module]) for module, weight in weights_of(tinies.model_c).items())


def test_dora_and_parts_of_other_networks(call, tinies, loras, caplog):
    """DoRA goes to ComfyUI's adapters; what belongs to no network is named, and the rest is not refused for it."""
    down, up = halves(MODULES[0])
    flat = "lora_prior_unet_" + MODULES[0].replace(".", "_")
    dora = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.dora_scale": torch.ones(32, 1)}
    save_file({**dora, "bundle_emb.thing.clip_g": torch.ones(1, 32)}, loras / "dora.safetensors")
    before = weights_of(tinies.model_c)
    changed = call("LoraLoaderModelOnly", model=tinies.model_c, lora_name="dora.safetensors", strength_model=1.0)
    assert "bundle_emb.thing.clip_g" in caplog.text and flat not in caplog.text
    after = weights_of(changed)[MODULES[0]]
    expected = (before[MODULES[0]] + up @ down) / before[MODULES[0]].norm(dim=1, keepdim=True)
    assert distance(after, expected) < 1e-3
    weights_of(tinies.model_c)


def test_lokr_goes_to_comfyuis_adapters(call, tinies, loras):
    generator = torch.Generator().manual_seed(1)
    small, large = (torch.randn(side, side, generator=generator) for side in (4, 8))
    flat = "lora_prior_unet_" + MODULES[0].replace(".", "_")
    save_file({f"{flat}.lokr_w1": small, f"{flat}.lokr_w2": large}, loras / "lokr.safetensors")
    before = weights_of(tinies.model_c)[MODULES[0]]
    changed = call("LoraLoaderModelOnly", model=tinies.model_c, lora_name="lokr.safetensors", strength_model=0.5)
    assert distance(weights_of(changed)[MODULES[0]] - before, 0.5 * torch.kron(small, large)) < 1e-4
    weights_of(tinies.model_c)


def test_our_node_names_what_is_not_of_stage_c(run, tinies, loras, caplog):
    stem = "lora_prior_te_text_model_encoder_layers_0_mlp_fc1"
    others = {f"{stem}.lora_down.weight": torch.ones(4, 32), f"{stem}.lora_up.weight": torch.ones(128, 4)}
    lora_file(loras / "both.safetensors", "OneTrainer", **others, **{"bundle_emb.thing.clip_g": torch.ones(1, 32)})
    lora_file(loras / "one.safetensors", "OneTrainer")
    for file in ("both", "one"):
        caplog.clear()
        run("WuerstchenLoadLoRA", model=tinies.model_c, file=f"{file}.safetensors", strength=1.0)
        told = [record.getMessage() for record in caplog.records if "not of Stage C" in record.getMessage()]
        assert len(told) == (file == "both")
        assert all("both.safetensors: 2 parts" in line and stem in line and "bundle_emb.thing" in line for line in told)


def test_text_encoder_parts_go_to_the_clip(call, tinies, loras, text):
    stem = "lora_prior_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{stem}.lora_down.weight": torch.ones(4, 32), f"{stem}.lora_up.weight": torch.ones(128, 4),
               f"{stem}.alpha": torch.tensor(4.0)}, loras / "te.safetensors")  # fmt: skip
    _, clip = call("LoraLoader", model=tinies.model_c, clip=tinies.clip_c, lora_name="te.safetensors",
                   strength_model=1.0, strength_clip=1.0)  # fmt: skip
    [[changed, _]] = call("CLIPTextEncode", clip=clip, text="a cat")
    assert distance(changed, text("a cat")[0][0]) > 1e-3


def test_several_loras_add_up_and_merges_halve(call, tinies, loras, ksampler, empty):
    lora_file(loras / "a.safetensors", "diffusers")

    def lora(model, strength):
        return call("WuerstchenLoadLoRA", model=model, file="a.safetensors", strength=strength)

    whole = ksampler(empty(), lora(tinies.model_c, 1.0))
    assert apart(whole, ksampler(empty())) > 0.01
    assert apart(ksampler(empty(), lora(lora(tinies.model_c, 0.25), 0.75)), whole) < 1e-3
    half = ksampler(empty(), lora(tinies.model_c, 0.5))
    simple = call("ModelMergeSimple", model1=tinies.model_c, model2=lora(tinies.model_c, 1.0), ratio=0.5)
    assert apart(ksampler(empty(), simple), half) < 1e-3
    blocks = call("ModelMergeBlocks", model1=tinies.model_c, model2=lora(tinies.model_c, 1.0), input=0.5, middle=0.5,
                  out=0.5)  # fmt: skip
    assert apart(ksampler(empty(), blocks), half) < 1e-3
    nothing = call("ModelMergeSubtract", model1=tinies.model_c, model2=tinies.model_c, multiplier=1.0)
    added = call("ModelMergeAdd", model1=lora(tinies.model_c, 1.0), model2=nothing)
    assert apart(ksampler(empty(), added), whole) < 1e-3


def test_hooks_change_weights_within_a_run(call, tinies, loras, text, ksampler, empty, condition_calls):
    lora_file(loras / "a.safetensors", "diffusers")
    hooks = call("CreateHookLoraModelOnly", lora_name="a.safetensors", strength_model=1.0)

    def hooked(prompt, hooks):
        return call("ConditioningSetProperties", cond_NEW=text(prompt), strength=1.0, set_cond_area="default",
                    hooks=hooks)  # fmt: skip

    with_lora = call("WuerstchenLoadLoRA", model=tinies.model_c, file="a.safetensors", strength=1.0)
    plain, whole = ksampler(empty()), ksampler(empty(), with_lora)
    both = ksampler(empty(), positive=hooked("a cat", hooks), negative=hooked("", hooks))
    assert apart(both, whole) < 1e-3 and apart(both, plain) > 0.01
    condition_calls.clear()
    one = ksampler(empty(), positive=hooked("a cat", hooks))
    assert min(apart(one, plain), apart(one, whole)) > 0.005 and len(condition_calls) > 2
    keyframes = call("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
    keyframes = call("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)
    scheduled = call("SetHookKeyframes", hooks=hooks, hook_kf=keyframes)
    later = ksampler(empty(), positive=hooked("a cat", scheduled), negative=hooked("", scheduled))
    assert min(apart(later, plain), apart(later, whole)) > 0.005
    assert apart(ksampler(empty()), plain) < 1e-5


def test_models_that_comfyui_saved_are_loaded_again(call, run, minis, models, tmp_path, monkeypatch, ksampler, empty):
    """Configurations are kept, too: the mini's latent space and the scale of its Stage A are not the released ones."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    for stage, loader in (("c", "WuerstchenLoadStageC"), ("b", "WuerstchenLoadStageB")):
        model = getattr(minis, f"model_{stage}")
        call("ModelSave", model=model, filename_prefix=f"stage_{stage}")
        [file] = tmp_path.glob(f"stage_{stage}*")
        file.rename(models / "diffusion_models" / file.name)
        again = run(loader, file=file.name, weight_dtype="default").model
        assert again.diffusion_model.config == model.model.diffusion_model.config
        assert again.latent_format.scale_factor == model.model.latent_format.scale_factor
        ours, theirs = again.diffusion_model.state_dict(), model.model.diffusion_model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for vae, folder, loader in ((minis.stage_a, "vae", "WuerstchenLoadStageA"),
                                (minis.semantic, "clip_vision", "WuerstchenLoadSemanticCompressor")):  # fmt: skip
        call("VAESave", vae=vae, filename_prefix=folder)
        [file] = tmp_path.glob(f"{folder}*")
        file.rename(models / folder / file.name)
        again = run(loader, file=file.name)
        samples = noise(1, vae.latent_channels, 16, 16)
        assert folder != "vae" or torch.equal(again.decode(samples), vae.decode(samples))
        image = torch.rand(1, 64, 64, 3)
        assert torch.equal(again.encode(image), vae.encode(image))
    call("CLIPSave", clip=minis.clip_c, filename_prefix="clip")
    [file] = tmp_path.glob("clip*")
    file.rename(models / "text_encoders" / file.name)
    again = run("WuerstchenLoadTextEncoder", file=file.name)
    ours, theirs = (call("CLIPTextEncode", clip=clip, text="a cat")[0][0] for clip in (again, minis.clip_c))
    assert distance(ours, theirs) < 1e-5


def test_a_whole_checkpoint_is_read_by_each_loader(call, run, minis, models, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    call("CheckpointSave", model=minis.model_b, clip=minis.clip_b, vae=minis.stage_a, filename_prefix="all")
    [file] = tmp_path.glob("all*")
    file.rename(models / "checkpoints" / file.name)
    assert run("WuerstchenLoadStageA", file=file.name).first_stage_model.config.scale_factor == pytest.approx(
        1.4456, 1e-4
    )
    assert run("WuerstchenLoadStageB", file=file.name, weight_dtype="default").model.STAGE == "Stage B"
    assert run("WuerstchenLoadTextEncoder", file=file.name)


def test_a_lora_is_extracted(call, tinies, models, loras, tmp_path, monkeypatch, ksampler, empty):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    lora_file(loras / "a.safetensors", "diffusers")
    changed = call("WuerstchenLoadLoRA", model=tinies.model_c, file="a.safetensors", strength=1.0)
    difference = call("ModelMergeSubtract", model1=changed, model2=tinies.model_c, multiplier=1.0)
    call("LoraSave", filename_prefix="extracted", rank=4, lora_type="standard", bias_diff=False,
         model_diff=difference)  # fmt: skip
    [file] = tmp_path.glob("extracted*")
    file.rename(loras / "extracted.safetensors")
    again = call("LoraLoaderModelOnly", model=tinies.model_c, lora_name="extracted.safetensors", strength_model=1.0)
    extracted, original, plain = (ksampler(empty(), model) for model in (again, changed, tinies.model_c))
    assert apart(extracted, original) < 0.3 * apart(plain, original)  # it is written in half precision
