"""One network of every kind, as small as they get, and what each is loaded for."""

import torch
from torch import nn

import wuerstchen_core as w
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.models.semantic_compressor import BackboneStage, SemanticCompressor, SemanticCompressorConfig
from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig

LORA = "lora"


def networks() -> dict[str, nn.Module]:
    """One of every kind, as small as they get."""
    torch.manual_seed(0)
    stages = tuple(BackboneStage(True, 1, 2, 8, 1) for _ in range(4))
    levels = {"widths": (16, 32), "heads": (0, 2), "blocks": (1, 1), "semantic": (False, True)}
    return {
        "stage_a": VQGAN(StageAConfig(widths=(8, 16), bottleneck_blocks=1, codebook_size=16)),
        "stage_b": DiffNeXt(StageBConfig(**levels, condition_width=24, text_width=32)),
        "stage_c": Prior(StageCConfig(width=64, depth=2, heads=1, text_width=32)),
        "semantic_compressor": SemanticCompressor(SemanticCompressorConfig(stem=8, stages=stages, features=16)),
        "previewer": Previewer(PreviewerConfig(widths=(16, 16, 8, 8))),
        "text_encoder": TextEncoder(TextEncoderConfig(width=32, layers=1, heads=2)),
    }


def use(kind: str, network) -> None:
    """What a network is loaded for."""
    if kind == LORA:
        with w.apply_loras(Prior(StageCConfig(width=64, depth=2, heads=1, text_width=32)), [(network, 1.0)]):
            return
    config = network.config
    draw = {
        "stage_a": lambda: network.decode(network.encode(torch.rand(1, 3, 32, 32))),
        "stage_b": lambda: network(
            torch.randn(1, config.latent_channels, 32, 32), torch.tensor([0.5]),
            torch.randn(1, config.semantic_channels, 3, 3), torch.randn(1, 4, config.text_width),
        ),
        "stage_c": lambda: network(
            torch.randn(1, config.latent_channels, 4, 4), torch.tensor([0.5]), torch.randn(1, 5, config.text_width)
        ),
        "semantic_compressor": lambda: config.latent_space.from_features(network(torch.rand(1, 3, 64, 64))),
        "previewer": lambda: network(torch.randn(1, config.latent_channels, 2, 2)),
        "text_encoder": lambda: network(["a (cat:1.2)"]),
    }  # fmt: skip
    with torch.inference_mode():
        draw[kind]()
