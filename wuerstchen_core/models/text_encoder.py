"""The text encoder: CLIP's text tower, its hidden states at every position (DESIGN section 2, "Text")."""

from dataclasses import dataclass

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class TextEncoderConfig:
    """The defaults are CLIP bigG, Stage C's in the released v2 (Stage B's is H: 1024, 24 layers, 16 heads)."""

    width: int = 1280
    layers: int = 32
    heads: int = 20
    context_length: int = 77
    vocabulary: int = 49408


class TextEncoder(nn.Module):
    """Prompts -> the hidden states of all positions after the final LayerNorm, before the projection."""

    def __init__(self, config: TextEncoderConfig = TextEncoderConfig()):
        super().__init__()
        self.config = config
        self.tokenizer = SimpleTokenizer()
        self.tower = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocabulary,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=None,
        )
        self.tower.attn_mask = None  # ours masks the padding too: see `_attention_mask`

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> token ids (B, 77): start, text, end, padded with the end token; what is too long is cut."""
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        length = self.config.context_length
        rows = []
        for prompt in prompts:
            tokens = [start, *self.tokenizer.encode(prompt)[: length - 2], end]
            rows.append(tokens + [end] * (length - len(tokens)))
        return torch.tensor(rows)

    def forward(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, 77, width)"""
        return self.encode_tokens(self.tokenize(prompts))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) padded with the end token -> (B, L, width)"""
        tower = self.tower
        tokens = tokens.to(tower.positional_embedding.device)
        h = tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]
        mask = _attention_mask(tokens, self.tokenizer.eot_token_id).to(h.dtype)
        h = tower.transformer(h, attn_mask=mask.repeat_interleave(self.config.heads, dim=0))
        return tower.ln_final(h)


def _attention_mask(tokens: Tensor, end: int) -> Tensor:
    """(B, L) -> additive mask (B, L, L): causal, and the padding behind the first end token is no key."""
    length = tokens.shape[1]
    is_end = tokens == end
    padding = is_end.cumsum(dim=1) - is_end.int() > 0
    future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    masked = future | padding[:, None, :]
    return torch.zeros(masked.shape, device=tokens.device).masked_fill(masked, float("-inf"))
