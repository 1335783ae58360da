"""The loaders: what comes out of whole sets and of single files."""

import shutil
from pathlib import Path

import pytest
import torch

import wuerstchen_core as w
from tests.comfyui.host import noise
from tests.reference import distance
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig

LOADERS = {  # node -> where its files lie, a file of that kind, the network of what it gives
    "WuerstchenLoadStageA": ("vae", "stage_a", lambda vae: vae.first_stage_model),
    "WuerstchenLoadStageB": ("diffusion_models", "stage_b", lambda model: model.model.diffusion_model),
    "WuerstchenLoadStageC": ("checkpoints", "stage_c", lambda model: model.model.diffusion_model),
    "WuerstchenLoadSemanticCompressor": (
        "clip_vision",
        "semantic_compressor",
        lambda vae: vae.first_stage_model.compressor,
    ),
}


@pytest.fixture
def load(run):
    def load(node_id, file, **more):
        dtype = {"weight_dtype": "default"} if node_id in ("WuerstchenLoadStageB", "WuerstchenLoadStageC") else {}
        return run(node_id, file=file, **dtype, **more)

    return load


@pytest.mark.parametrize("node_id", LOADERS)
def test_a_loader_gives_what_the_core_loads(load, models, tiny_folder, node_id):
    folder, kind, network_of = LOADERS[node_id]
    shutil.copy(tiny_folder / SET[kind], models / folder / "a.safetensors")
    network, expected = network_of(load(node_id, "a.safetensors")), getattr(w, f"load_{kind}")(tiny_folder / SET[kind])
    assert repr(network.config) == repr(expected.config) and not network.training
    ours, theirs = network.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("node_id", [*LOADERS, "WuerstchenLoadTextEncoder"])
def test_a_wrong_file_is_named(load, models, tiny_folder, node_id):
    folder, kind, _ = LOADERS.get(node_id, ("text_encoders", "text_encoder_c", None))
    other = "stage_c" if kind != "stage_c" else "stage_b"
    shutil.copy(tiny_folder / SET[other], models / folder / "wrong.safetensors")
    (models / folder / "cut.safetensors").write_bytes((tiny_folder / SET[kind]).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"wrong.safetensors: .*{other}"):
        load(node_id, "wrong.safetensors")
    with pytest.raises(ValueError, match="cut.safetensors: not a whole safetensors file"):
        load(node_id, "cut.safetensors")


def test_an_unknown_file_or_set_is_refused(load, run, models):
    with pytest.raises(ValueError, match="there is no such file in models/loras: put it into it"):
        run("WuerstchenLoadLoRA", model=run("WuerstchenLoadModel", model="mini")[0], file="none", strength=1.0)
    with pytest.raises(ValueError, match="no such file in models/vae, "):
        load("WuerstchenLoadStageA", "none.safetensors")
    with pytest.raises(ValueError, match="no whole set of that name in models/wuerstchen; take mini$"):
        run("WuerstchenLoadModel", model="none")


def test_outputs_are_in_the_schemas_order(nodes, run):
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

    kinds = {"MODEL": ModelPatcher, "CLIP": comfy.sd.CLIP, "VAE": comfy.sd.VAE}
    given = run("WuerstchenLoadModel", model="tiny", weight_dtype="default")
    outputs = nodes["WuerstchenLoadModel"].define_schema().outputs
    assert all(isinstance(one, kinds[output.get_io_type()]) for one, output in zip(given, outputs, strict=True))
    assert [given[0].model.STAGE, given[2].model.STAGE] == ["Stage C", "Stage B"]
    assert [given[4].latent_channels, given[5].latent_channels] == [4, 16]


@pytest.fixture
def own(models, tiny_folder):
    """A folder of models/wuerstchen with the tiny set in it, by the name "own"."""
    return Path(shutil.copytree(tiny_folder, models / "wuerstchen" / "own"))


def test_stage_b_gets_a_text_encoder_of_its_own_if_there_is_one(run, own):
    _, clip_c, _, clip_b, *_ = run("WuerstchenLoadModel", model="own")
    assert clip_b is clip_c
    shutil.copy(own / SET["text_encoder_c"], own / SET["text_encoder_b"])
    _, clip_c, _, clip_b, *_ = run("WuerstchenLoadModel", model="own")
    assert clip_b is not clip_c
    (own / SET["text_encoder_b"]).unlink()
    w.save(TextEncoder(TextEncoderConfig(width=48, layers=1, heads=2)), own / SET["text_encoder_c"])
    clip_b = run("WuerstchenLoadModel", model="own")[3]
    with pytest.raises(ValueError, match="no text encoder for Stage B, which draws without a prompt"):
        run("WuerstchenTextEncode", clip=clip_b, text="a cat")


def test_a_previewer_belongs_to_the_semantic_vae(run, load, own, models):
    """Of a set, or of a file beside the compressor's; without one each position is one colour."""
    torch.manual_seed(2)
    previewer = Previewer(PreviewerConfig(widths=(8, 8, 4, 4))).eval()
    latent = noise(1, 16, 3, 5)
    plain = run("WuerstchenLoadModel", model="own")[5].decode(latent)
    torch.testing.assert_close(plain, run("WuerstchenSemanticPreview", latent={"samples": latent}))
    w.save(previewer, own / SET["previewer"])
    w.save(previewer, models / "vae_approx" / "p.safetensors")
    shutil.copy(own / SET["semantic_compressor"], models / "clip_vision" / "a.safetensors")
    expected = previewer(latent).detach().clamp(0, 1).movedim(1, -1)
    stage_c, *_, of_set = run("WuerstchenLoadModel", model="own")
    of_file = load("WuerstchenLoadSemanticCompressor", "a.safetensors", previewer="p.safetensors")
    for vae in (of_set, of_file):
        assert distance(vae.decode(latent), expected) < 1e-5
    assert stage_c.model.latent_format.previewer is not None
    none = load("WuerstchenLoadSemanticCompressor", "a.safetensors", previewer="none: one colour a position")
    torch.testing.assert_close(none.decode(latent), plain)


def test_comfyuis_load_vae_takes_the_released_stage_a(call, run, models):
    """Its latents are ours: raw."""
    from wuerstchen_core.models.stage_a import VQGAN

    torch.manual_seed(3)
    network = VQGAN().eval()
    for parameter in network.parameters():
        parameter.data.normal_(std=0.05)
    w.save(network, models / "vae" / "a.safetensors")
    ours, theirs = run("WuerstchenLoadStageA", file="a.safetensors"), call("VAELoader", vae_name="a.safetensors")
    latent = {"samples": noise(1, 4, 16, 16)}
    images = [run("WuerstchenVQGANDecode", vae=vae, latent=latent) for vae in (ours, theirs)]
    assert images[0].std() > 0 and distance(*images) < 1e-3
    image = torch.rand(1, 64, 64, 3)
    encoded = [run("WuerstchenVQGANEncode", vae=vae, image=image)["samples"] for vae in (ours, theirs)]
    assert distance(*encoded) < 1e-3
