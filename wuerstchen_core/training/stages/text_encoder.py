"""The training of a text encoder (CLIP, arXiv 2103.00020), if the stages are trained from scratch.

It learns which caption belongs to which picture, as the semantic compressor sees it.

Captions of similar lengths are read together, up to the end token of the longest, since no state before depends on the
padding.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.load import load_semantic_compressor, load_text_encoder
from ...checkpoints.sets import SET
from ...models.semantic_compressor import SemanticCompressor
from ...models.text_encoder import TextEncoder, TextEncoderConfig
from ...util.errors import WuerstchenError
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_above_zero, check_at_least, option
from .conditioning import CaptionEncoder, check_precision, check_size, computed_in, copied, semantic, weight_file
from .losses import contrastive_loss

MAX_SCALE = 100.0  # of the similarities, as in CLIP
PARTS = 8  # of a batch, whose captions have similar lengths


@dataclass(frozen=True)
class Options:
    semantic_compressor: str = option("mini", "the semantic compressor's file; mini: the embedded one")
    frozen_precision: str = option(
        "float32", "precision in which the frozen networks compute features: float32, bfloat16 or float16"
    )
    init: str = option("", "a text encoder to start from, in any layout; [network] is then taken from it")
    embedding: int = option(256, "width of the space in which captions and pictures are compared")
    hidden: int = option(512, "width of the hidden layer that takes a picture's latent there")
    grid: int = option(6, "a picture's latent is averaged to grid x grid positions before")
    temperature: float = option(0.07, "the similarities are divided by it at the beginning; it is learned")
    contrastive: float = option(1.0, "weight of the contrastive loss")
    prediction: float = option(
        0.0, "weight of the mean squared error of the latent, as a small network tells it from the end token's state"
    )
    network: TextEncoderConfig = option(TextEncoderConfig(), "the text encoder's sizes, if init is empty")

    def __post_init__(self):
        check_at_least(1, self, "embedding", "hidden", "grid")
        check_above_zero(self, "temperature")
        check_at_least(0, self, "contrastive", "prediction")
        check_precision(self.frozen_precision)
        if not self.contrastive and not self.prediction:
            raise WuerstchenError("contrastive and prediction are both 0: there is nothing to learn from")


def build(options: Options, data: DataOptions) -> "TextEncoderTask":
    """Raises WuerstchenError if a file is missing."""
    check_size(data.size)
    path = weight_file("semantic_compressor", options.semantic_compressor, SET["semantic_compressor"])
    if options.init:
        encoder = copied(load_text_encoder(weight_file("init", options.init, SET["text_encoder_c"])))
    else:
        encoder = TextEncoder(options.network)
    task = TextEncoderTask(encoder, load_semantic_compressor(path), options)
    task.feature_files = (path,)
    return task


class TextEncoderTask(Task):
    """`encoder` learns with the two projections that its captions' and the pictures' embeddings come from.

    Each process compares its own batch alone.
    """

    reads_captions = True
    features_of_captions = False
    frozen: tuple[SemanticCompressor]
    seen: Tensor  # which tokens a caption has had

    def __init__(self, encoder: TextEncoder, compressor: SemanticCompressor, options: Options):
        super().__init__()
        self.encoder, self.options = encoder, options
        self.frozen = (compressor,)
        self.feature_key = options.frozen_precision
        width, size = encoder.config.width, compressor.config.latent_channels * options.grid**2
        if options.contrastive:
            self.text = nn.Linear(width, options.embedding, bias=False)
            self.picture = nn.Sequential(
                nn.Linear(size, options.hidden), nn.GELU(), nn.Linear(options.hidden, options.embedding)
            )
            self.scale = nn.Parameter(torch.tensor(-math.log(options.temperature)))
        if options.prediction:
            self.latent = nn.Sequential(nn.Linear(width, options.hidden), nn.GELU(), nn.Linear(options.hidden, size))
        self.register_buffer("seen", torch.zeros(encoder.config.vocabulary, dtype=torch.bool))
        self.captions = CaptionEncoder(encoder)

    def features(self, batch: dict) -> dict[str, Tensor]:
        image = batch["image"]
        with computed_in(self.options.frozen_precision, image.device):
            return {"semantic": semantic(self.frozen[0], image)}

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        options = self.options
        latent = F.adaptive_avg_pool2d(batch["features"]["semantic"], options.grid).flatten(1)
        tokens = self.captions.tokens(batch["caption"])
        states = self.ends(tokens)
        tokens = tokens.to(latent.device)
        if self.training:
            self._see(tokens)
        losses = {}
        if options.contrastive:
            same = _equal(latent) | _equal(tokens)
            scale = self.scale.exp().clamp(max=MAX_SCALE)
            loss = contrastive_loss(self.text(states).float(), self.picture(latent).float(), scale, same)
            losses["contrastive"] = options.contrastive * loss
        if options.prediction:
            losses["prediction"] = options.prediction * F.mse_loss(self.latent(states).float(), latent)
        return losses

    def ends(self, tokens: Tensor) -> Tensor:
        """Token ids (B, 77) -> the states of the end tokens (B, width)"""
        end = (tokens == self.encoder.tokenizer.eot_token_id).int().argmax(dim=1)
        tokens = tokens.to(self.encoder.tower.positional_embedding.device)
        embedded = self.encoder.tower.token_embedding(tokens)
        by_length, states = end.argsort(), []
        for part in by_length.chunk(PARTS):
            length = int(end[part[-1]]) + 1
            read = self.encoder.encode_embedded(embedded[part, :length], tokens[part, :length])
            states.append(read[torch.arange(len(part)), end[part]])
        return torch.cat(states)[by_length.argsort()]

    @torch.no_grad()
    def exported(self) -> dict[str, nn.Module]:
        """The text encoder; of one that was trained from scratch, words that no caption had are zero."""
        if self.options.init:
            return {"text_encoder": self.encoder}
        encoder = copied(self.encoder)
        encoder.tower.token_embedding.weight[~self.seen.to(encoder.tower.token_embedding.weight.device)] = 0
        return {"text_encoder": encoder}

    @torch.no_grad()
    def _see(self, tokens: Tensor) -> None:
        """Notes the tokens of a batch, those of all processes."""
        now = torch.zeros_like(self.seen)
        now[tokens] = True
        if dist.is_initialized():
            counts = now.int()
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            now = counts.bool()
        self.seen |= now


def _equal(rows: Tensor) -> Tensor:
    """(B, N) -> (B, B): which of them are the same"""
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    return group[:, None] == group
