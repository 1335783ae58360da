"""Files of weights in every layout that the loaders take, written by the libraries that have them, and bad files.

What would make a picture wrong without an error, and is therefore looked for in numbers: queries, keys and values in
another order; a wrong number of heads; the semantic latent's columns taken for those of the way down; the raw weights
instead of the EMA; the vision tower instead of the text tower; a network built smaller than its file.
"""

import os
import pickle
import re
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_common import AttnBlock
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import efficientnet_v2_l, efficientnet_v2_s
from torchvision.transforms.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import wuerstchen_core as w
from tests.reference import distance, randomise
from wuerstchen_core.benchmark import peak_growth
from wuerstchen_core.checkpoints import files
from wuerstchen_core.checkpoints.archive import Archive, open_archive
from wuerstchen_core.checkpoints.convert import sources
from wuerstchen_core.checkpoints.layouts import part_at, places
from wuerstchen_core.cli import main
from wuerstchen_core.models.latent_space import LatentSpace
from wuerstchen_core.models.semantic_compressor import EFFICIENTNET_V2_S, SemanticCompressor, SemanticCompressorConfig
from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.models.stage_b import StageBConfig
from wuerstchen_core.models.stage_c import StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoderConfig

TOLERANCE = 1e-4
LOADERS = {
    "stage_a": w.load_stage_a,
    "stage_b": w.load_stage_b,
    "stage_c": w.load_stage_c,
    "semantic_compressor": w.load_semantic_compressor,
    "text_encoder": w.load_text_encoder,
}
PROMPTS = ["a cat", "an oil painting of a lighthouse by the sea in a storm"]
CLIP_TEXT = {"width": 128, "heads": 2, "layers": 2}


class PublishedAttnBlock(AttnBlock):
    """The block as the authors have it: PyTorch's own attention, with one matrix for queries, keys and values."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.norm, self.kv_mapper = block.norm, block.kv_mapper
        self.attention = nn.Module()
        width, heads = block.attention.to_q.in_features, block.attention.heads
        self.attention.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x, kv):
        tokens = self.norm(x).flatten(2).mT
        kv = torch.cat([tokens, self.kv_mapper(kv)], dim=1)
        return x + self.attention.attn(tokens, kv, kv, need_weights=False)[0].mT.reshape(x.shape)


def as_published(network):
    for blocks in [module for module in network.modules() if isinstance(module, nn.ModuleList)]:
        for i, block in enumerate(blocks):
            if isinstance(block, AttnBlock):
                blocks[i] = PublishedAttnBlock(block)
    return network


class PublishedCompressor(nn.Module):
    def __init__(self, backbone=efficientnet_v2_s, affine=True):
        super().__init__()
        self.backbone = backbone().features
        self.mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16, affine=affine))

    def forward(self, image):
        return self.mapper(self.backbone(normalize(image, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])))


class Renamed(nn.Module):
    """A network whose weights are saved under other names."""

    def __init__(self, network, rename):
        super().__init__()
        self.network, self.rename = network, rename

    def state_dict(self):
        return {self.rename(name): tensor for name, tensor in self.network.state_dict().items()}

    def load_state_dict(self, weights):
        self.network.load_state_dict(dict(zip(self.network.state_dict(), weights.values())))


def prior(published=False):
    network = WuerstchenPrior(c_in=16, c=128, c_cond=40, c_r=64, depth=3, nhead=2)
    network = randomise(as_published(network) if published else network)
    for parameter in network.out.parameters():
        parameter.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    return network


def decoder(published=False):
    network = WuerstchenDiffNeXt(
        c_hidden=[32, 64, 128, 128], nhead=[-1, 1, 2, 2], blocks=[1, 2, 2, 1], c_cond=48, clip_embd=40
    )
    return randomise(as_published(network) if published else network)


def vqgan(published=False):
    network = randomise(PaellaVQModel(embed_dim=48, bottleneck_blocks=3, num_vq_embeddings=64))
    return Renamed(network, lambda name: name.replace(".embedding.", ".codebook.")) if published else network


def clip_text_config():
    return CLIPTextConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        projection_dim=24,
    )


def clip_text():
    return randomise(CLIPTextModel(clip_text_config()))


def clip_of_comfyui():
    """clip_g.safetensors: `text_model.…`, the projection and a buffer of older versions beside it."""
    network = randomise(CLIPTextModelWithProjection(clip_text_config()))
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in network.state_dict()
    return network


def clip_of_transformers():
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return randomise(CLIPModel(CLIPConfig(text_config=clip_text_config().to_dict(), vision_config=vision)))


def clip_of_open_clip():
    vision = {"image_size": 28, "patch_size": 14, "width": 128, "head_width": 64, "layers": 2}
    text = {"context_length": 77, "vocab_size": 49408, **CLIP_TEXT}
    return randomise(open_clip.CLIP(24, vision, text))


def run_stage_a(network):
    image = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    if isinstance(network, VQGAN):
        latent = network.encode(image)
        return torch.cat([latent.flatten(), network.decode(latent).flatten(), network.quantize(latent)[0].flatten()])
    network = getattr(network, "network", network)
    latent = network.encode(image).latents
    quantized = network.vquantizer(latent)[0]
    decoded = network.decode(latent).sample
    return torch.cat([latent.flatten() / 0.3764, decoded.flatten(), quantized.flatten() / 0.3764])


def run_stage_b(network):
    draw = torch.Generator().manual_seed(1)
    x, semantic = torch.randn(2, 4, 32, 16, generator=draw), torch.randn(2, 16, 3, 2, generator=draw)
    return network(x, torch.tensor([1.0, 0.4]), semantic, torch.randn(2, 9, 40, generator=draw))


def run_stage_c(network):
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 6, 4, generator=draw), torch.randn(2, 9, 40, generator=draw)
    return network(x, torch.tensor([0.9, 0.1]), text)


def run_semantic_compressor(network):
    return network(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)))


def run_text_encoder(network):
    """Up to the end token: behind it open_clip attends to padding."""
    tokens = open_clip.SimpleTokenizer(context_length=77)(PROMPTS)
    lengths = tokens.argmax(dim=1) + 1
    if isinstance(network, open_clip.CLIP):
        h = network.token_embedding(tokens) + network.positional_embedding
        hidden = network.ln_final(network.transformer(h, attn_mask=network.attn_mask))
    elif hasattr(network, "tower"):
        hidden = network(PROMPTS)
    else:
        network = getattr(network, "text_model", network)
        padded = tokens.masked_fill(torch.arange(77) >= lengths[:, None], 49407)
        hidden = network(input_ids=padded).last_hidden_state
    return torch.cat([row[:length] for row, length in zip(hidden, lengths)])


RUNS = {
    "stage_a": run_stage_a,
    "stage_b": run_stage_b,
    "stage_c": run_stage_c,
    "semantic_compressor": run_semantic_compressor,
    "text_encoder": run_text_encoder,
}

# name: (kind, network, its state dict -> what the file holds); what is a dictionary of dictionaries is a .pt file.
LAYOUTS = {
    "vqgan_f4_v1_500k.pt": ("stage_a", lambda: vqgan(published=True), lambda weights: {"state_dict": weights}),
    "vqgan of diffusers": ("stage_a", vqgan, dict),
    "stage_a.safetensors of Stable Cascade": ("stage_a", lambda: vqgan(published=True), dict),
    "model_v2_stage_b.pt": (
        "stage_b",
        lambda: decoder(published=True),
        lambda weights: {"state_dict": weights, "effnet_state_dict": small_compressor(), "iter": 7},
    ),
    "decoder of diffusers": ("stage_b", decoder, dict),
    "model_v2_stage_c.pt": (
        "stage_c",
        lambda: prior(published=True),
        lambda weights: {"ema_state_dict": weights, "state_dict": off(weights), "optimizer_state_dict": adam(weights)},
    ),
    "finetune without EMA": ("stage_c", lambda: prior(published=True), lambda weights: {"state_dict": weights}),
    "finetune, bare": ("stage_c", lambda: prior(published=True), dict),
    "prior of diffusers": ("stage_c", prior, dict),
    "compressor in model_v2_stage_b.pt": (
        "semantic_compressor",
        PublishedCompressor,
        lambda weights: {"state_dict": decoder(published=True).state_dict(), "effnet_state_dict": weights},
    ),
    "compressor by itself": ("semantic_compressor", PublishedCompressor, dict),
    "open_clip": ("text_encoder", clip_of_open_clip, dict),
    "open_clip, in training": (
        "text_encoder",
        clip_of_open_clip,
        lambda weights: {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
    ),
    "open_clip's text tower of its own": (
        "text_encoder",
        clip_of_open_clip,
        lambda weights: {("" if name.startswith("visual") else "text.") + name: weights[name] for name in weights},
    ),
    "transformers' text model": ("text_encoder", clip_text, dict),
    "transformers' text and vision": ("text_encoder", clip_of_transformers, dict),
    "clip_g.safetensors": (
        "text_encoder",
        clip_of_comfyui,
        lambda weights: weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    ),
    "saved by ComfyUI": (
        "text_encoder",
        clip_of_comfyui,
        lambda weights: {f"clip_g.transformer.{name}": tensor for name, tensor in weights.items()},
    ),
}


def off(weights):
    """Other weights of the same names and shapes: what must not be loaded."""
    return {name: tensor * 1.5 + 0.1 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def adam(weights):
    state = {i: {"step": torch.tensor(3.0), "exp_avg": tensor} for i, tensor in enumerate(weights.values())}
    return {"state": state, "param_groups": [{"lr": 1e-4, "params": list(state)}]}


def small_compressor():
    stages = tuple(EFFICIENTNET_V2_S[i]._replace(layers=2) for i in (0, 1, 3))
    network = SemanticCompressor(SemanticCompressorConfig(stem=24, stages=stages, features=16))
    return randomise(network).state_dict()


def cast(content, dtype):
    if isinstance(content, dict):
        return {name: cast(value, dtype) for name, value in content.items()}
    if isinstance(content, torch.Tensor):
        return content.to(dtype).contiguous() if content.is_floating_point() else content
    return content


def write(content, path):
    nested = any(isinstance(value, dict) for value in content.values())
    path = path.with_suffix(".pt" if nested else path.suffix)
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    kind, build, wrap = LAYOUTS[request.param]
    network = randomise(build()) if build is PublishedCompressor else build()
    return kind, network, wrap


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_every_layout_gives_its_networks_numbers(layout, tmp_path, suffix):
    kind, theirs, wrap = layout
    path = write(wrap(theirs.state_dict()), tmp_path / f"weights{suffix}")
    ours = LOADERS[kind](path)
    assert distance(RUNS[kind](ours), RUNS[kind](theirs)) < TOLERANCE
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in ours.state_dict().values())
    assert not ours.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_layout_loads_in_half_precision(layout, tmp_path, dtype):
    kind, theirs, wrap = layout
    half = cast(theirs.state_dict(), dtype)
    path = write(wrap(half), tmp_path / "half.safetensors")
    kept = LOADERS[kind](path, dtype=dtype)
    assert {value.dtype for value in kept.state_dict().values() if value.is_floating_point()} == {dtype}
    ours = LOADERS[kind](path)
    assert {value.dtype for value in ours.state_dict().values() if value.is_floating_point()} == {torch.float32}
    original = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(cast(half, torch.float32))
    expected = RUNS[kind](theirs)
    theirs.load_state_dict(original)
    assert distance(RUNS[kind](ours), expected) < TOLERANCE


@torch.no_grad()
def test_every_layout_is_converted_to_ours(layout, tmp_path, capsys):
    kind, theirs, wrap = layout
    path = write(cast(wrap(theirs.state_dict()), torch.bfloat16), tmp_path / "weights.safetensors")
    out = tmp_path / "ours.safetensors"
    assert main(["convert", str(path), "-o", str(out), "--part", kind]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    converted, direct = LOADERS[kind](out, dtype=None), LOADERS[kind](path, dtype=None)
    assert converted.config == direct.config
    weights = converted.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in direct.state_dict().items())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.bfloat16}
    del weights, converted, direct
    assert main(["convert", str(out), "-o", str(out), "--dtype", "float16"]) == 0
    assert {value.dtype for value in load_file(out).values() if value.is_floating_point()} == {torch.float16}


def test_every_layout_is_inspected(layout, tmp_path, capsys):
    kind, theirs, wrap = layout
    path = write(cast(wrap(theirs.state_dict()), torch.float16), tmp_path / "weights.safetensors")
    network = LOADERS[kind](path)
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert f"{kind}: load_{kind} takes it" in told and "float16" in told
    assert f"{sum(parameter.numel() for parameter in network.parameters()):,}" in told
    for field in ("width", "depth", "widths", "layers", "heads"):
        if hasattr(network.config, field):
            assert re.search(rf"  {field} +{re.escape(str(getattr(network.config, field)))}\n", told)


def test_weights_in_our_names_need_no_metadata(tmp_path):
    for kind, build in {"stage_b": decoder, "stage_c": prior, "text_encoder": clip_of_open_clip}.items():
        write(build().state_dict(), tmp_path / "theirs.safetensors")
        network = LOADERS[kind](tmp_path / "theirs.safetensors")
        write(network.state_dict(), tmp_path / "bare.safetensors")
        assert distance(RUNS[kind](LOADERS[kind](tmp_path / "bare.safetensors")), RUNS[kind](network)) == 0


def test_a_folder_of_diffusers_is_its_file(tmp_path):
    (tmp_path / "prior").mkdir()
    write(prior().state_dict(), tmp_path / "prior" / "diffusion_pytorch_model.safetensors")
    assert w.load_stage_c(tmp_path / "prior").config.width == 128
    with pytest.raises(w.WuerstchenError, match="a folder"):
        w.load_stage_c(tmp_path)


def on_paper(build):
    """An archive of a network's names and shapes, without memory for its weights."""
    with torch.device("meta"):
        return Archive(Path("paper.pt"), "PyTorch", build().state_dict())


H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@pytest.mark.parametrize(
    "kind, build, config",
    [
        ("stage_a", PaellaVQModel, StageAConfig()),
        ("stage_b", lambda: as_published(WuerstchenDiffNeXt()), StageBConfig()),
        ("stage_c", lambda: WuerstchenPrior(c=1536, c_cond=1280, depth=32, nhead=24), StageCConfig()),
        ("stage_c", lambda: as_published(WuerstchenPrior(c=1536, depth=32, nhead=24)), StageCConfig(text_width=1024)),
        ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**G)), TextEncoderConfig()),
        ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**H)), TextEncoderConfig(1024, 24, 16)),
        ("semantic_compressor", PublishedCompressor, SemanticCompressorConfig()),
    ],
    ids=["A", "B", "C", "C of v1", "bigG", "H", "compressor"],
)
def test_released_configurations_are_read_from_shapes(kind, build, config):
    archive = on_paper(build)
    part = part_at(archive, kind, places(archive)[kind])
    assert part.config == config
    files.sources(archive, part, files._shapes(files._empty(archive, part)))


def test_the_first_versions_compressor_has_latents_of_its_own():
    archive = on_paper(lambda: PublishedCompressor(efficientnet_v2_l))
    part = part_at(archive, "semantic_compressor", "")
    files.sources(archive, part, files._shapes(files._empty(archive, part)))
    assert part.config.latent_space == LatentSpace(shift=0.0, scale=1.0)
    assert [stage.layers for stage in part.config.stages] == [4, 7, 7, 10, 19, 25, 7]
    assert [stage.stride for stage in part.config.stages] == [1, 2, 2, 2, 1, 2, 1]


@pytest.fixture(scope="module")
def whole_stage_b(tmp_path_factory):
    path = tmp_path_factory.mktemp("b") / "model_v2_stage_b.pt"
    torch.save({"state_dict": decoder(True).state_dict(), "effnet_state_dict": small_compressor()}, path)
    return path


def test_stage_b_is_converted_with_its_compressor(whole_stage_b, tmp_path, capsys):
    assert main(["convert", str(whole_stage_b), "-o", str(tmp_path / "b.safetensors")]) == 2
    assert "semantic_compressor and stage_b: name one with --part" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["convert", str(whole_stage_b), "-o", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"stage_b.safetensors", "semantic_compressor.safetensors"}
    w.load_semantic_compressor(tmp_path / "semantic_compressor.safetensors")
    assert main(["convert", str(whole_stage_b), "-o", str(tmp_path), "--part", "stage_c"]) == 2
    assert "no stage_c in it" in capsys.readouterr().err


def test_what_cannot_be_written_is_named(whole_stage_b, tmp_path, capsys):
    for out in (tmp_path / "nowhere" / "b.safetensors", tmp_path / "b.pt"):
        assert main(["convert", str(whole_stage_b), "-o", str(out), "--part", "stage_b"]) == 2
        assert str(out) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_batch_norms_counter_may_be_missing(tmp_path):
    weights = {name: tensor for name, tensor in vqgan().state_dict().items() if not name.endswith("tracked")}
    network = w.load_stage_a(write(weights, tmp_path / "a.safetensors"))
    assert distance(run_stage_a(network), run_stage_a(vqgan())) < TOLERANCE
    w.save(network, tmp_path / "again.safetensors")
    w.load_stage_a(tmp_path / "again.safetensors")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("stage_b", ".safetensors"),
        ("stage_b", ".pt"),
        ("stage_c", ".safetensors"),
        ("text_encoder", ".safetensors"),
        ("text_encoder", ".pt"),
    ],
)
def test_loading_takes_the_memory_of_the_file(tmp_path, kind, suffix):
    build = {
        "stage_b": lambda: WuerstchenDiffNeXt(
            c_hidden=[64, 128, 256, 256], nhead=[-1, 2, 4, 4], blocks=[2, 2, 6, 2], c_cond=512, clip_embd=256
        ),
        "stage_c": lambda: as_published(WuerstchenPrior(c=384, c_cond=256, depth=12, nhead=6)),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8, hidden_act="gelu"
            )
        ),
    }[kind]
    path = write(build().state_dict(), tmp_path / f"large{suffix}")
    LOADERS[kind](path)  # what the first load brings with it, such as modules
    grown, network = peak_growth(lambda: LOADERS[kind](path))
    assert grown < 1.15 * path.stat().st_size
    del network


class Written(TorchDispatchMode):
    """Collects what is filled in place outside of the meta device, as initialisation does; `set_` is a file's view."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name.endswith("_") and name != "set_" and isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.operations.append(name)
        return result


def test_nothing_is_initialised_that_is_then_overwritten(layout, tmp_path):
    kind, theirs, wrap = layout
    path = write(wrap(theirs.state_dict()), tmp_path / "weights.safetensors")
    with Written() as written:
        LOADERS[kind](path)
    assert written.operations == []
    with Written() as written:
        nn.Linear(2, 2)
    assert "uniform_" in written.operations  # as it would have been


PROBES = {
    "sdxl": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight",
        "first_stage_model.decoder.x",
    ],
    "sdxl unet": ["conv_in.weight", "add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "cascade c": [
        "clip_txt_mapper.weight",
        "clip_txt_pooled_mapper.weight",
        "down_blocks.0.2.kv_mapper.1.weight",
        "down_blocks.0.0.channelwise.0.weight",
        "clf.1.weight",
    ],
    "cascade b": ["effnet_mapper.0.weight", "pixels_mapper.0.weight", "clip_mapper.weight", "clf.1.weight"],
    "v1 b": ["byt5_mapper.weight", "effnet_mapper.weight", "in_mapper.0.weight", "out_mapper.1.weight", "clf.1.weight"],
    "lora": ["blocks.2.attention.to_q.lora_A.weight", "blocks.2.attention.to_q.lora_B.weight"],
    "vision": ["vision_model.encoder.layers.0.layer_norm1.weight", "visual_projection.weight"],
    "efficientnet": ["features.1.0.block.0.0.weight", "classifier.1.weight"],
    "other": ["layer.0.weight", "layer.1.weight"],
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    "probe, says",
    [
        ("sdxl", "SDXL checkpoint"),
        ("sdxl unet", "SDXL checkpoint"),
        ("cascade c", "Stable Cascade's Stage C"),
        ("cascade b", "Stable Cascade's Stage B"),
        ("v1 b", "Stage B of Würstchen v1"),
        ("lora", "a LoRA"),
        ("vision", "vision tower"),
        ("efficientnet", "torchvision's EfficientNet"),
        ("other", "no network of Würstchen .*layer.0.weight, layer.1.weight"),
    ],
)
def test_another_models_file_is_named(tmp_path, kind, probe, says):
    path = write({name: torch.ones(4, 4) for name in PROBES[probe]}, tmp_path / "other.safetensors")
    with pytest.raises(w.WuerstchenError, match=f"other.safetensors: this is .*{says}.*; here goes a {kind} file"):
        LOADERS[kind](path)


def test_stable_cascades_compressor_is_named(tmp_path):
    path = write(PublishedCompressor(affine=False).state_dict(), tmp_path / "effnet_encoder.safetensors")
    with pytest.raises(w.WuerstchenError, match="Stable Cascade's semantic compressor"):
        w.load_semantic_compressor(path)


def test_the_first_versions_stage_b_gives_its_compressor(tmp_path):
    weights = {name: torch.ones(4, 4) for name in PROBES["v1 b"]}
    torch.save({"state_dict": weights, "effnet_state_dict": small_compressor()}, tmp_path / "v1.pt")
    w.load_semantic_compressor(tmp_path / "v1.pt")
    with pytest.raises(w.WuerstchenError, match="Stage B of Würstchen v1.*load_semantic_compressor"):
        w.load_stage_b(tmp_path / "v1.pt")


@pytest.mark.parametrize("asked", LOADERS)
def test_a_network_in_the_wrong_loader_is_named(layout, tmp_path, asked):
    kind, theirs, wrap = layout
    content = wrap(theirs.state_dict())
    if asked == kind or "effnet_state_dict" in content:
        return
    path = write(content, tmp_path / "weights.safetensors")
    says = f"this is a {kind} file(, with CLIP's vision tower)?; load_{kind} takes it, here goes a {asked} file"
    with pytest.raises(w.WuerstchenError, match=says):
        LOADERS[asked](path)


DAMAGED = {
    "stage_a": lambda: vqgan().state_dict(),
    "stage_b": lambda: decoder(published=True).state_dict(),
    "stage_c": lambda: prior(published=True).state_dict(),
    "semantic_compressor": small_compressor,
    "text_encoder": lambda: clip_of_comfyui().state_dict(),
}


def read(kind, weights):
    archive = Archive(Path("damaged.pt"), "PyTorch", weights)
    part = files._part(archive, kind)
    return sources(archive, part, files._shapes(files._empty(archive, part)))


@pytest.mark.parametrize("kind", DAMAGED)
def test_no_tensor_may_be_missing_or_misshapen(kind):
    weights = DAMAGED[kind]()
    read(kind, weights)
    names = [name for name in weights if not re.search("tracked$|text_projection", name)]
    for i, name in enumerate(names[:: {"stage_a": 1, "stage_c": 1}.get(kind, 5)]):
        tensor = weights[name]
        wrong = [torch.empty(3), tensor[None], torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 1)]
        # The text's width is that of these tensors, and of no other.
        wrong = wrong[:2] if name in ("clip_mapper.weight", "cond_mapper.0.weight") else wrong
        for other in (None, wrong[i % len(wrong)]):
            damaged = {key: value for key, value in weights.items() if key != name}
            if other is not None:
                damaged[name] = other
            with pytest.raises(w.WuerstchenError, match=f"damaged.pt: .*{kind}"):
                read(kind, damaged)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_tensor_too_many_within_the_network_is_named(kind):
    weights = DAMAGED[kind]()
    read(kind, weights | {"logit_scale": torch.ones(())})
    name = {
        "stage_a": "down_blocks.0.more.weight",
        "stage_b": "down_blocks.1.1.more.weight",
        "stage_c": "blocks.0.more.weight",
        "semantic_compressor": "backbone.1.0.more.weight",
        "text_encoder": "text_model.encoder.layers.1.self_attn.q_norm.weight",
    }[kind]
    with pytest.raises(w.WuerstchenError, match=re.escape(name)):
        read(kind, weights | {name: torch.ones(2)})


@pytest.mark.parametrize("names", ["lg", "gl"])
@torch.no_grad()
def test_of_two_text_towers_the_larger_is_taken(tmp_path, names):
    """As ComfyUI saves SDXL's two."""
    large, small = clip_of_comfyui(), CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1))
    weights = {f"{names[0]}.{name}": tensor for name, tensor in small.state_dict().items()}
    weights |= {f"{names[1]}.{name}": tensor for name, tensor in large.state_dict().items()}
    ours = w.load_text_encoder(write(weights, tmp_path / "two.safetensors"))
    assert distance(run_text_encoder(ours), run_text_encoder(large)) < TOLERANCE


def test_a_text_encoder_of_other_tokens_is_named(tmp_path):
    network = CLIPTextModel(CLIPTextConfig(vocab_size=32000, hidden_size=64, num_hidden_layers=1))
    path = write(network.state_dict(), tmp_path / "siglip.safetensors")
    with pytest.raises(w.WuerstchenError, match="a text encoder of 32000 tokens; Würstchen's are CLIP's, of 49408"):
        w.load_text_encoder(path)


def test_a_width_whose_heads_are_unknown_is_named(tmp_path):
    path = write(WuerstchenPrior(c=96, c_cond=8, depth=1, nhead=2).state_dict(), tmp_path / "c.safetensors")
    with pytest.raises(w.WuerstchenError, match="width 96 is not a multiple of the released models' 64"):
        w.load_stage_c(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, suffix, value):
    weights = prior(published=True).state_dict()
    weights["blocks.2.attention.attn.in_proj_weight"][200, 3] = value  # of to_k
    path = write(weights, tmp_path / f"c{suffix}")
    with pytest.raises(w.WuerstchenError, match="damaged weights, blocks.2.attention.to_k.weight is not finite"):
        w.load_stage_c(path)


def test_weights_beyond_float16_are_named(tmp_path):
    weights = prior().state_dict()
    weights["projection.bias"][3] = 1e5
    path = write(weights, tmp_path / "c.safetensors")
    w.load_stage_c(path, dtype=torch.bfloat16)
    with pytest.raises(w.WuerstchenError, match="projection.bias is too large for float16; .*bfloat16"):
        w.load_stage_c(path, dtype=torch.float16)


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["trap.pt", "trap.safetensors", "trap.bin"])
@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    ],
    ids=["zip", "pickle", "legacy"],
)
def test_code_in_a_file_is_not_run(tmp_path, name, save):
    marker = tmp_path / "ran"
    save({"state_dict": prior(published=True).state_dict(), "extra": Trap(marker)}, tmp_path / name)
    for load in (*LOADERS.values(), open_archive):
        with pytest.raises(w.WuerstchenError, match=rf"{name}: .*"):
            load(tmp_path / name)
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert not marker.exists()


def test_code_in_a_file_is_said(tmp_path):
    torch.save({"state_dict": prior().state_dict(), "extra": Trap(tmp_path / "ran")}, tmp_path / "trap.pt")
    with pytest.raises(w.WuerstchenError, match=r"carries code or Python objects \(posix.system\).*none of it was run"):
        w.load_stage_c(tmp_path / "trap.pt")


def test_parameters_in_a_file_are_weights_like_others(tmp_path):
    torch.save({"state_dict": prior(published=True).requires_grad_().state_dict(keep_vars=True)}, tmp_path / "c.pt")
    for dtype in (torch.float32, torch.bfloat16):
        network = w.load_stage_c(tmp_path / "c.pt", dtype=dtype)
        assert not any(tensor.requires_grad or tensor.grad_fn for tensor in network.state_dict().values())


def test_files_before_pytorchs_zip_format_load(tmp_path):
    torch.save(prior().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert distance(run_stage_c(w.load_stage_c(tmp_path / "old.pt")), run_stage_c(prior())) < TOLERANCE


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99, 0.99999])
def test_a_file_cut_short_is_named(tmp_path, suffix, share):
    path = write(prior().state_dict(), tmp_path / f"cut{suffix}")
    loaded = w.load_stage_c(path)
    before = run_stage_c(loaded)
    (tmp_path / "again").mkdir()
    cut = tmp_path / "again" / path.name
    cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(w.WuerstchenError, match=f"cut{suffix}: (an empty file|not a whole|not a model)"):
        w.load_stage_c(cut)
    assert torch.equal(run_stage_c(loaded), before)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "an empty file"),
        (b"this is no model", "not a model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a model"),
        (b'{"_class_name": "WuerstchenPrior"}', "not a model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3974000000\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x05\x06" + bytes(18), "not a whole PyTorch file"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, capsys, content, says):
    path = tmp_path / "model_v2_stage_c.pt"
    path.write_bytes(content)
    for load in LOADERS.values():
        with pytest.raises(w.WuerstchenError, match=f"model_v2_stage_c.pt: {says}"):
            load(path)
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("beginning", [b"PK", b"\x80\x02", b" <", b"<"])
def test_a_safetensors_header_may_be_of_any_length(tmp_path, beginning):
    path = write(prior().state_dict(), tmp_path / "c.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = int.from_bytes(beginning.ljust(2, b"\x40") + b"\x01", "little")
    header = content[8 : 8 + length].ljust(longer)
    path.write_bytes(longer.to_bytes(8, "little") + header + content[8 + length :])
    w.load_stage_c(path)


def test_a_torch_file_without_named_tensors_is_named(tmp_path):
    for content in (torch.ones(3), [torch.ones(3)], {"iter": 3}, {}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(w.WuerstchenError, match="odd.pt: not a model"):
            w.load_stage_c(tmp_path / "odd.pt")
