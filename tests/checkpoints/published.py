"""Networks in every layout that the loaders take, by the libraries that have them, and their files and outputs.

What would make a picture wrong without an error, and is therefore looked for in numbers: queries, keys and values in
another order; a wrong number of heads; the semantic latent's columns taken for those of the way down; the raw weights
instead of the EMA; the vision tower instead of the text tower; a network built smaller than its file.
"""

from pathlib import Path

import open_clip
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_common import AttnBlock
from safetensors.torch import save_file
from torch import nn
from torchvision.models import efficientnet_v2_s
from torchvision.transforms.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import wuerstchen_core as w
from tests.reference import randomise
from wuerstchen_core.checkpoints.archive import Archive
from wuerstchen_core.models.semantic_compressor import EFFICIENTNET_V2_S, SemanticCompressor, SemanticCompressorConfig
from wuerstchen_core.models.stage_a import VQGAN

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


H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def on_paper(build):
    """An archive of a network's names and shapes, without memory for its weights."""
    with torch.device("meta"):
        return Archive(Path("paper.pt"), "PyTorch", build().state_dict())
