"""The text encoder: CLIP's text tower (arXiv 2103.00020), its hidden states at every position."""

import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..util import checks
from ..util.checks import shown
from ..util.errors import WuerstchenError
from .blocks import check_heads
from .config import check_config, require
from .prompt import parse_emphasis

LONGEST_WORD = 500  # letters; a longer one is read in parts, since byte-pair encoding takes quadratic time
# CLIP's words. `<start_of_text>` and `<end_of_text>` are not among them: who types them means the letters.
WORD = rf"""'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}{{1,{LONGEST_WORD}}}|\p{{N}}|[^\s\p{{L}}\p{{N}}]{{1,{LONGEST_WORD}}}"""
MAX_WEIGHT = 1000.0
OLDEST_OPEN_CLIP = (2, 27)  # before it the layers of its text tower stood otherwise, and it was built otherwise


@dataclass(frozen=True)
class TextEncoderConfig:
    """The defaults are CLIP bigG, Stage C's in the released v2 (Stage B's is H: 1024, 24 layers, 16 heads)."""

    width: int = 1280
    layers: int = 32
    heads: int = 20
    context_length: int = 77
    vocabulary: int = 49408


class TextEncoder(nn.Module):
    """Prompts -> the hidden states of all positions after the final LayerNorm, before the projection.

    Raises:
        WuerstchenError: there is no such network, since a size of the configuration is not possible, or open_clip_torch
            is missing or too old.
    """

    def __init__(self, config: TextEncoderConfig = TextEncoderConfig()):
        import regex

        super().__init__()
        check_config(config)
        check_heads(config.width, config.heads)
        require(config.context_length > 2, f"context_length is {config.context_length}: it must be at least 3")
        self.config = config
        open_clip = _open_clip()
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer()
        self.tokenizer.pat = regex.compile(WORD, regex.IGNORECASE)
        tokens = self.tokenizer.vocab_size
        require(
            config.vocabulary == tokens, f"vocabulary is {config.vocabulary}: CLIP's, the only one here, is {tokens}"
        )
        self.tower = open_clip.transformer.TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocabulary,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=None,
        )
        self.tower.attn_mask = None  # ours masks the padding too: see `_attention_mask`
        # Positions first: with prompts first, MultiheadAttention projects each position by itself, at twice the time.
        self.tower.transformer.batch_first = False
        for block in self.tower.transformer.resblocks:
            block.attn.batch_first = False

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> token ids and their weights, both (B, chunks, 77).

        A chunk is start, up to 75 tokens of the text, end, padded with the end token. A longer text goes on in further
        chunks, from word to word; prompts with fewer chunks than another get empty ones.

        Raises:
            WuerstchenError: there is no prompt, one is not a text, or a weight in one is out of its range.
        """
        if not isinstance(prompts, list | tuple) or not prompts:
            raise WuerstchenError(f"prompts are {shown(prompts)}: they must be a list of at least one text (str)")
        for prompt in prompts:
            checks.text("a prompt", prompt)
        rows = [self._chunks(prompt) for prompt in prompts]
        count = max(map(len, rows))
        rows = [row + [[]] * (count - len(row)) for row in rows]
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        length = self.config.context_length

        def fill(values: list, first, last) -> list:
            return [first, *values, *[last] * (length - 1 - len(values))]

        tokens = [[fill([token for token, _ in chunk], start, end) for chunk in row] for row in rows]
        weights = [[fill([weight for _, weight in chunk], 1.0, 1.0) for chunk in row] for row in rows]
        return torch.tensor(tokens), torch.tensor(weights)

    def _chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """(token, weight) of every token of the text, 75 to a chunk at most."""
        room = self.config.context_length - 2
        chunks: list[list[tuple[int, float]]] = [[]]
        word: list[tuple[int, float]] = []
        for text, weight in parse_emphasis(prompt):
            if abs(weight) > MAX_WEIGHT:
                raise WuerstchenError(
                    f"the weight of {shown(text)} in the prompt is {weight:g}: it must be from {-MAX_WEIGHT:g} to "
                    f"{MAX_WEIGHT:g}"
                )
            for token in self.tokenizer.encode(text):
                word.append((token, weight))
                if self.tokenizer.decoder[token].endswith("</w>") or len(word) == room:
                    if len(chunks[-1]) + len(word) > room:
                        chunks.append([])
                    chunks[-1] += word
                    word = []
        return chunks

    def forward(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, 77 * chunks, width); emphasis moves a token's state away from the empty prompt's."""
        tokens, weights = self.tokenize(prompts)
        encoded = self.encode_tokens(rearrange(tokens, "b k l -> (b k) l"))
        weights = rearrange(weights, "b k l -> (b k) l 1").to(encoded)
        if (weights != 1).any():
            encoded = torch.lerp(self.encode_tokens(self.tokenize([""])[0][0]), encoded, weights)
        return rearrange(encoded, "(b k) l c -> b (k l) c", b=len(prompts))

    def encode_tokens(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids (B, L) padded with the end token -> (B, L, width); `positions` (L,): where, by default the first.

        Padding may be left out: no other state depends on it.
        """
        tokens = tokens.to(self.tower.positional_embedding.device)
        return self.encode_embedded(self.tower.token_embedding(tokens), tokens, positions)

    def encode_embedded(self, embedded: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """`encode_tokens` from the tokens' embeddings (B, L, width); the ids only tell where a text ends."""
        tower = self.tower
        where = slice(tokens.shape[1]) if positions is None else positions
        h = embedded + tower.positional_embedding[where]
        mask = _attention_mask(tokens, self.tokenizer.eot_token_id).to(h.dtype)
        h = tower.transformer(h, attn_mask=mask.repeat_interleave(self.config.heads, dim=0))
        return tower.ln_final(h)


def _open_clip():
    """open_clip, imported here, since it takes longer than all of this package."""
    remedy = "pip install 'open_clip_torch>={}.{}'".format(*OLDEST_OPEN_CLIP)
    try:
        import open_clip
    except ImportError as error:
        raise WuerstchenError(
            f"the text encoder needs open_clip_torch, and importing it failed ({error}): {remedy}"
        ) from error
    if tuple(map(int, re.findall(r"\d+", open_clip.__version__)[:2])) < OLDEST_OPEN_CLIP:
        raise WuerstchenError(f"open_clip_torch {open_clip.__version__} is too old for the text encoder: {remedy}")
    return open_clip


def _attention_mask(tokens: Tensor, end: int) -> Tensor:
    """(B, L) -> additive mask (B, L, L): causal, and the padding behind the first end token is no key."""
    length = tokens.shape[1]
    is_end = tokens == end
    padding = is_end.cumsum(dim=1) - is_end.int() > 0
    future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    masked = future | padding[:, None, :]
    return torch.zeros(masked.shape, device=tokens.device).masked_fill(masked, float("-inf"))
