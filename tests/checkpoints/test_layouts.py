"""What is read from names and shapes alone: configurations, and whose file it is."""

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torchvision.models import efficientnet_v2_l
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen_core as w
from tests.checkpoints.published import (
    LOADERS,
    G,
    H,
    PublishedCompressor,
    as_published,
    on_paper,
    small_compressor,
    write,
)
from wuerstchen_core.checkpoints.layouts import part_at, places
from wuerstchen_core.checkpoints.load import empty, shapes
from wuerstchen_core.checkpoints.mapping import sources
from wuerstchen_core.models.latent_space import LatentSpace
from wuerstchen_core.models.semantic_compressor import SemanticCompressorConfig
from wuerstchen_core.models.stage_a import StageAConfig
from wuerstchen_core.models.stage_b import StageBConfig
from wuerstchen_core.models.stage_c import StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoderConfig


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
    sources(archive, part, shapes(empty(archive, part)))


def test_the_first_versions_compressor_has_latents_of_its_own():
    archive = on_paper(lambda: PublishedCompressor(efficientnet_v2_l))
    part = part_at(archive, "semantic_compressor", "")
    sources(archive, part, shapes(empty(archive, part)))
    assert part.config.latent_space == LatentSpace(shift=0.0, scale=1.0)
    assert [stage.layers for stage in part.config.stages] == [4, 7, 7, 10, 19, 25, 7]
    assert [stage.stride for stage in part.config.stages] == [1, 2, 2, 2, 1, 2, 1]


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
    with pytest.raises(w.WuerstchenError, match=f"other.safetensors: this is .*{says}.*; expected a {kind} file"):
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


def test_a_text_encoder_of_other_tokens_is_named(tmp_path):
    network = CLIPTextModel(CLIPTextConfig(vocab_size=32000, hidden_size=64, num_hidden_layers=1))
    path = write(network.state_dict(), tmp_path / "siglip.safetensors")
    with pytest.raises(w.WuerstchenError, match="a text encoder of 32000 tokens; Würstchen's are CLIP's, of 49408"):
        w.load_text_encoder(path)


def test_a_width_whose_heads_are_unknown_is_named(tmp_path):
    path = write(WuerstchenPrior(c=96, c_cond=8, depth=1, nhead=2).state_dict(), tmp_path / "c.safetensors")
    with pytest.raises(w.WuerstchenError, match="width 96 is not a multiple of the released models' 64"):
        w.load_stage_c(path)
