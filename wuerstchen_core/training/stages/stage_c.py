"""The training of Stage C (paper section 3): diffusion in the semantic compressor's space, from text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoints.load import load_semantic_compressor, load_stage_a, load_stage_b, load_stage_c, load_text_encoder
from ...checkpoints.sets import SET
from ...diffusion.options import STAGE_C
from ...geometry import Geometry
from ...models.semantic_compressor import SemanticCompressor
from ...models.stage_c import Prior, StageCConfig
from ...models.text_encoder import TextEncoder
from ...pipeline import Wuerstchen
from ...util.errors import WuerstchenError
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_above_zero, check_at_least, check_shares, check_utf8, option
from .conditioning import (
    CaptionEncoder,
    check_precision,
    check_size,
    computed_in,
    copied,
    drop_captions,
    encode_captions,
    semantic,
    text_encoder_for,
    weight_file,
)
from .initialise import initialise
from .losses import check_weight, diffusion_loss, times_of


@dataclass(frozen=True)
class Options:
    text_encoder: str = option("mini", "the text encoder's file; mini: the embedded one")
    semantic_compressor: str = option("mini", "the semantic compressor's file; mini: the embedded one")
    frozen_precision: str = option(
        "float32", "precision in which the frozen networks compute features: float32, bfloat16 or float16"
    )
    train_text_encoder: bool = option(False, "train the text encoder too; otherwise it is frozen")
    text_encoder_rate: float = option(0.1, "its learning rate, as a factor of Stage C's")
    init: str = option("", "a Stage C to start from, in any layout; [network] is then taken from it")
    caption_drop: float = option(0.05, "share of captions replaced by the empty caption, which guidance needs")
    noise_levels: int = option(
        1, "noise levels at which each picture of a batch is learned; they share its text's keys"
    )
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
    prompts: tuple[str, ...] = option((), "prompts of the samples; without prompts there are no samples")
    stage_a: str = option("mini", "for samples: Stage A's file; mini: the embedded one")
    stage_b: str = option("mini", "for samples: Stage B's file; mini: the embedded one")
    text_encoder_b: str = option("", "for samples: Stage B's text encoder; empty: Stage C's")
    sample_steps: int = option(30, "for samples: steps of Stage C")
    sample_cfg: float = option(4.0, "for samples: guidance of Stage C")
    network: StageCConfig = option(StageCConfig(), "the network's sizes, if init is empty")

    def __post_init__(self):
        check_shares(self, "caption_drop", "high_noise")
        if self.noise_levels < 1 or self.sample_steps < 1:
            raise WuerstchenError("noise_levels and sample_steps must be at least 1")
        check_above_zero(self, "p2_k", "min_snr_gamma", "text_encoder_rate")
        check_weight(self.loss_weight)
        check_at_least(0, self, "largest_error")
        check_precision(self.frozen_precision)
        check_utf8("prompts", *self.prompts)


def build(options: Options, data: DataOptions) -> "StageCTask":
    """Raises WuerstchenError if a file is missing or does not fit the others."""
    check_size(data.size)
    if options.init:
        network = copied(load_stage_c(weight_file("init", options.init, SET["stage_c"])))
    else:
        network = Prior(options.network)
        initialise(network)
    text_file, encoder = text_encoder_for(
        "text_encoder", options.text_encoder, network.config.text_width, "this Stage C"
    )
    compressor_file = weight_file("semantic_compressor", options.semantic_compressor, SET["semantic_compressor"])
    compressor = load_semantic_compressor(compressor_file)
    channels = compressor.config.latent_channels, network.config.latent_channels
    if len(set(channels)) > 1:
        raise WuerstchenError(f"semantic_compressor: its latents have {channels[0]} channels, Stage C's {channels[1]}")
    task = StageCTask(
        network, copied(encoder) if options.train_text_encoder else encoder, compressor, options, data.size
    )
    task.feature_files = (compressor_file,) if options.train_text_encoder else (text_file, compressor_file)
    return task


def predictor(network: Prior, text: Tensor, levels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise in x (B * levels, 16, p, q) at times t (B * levels,) as a function, given text (B, L, text_width).

    A text's keys and values, computed here, serve all its levels.
    """
    condition = [
        tuple(part.repeat_interleave(levels, dim=0) for part in keys_values) for keys_values in network.condition(text)
    ]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return network.denoise(x, network.modulate(t, x.dtype), condition)

    return predict


class Readers(NamedTuple):
    """The networks that Stage C's training only reads from."""

    encoder: TextEncoder | None
    compressor: SemanticCompressor


class StageCTask(Task):
    """`network` learns to predict the noise in a picture's semantic latent, given its caption.

    The text encoder is frozen or learns with it (`options.train_text_encoder`).
    """

    reads_captions = True
    sampler = STAGE_C.sampler  # of the samples

    def __init__(
        self, network: Prior, encoder: TextEncoder, compressor: SemanticCompressor, options: Options, size: int
    ):
        super().__init__()
        self.network = network
        self.options, self.size = options, size
        self.encoder = encoder if options.train_text_encoder else None
        self.readers = Readers(None if options.train_text_encoder else encoder, compressor)
        self.frozen = tuple(reader for reader in self.readers if reader is not None)
        self.feature_key = options.frozen_precision
        self.features_of_captions = not options.train_text_encoder
        self.read_captions = CaptionEncoder(encoder)
        self.nothing: tuple[Tensor, ...] = ()
        if not options.train_text_encoder:
            self.feature_key += f", {encoder.config.context_length} tokens"
            with torch.no_grad():
                self.nothing = (encode_captions(encoder, [""]),)
        self.drawers: dict = {}

    def features(self, batch: dict) -> dict[str, Tensor]:
        image = batch["image"]
        with computed_in(self.options.frozen_precision, image.device):
            found = {"semantic": semantic(self.readers.compressor, image)}
            if self.readers.encoder is not None:
                found["text"] = self.read_captions(batch["caption"])
        return found

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        options, levels = self.options, self.options.noise_levels
        latent, dropped = batch["features"]["semantic"], draws.uniform()
        if self.encoder is None:
            text = drop_captions(batch["features"]["text"], self.nothing[0], options.caption_drop, dropped)
        else:
            *tokens, nothing = self.read_captions.tokens([*batch["caption"], ""]).to(latent.device)
            kept = torch.where((dropped < options.caption_drop)[:, None], nothing, torch.stack(tokens))
            text = self.encoder.encode_tokens(kept)
        t = times_of(draws.uniform(levels), options.high_noise).flatten()
        noise = draws.normal((levels, *latent.shape[1:])).flatten(0, 1)
        predict, latents = predictor(self.network, text, levels), latent.repeat_interleave(levels, dim=0)
        largest_error = options.largest_error or math.inf
        weight = options.loss_weight, options.min_snr_gamma
        return {"noise": diffusion_loss(predict, latents, options.p2_k, t, noise, largest_error, *weight)}

    def rate(self, name: str) -> float:
        return self.options.text_encoder_rate if name.startswith("encoder.") else 1.0

    def exported(self) -> dict[str, torch.nn.Module]:
        if self.encoder is None:
            return {"stage_c": self.network}
        return {"stage_c": self.network, "text_encoder": self.encoder}

    def samples(self) -> Tensor | None:
        if not self.options.prompts:
            return None
        model = self._model()
        geometry = Geometry(self.size, self.size)
        return torch.cat(
            [
                model.generate(
                    prompt,
                    width=geometry.width,
                    height=geometry.height,
                    seed=number,
                    steps_c=self.options.sample_steps,
                    cfg_c=self.options.sample_cfg,
                    sampler=self.sampler,
                )
                for number, prompt in enumerate(self.options.prompts)
            ]
        )

    def _model(self) -> Wuerstchen:
        """The network with all others around it; those that only samples need are loaded for the first samples."""
        compressor, encoder = self.readers.compressor, self.encoder or self.readers.encoder
        assert encoder is not None  # it is trained or frozen
        device = self.network.projection.weight.device
        if not self.drawers:
            options = self.options
            stage_a = weight_file("stage_a", options.stage_a, SET["stage_a"])
            stage_b = weight_file("stage_b", options.stage_b, SET["stage_b"])
            self.drawers = {
                "stage_a": load_stage_a(stage_a, device),
                "stage_b": load_stage_b(stage_b, device),
                "text_encoder_b": encoder
                if not options.text_encoder_b
                else load_text_encoder(
                    weight_file("text_encoder_b", options.text_encoder_b, SET["text_encoder_c"]), device
                ),
            }
        return Wuerstchen(stage_c=self.network, text_encoder_c=encoder, semantic_compressor=compressor, **self.drawers)
