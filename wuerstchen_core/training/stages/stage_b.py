"""The training of Stage B (paper section 3): diffusion in Stage A's space, conditioned on semantic latents.

The semantic compressor can be trained with it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...checkpoints.load import load_stage_a, load_stage_b
from ...checkpoints.sets import SET
from ...diffusion.options import STAGE_B
from ...geometry import Geometry
from ...models.latent_space import LatentSpace
from ...models.semantic_compressor import SemanticCompressor, SemanticCompressorConfig
from ...models.stage_a import VQGAN
from ...models.stage_b import DiffNeXt, StageBConfig
from ...models.text_encoder import TextEncoder
from ...pipeline import compress, decode, sample_stage_b
from ...util.errors import WuerstchenError
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_above_zero, check_at_least, check_shares, option
from .conditioning import (
    CaptionEncoder,
    check_precision,
    check_size,
    compressor_for,
    compressor_input,
    computed_in,
    copied,
    drop_captions,
    encode_captions,
    spoil,
    text_encoder_for,
    weight_file,
)
from .initialise import initialise
from .losses import check_weight, diffusion_loss, times_of


@dataclass(frozen=True)
class Options:
    stage_a: str = option("mini", "Stage A's file; mini: the embedded one")
    semantic_compressor: str = option(
        "mini", "the semantic compressor's file; mini: the embedded one; empty: a new one, of [compressor]'s sizes"
    )
    frozen_precision: str = option(
        "float32", "precision in which the frozen networks compute features: float32, bfloat16 or float16"
    )
    train_compressor: bool = option(
        False, "train the semantic compressor too, as the paper does; otherwise it is frozen"
    )
    backbone: str = option("", "for a new compressor: torchvision's EfficientNetV2 ImageNet weights to start from")
    text_encoder: str = option("mini", "the text encoder's file; mini: the embedded one; empty: Stage B reads no text")
    init: str = option("", "a Stage B to start from, in any layout; [network] is then taken from it")
    caption_drop: float = option(0.05, "share of captions replaced by the empty caption")
    text_absent: float = option(
        0.0, "share of steps without any text, so that Stage B also works without a text encoder"
    )
    zeroed: float = option(0.05, "share of semantic latents replaced by zero, which guidance needs")
    noised: float = option(0.3, "share of semantic latents with added noise, as Stage C's are not perfect either")
    noised_until: float = option(0.5, "latest time of the noise added to them")
    loss_weight: str = option(
        "p2", "weight of a noise level in the loss: p2, min-snr or v, the squared error of v (v-prediction)"
    )
    min_snr_gamma: float = option(5.0, "for min-snr: weight min(gamma, signal-to-noise ratio) / signal-to-noise ratio")
    p2_k: float = option(
        1.0, "for p2: weight 1 / (k + signal-to-noise ratio): a smaller k gives the noisiest times more weight"
    )
    high_noise: float = option(
        0.0, "share of the noise levels drawn from the noisiest alone, where the condition decides"
    )
    largest_error: float = option(
        0.0, "a sample's mean squared error is limited to this, and what exceeds it gives no gradient; 0: no limit"
    )
    sample_count: int = option(4, "how many of the data's pictures the samples show, each beside its reconstruction")
    sample_steps: int = option(12, "for samples: steps of Stage B")
    network: StageBConfig = option(
        StageBConfig(),
        "the network's sizes, if init is empty; latent_space is the compressor's, stage_a_scale Stage A's",
    )
    compressor: SemanticCompressorConfig = option(
        SemanticCompressorConfig(latent_space=LatentSpace(0.0, 1.0)),
        "a new compressor's sizes; stages are [fused, expansion, stride, channels, layers]",
    )

    def __post_init__(self):
        check_shares(self, "caption_drop", "text_absent", "zeroed", "noised", "noised_until", "high_noise")
        if self.zeroed + self.noised > 1:
            raise WuerstchenError("zeroed and noised are shares of the same latents: together 1 at most")
        check_above_zero(self, "p2_k", "min_snr_gamma")
        check_weight(self.loss_weight)
        check_at_least(0, self, "largest_error", "sample_count")
        check_at_least(1, self, "sample_steps")
        check_precision(self.frozen_precision)
        if not self.semantic_compressor and not self.train_compressor:
            raise WuerstchenError("semantic_compressor: name a file, or train a new one with --train-compressor true")


def build(options: Options, data: DataOptions) -> "StageBTask":
    """Raises WuerstchenError if a file is missing or does not fit the others, or options contradict each other."""
    check_size(data.size)
    if data.cache and options.train_compressor:
        raise WuerstchenError("cache: the pictures are needed themselves while the compressor is trained")
    stage_a_file = weight_file("stage_a", options.stage_a, SET["stage_a"])
    stage_a = load_stage_a(stage_a_file)
    compressor, compressor_files = compressor_for(
        options.semantic_compressor, options.compressor, options.backbone, options.train_compressor
    )
    if options.init:
        network = copied(load_stage_b(weight_file("init", options.init, SET["stage_b"])))
    else:
        config = dataclasses.replace(
            options.network,
            latent_space=compressor.config.latent_space,
            stage_a_scale=stage_a.config.scale_factor,
        )
        network = DiffNeXt(config)
        initialise(network)
    encoder, text_files = None, []
    if options.text_encoder:
        path, encoder = text_encoder_for(
            "text_encoder", options.text_encoder, network.config.text_width, "this Stage B"
        )
        text_files = [path]
    for name, ours, theirs in (
        ("stage_a", network.config.latent_channels, stage_a.config.latent_channels),
        ("semantic_compressor", network.config.semantic_channels, compressor.config.latent_channels),
    ):
        if ours != theirs:
            raise WuerstchenError(f"{name}: its latents have {theirs} channels, and Stage B is for {ours}")
    if network.config.latent_space != compressor.config.latent_space:
        raise WuerstchenError(
            f"init: this Stage B is for {network.config.latent_space}, but the compressor's is "
            f"{compressor.config.latent_space}"
        )
    if not any(network.config.semantic):
        if options.train_compressor:
            raise WuerstchenError(
                "train_compressor: this Stage B reads no semantic latent (network.semantic): set false"
            )
        if encoder is None:
            raise WuerstchenError("text_encoder is empty, and this Stage B reads no semantic latent either: name one")
    if options.text_absent > 0 or not options.text_encoder:
        network.config = dataclasses.replace(network.config, text_absent=True)
    task = StageBTask(network, compressor, stage_a, encoder, options, data)
    task.feature_files = (stage_a_file, *compressor_files, *text_files)
    return task


class Readers(NamedTuple):
    """The networks that Stage B's training only reads from."""

    stage_a: VQGAN
    encoder: TextEncoder | None
    compressor: SemanticCompressor | None


class StageBTask(Task):
    """`network` learns to predict the noise in a picture's Stage A latent, given its semantic latent and caption.

    The semantic latent comes from the compressor, which is frozen or learns with it (`options.train_compressor`).
    Without any level that reads it (`semantic` in the network's configuration) the network is a latent diffusion model
    of a single stage, conditioned on text alone: the paper's baseline.
    """

    sampler = STAGE_B.sampler  # of the samples

    def __init__(
        self,
        network: DiffNeXt,
        compressor: SemanticCompressor,
        stage_a: VQGAN,
        encoder: TextEncoder | None,
        options: Options,
        data: DataOptions,
    ):
        super().__init__()
        self.network = network
        self.options, self.data = options, data
        self.compressor = compressor if options.train_compressor else None
        self.readers = Readers(stage_a, encoder, None if options.train_compressor else compressor)
        self.frozen = tuple(reader for reader in self.readers if reader is not None)
        self.reads_semantic = any(network.config.semantic)
        self.leaves_out = encoder is None or options.text_absent > 0
        self.reads_captions = encoder is not None
        self.feature_key = options.frozen_precision
        self.nothing: tuple[Tensor, ...] = ()
        self.read_captions = None if encoder is None else CaptionEncoder(encoder)
        if encoder is not None:
            self.feature_key += f", {encoder.config.context_length} tokens"
            with torch.no_grad():
                self.nothing = (encode_captions(encoder, [""]),)
        self.pictures: tuple[Tensor, ...] = ()
        self.captions: list[str] = []

    def features(self, batch: dict) -> dict[str, Tensor]:
        image = batch["image"]
        with computed_in(self.options.frozen_precision, image.device):
            found = {"latent": self.readers.stage_a.encode(image)}
            if self.readers.compressor is not None and self.reads_semantic:
                found["semantic"] = self.readers.compressor(compressor_input(image))
            if self.read_captions is not None:
                found["text"] = self.read_captions(batch["caption"])
        return found

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        found = batch["features"]
        semantic = self.semantic(batch, draws)
        text = None
        if "text" in found and draws.common.random() >= self.options.text_absent:
            text = drop_captions(found["text"], self.nothing[0], self.options.caption_drop, draws.uniform())

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, semantic, text)

        latent = found["latent"]
        t, noise = times_of(draws.uniform(), self.options.high_noise), draws.normal(latent.shape[1:])
        largest_error = self.options.largest_error or math.inf
        weight = self.options.loss_weight, self.options.min_snr_gamma
        return {"noise": diffusion_loss(predict, latent, self.options.p2_k, t, noise, largest_error, *weight)}

    def semantic(self, batch: dict, draws: Draws) -> Tensor:
        found = batch["features"]
        if not self.reads_semantic:
            return found["latent"].new_zeros(len(found["latent"]), self.network.config.semantic_channels, 1, 1)
        if self.compressor is None:
            return self.spoiled(found["semantic"], draws)
        return self.spoiled(self.compressor(compressor_input(batch["image"])), draws)

    def spoiled(self, semantic: Tensor, draws: Draws) -> Tensor:
        options, space = self.options, self.network.config.latent_space
        chance, t = draws.uniform(), draws.uniform() * options.noised_until
        return spoil(semantic, space, options.zeroed, options.noised, chance, t, draws.normal(semantic.shape[1:]))

    def exported(self) -> dict[str, nn.Module]:
        if self.compressor is None:
            return {"stage_b": self.network}
        return {"stage_b": self.network, "semantic_compressor": self.compressor}

    def samples(self) -> Tensor | None:
        if not self.options.sample_count:
            return None
        device = self.network.clip_mapper.weight.device
        if not self.pictures:
            batch = self.data.first_batch(self.options.sample_count)
            self.pictures, self.captions = (batch["image"].permute(0, 2, 3, 1),), batch["caption"]
        image = self.pictures[0].to(device)
        compressor = self.compressor if self.readers.compressor is None else self.readers.compressor
        assert compressor is not None  # it is trained or frozen
        geometry = Geometry(width=image.shape[2], height=image.shape[1])
        semantic = compress(compressor, image)
        encoder = self.readers.encoder
        text = None if encoder is None else encode_captions(encoder, self.captions)
        latent = sample_stage_b(
            self.network, semantic, geometry, text, steps=self.options.sample_steps, sampler=self.sampler
        )
        drawn = decode(self.readers.stage_a, latent, geometry)
        return torch.stack([image, drawn], dim=1).flatten(0, 1)
