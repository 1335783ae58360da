"""The embedded model's recipe: six networks, one after another, each from the ones before it.

Stage A learns to reconstruct pictures. The semantic compressor learns to keep what a small decoder needs to draw the
picture again (the published one starts from ImageNet weights instead). Their features of a fixed set of pictures are
computed once. The text encoder learns which caption belongs to which semantic latent. Stages B and C learn diffusion on
the features, and the previewer learns to draw small pictures from them.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.load import load_semantic_compressor, load_stage_a, load_text_encoder, outline, save
from ..geometry import Geometry
from ..models.blocks import LayerNorm2d, ResBlock
from ..models.latent_space import LatentSpace
from ..models.previewer import Previewer, PreviewerConfig
from ..models.semantic_compressor import BackboneStage, SemanticCompressor, SemanticCompressorConfig
from ..models.stage_a import VQGAN, StageAConfig
from ..models.stage_b import DiffNeXt, StageBConfig
from ..models.stage_c import Prior, StageCConfig
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from ..training.loop import run
from ..training.loop.draws import Draws
from ..training.loop.task import Task
from ..training.stages.conditioning import drop_captions, semantic, spoil
from ..training.stages.initialise import initialise
from ..training.stages.losses import contrastive_loss, diffusion_loss, quantization_loss, training_times
from ..training.stages.previewer import small
from ..training.stages.stage_c import noise_loss
from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from .captions import caption, keyword_caption, plain_caption
from .emoji import Description, EmojiSet
from .linear_preview import linear_preview

SIDE = 256
GEOMETRY = Geometry(SIDE, SIDE)
SEMANTIC = (16, *GEOMETRY.stage_c)
LATENT_SPACE = LatentSpace(shift=0.0, scale=1.0)

STAGE_A = StageAConfig(widths=(48, 96), bottleneck_blocks=3, codebook_size=1024, scale_factor=1.0)
COMPRESSOR = SemanticCompressorConfig(
    stem=16,
    stages=tuple(BackboneStage(True, 4, 2, channels, 1) for channels in (32, 64, 128, 192)),
    features=384,
    latent_space=LATENT_SPACE,
)
TEXT_ENCODER = TextEncoderConfig(width=192, layers=9, heads=3)
READING, REMEMBERING = 4, 4  # its first blocks, and the next; the last one places
STAGE_B = StageBConfig(
    widths=(48, 96, 192, 192),
    heads=(0, 0, 3, 3),
    blocks=(1, 2, 2, 1),
    condition_width=96,
    text_width=192,
    dropout=0.0,
    latent_space=LATENT_SPACE,
    text_absent=True,
)
STAGE_C = StageCConfig(width=256, depth=4, heads=4, text_width=192, dropout=0.0)
PREVIEWER = PreviewerConfig(widths=(64, 48, 32, 24))


@dataclasses.dataclass(frozen=True)
class Plan(run.Plan):
    """The options of a run, with defaults for small networks that are trained for minutes."""

    batch: int = 16
    warm_up: int = 200
    cool_down: float = 0.25
    ema_every: int = 10
    ema_decay: float = 0.98
    save_every: int = 200
    sample_every: int = 0


PLANS = {
    "stage_a": Plan(steps=3500, batch=16, learning_rate=2e-3),
    "semantic_compressor": Plan(steps=1300, batch=16, learning_rate=2e-3),
    "text_encoder": Plan(steps=2300, batch=96, learning_rate=1.5e-3),
    "stage_b": Plan(steps=9000, batch=16, learning_rate=1e-3),
    "stage_c": Plan(steps=5000, batch=40, learning_rate=8e-4, cool_down=0.12, gradient_norm=0.5),
    "previewer": Plan(steps=2000, batch=32, learning_rate=2e-3),
}

# What the text encoder learns by heart.
MEMORY_PLAN = Plan(steps=24000, batch=512, learning_rate=5e-3, cool_down=0.6, save_every=1000)

# How many pictures of each emoji have their features kept, the plain one first.
VARIANTS = {"semantic_compressor": 5, "stage_a": 2}
PATCH = 16  # pixels of a small picture to a position of Stage C's latent: the compressor learns on 96x96
CROP = 64  # Stage A learns from crops of this side
PLAIN = 0.7  # share of plain pictures among those that texts are learned with
MARKED = (6, 122)  # channels of the text encoder's states, equal but in the end token's
MARK = 0.3  # by how much they differ there

# How the text encoder's last block is made. Before it a state is some 800 long.
OBSERVED = 120  # batches of captions that least squares goes by
SEAT_CODE = 3000.0  # length of the codes of the last positions: more than what the other blocks add to a state
MARK_SEEN = 0.005  # what normalisation leaves of the mark at least
SHARPNESS = 40.0  # by how much the end token's key then stands out
BROUGHT = 150.0  # how much of the end token's state, whose channels have unit variance, is brought to the others
LIFT = 10.0  # where GELU is the identity, and its negative where it is zero
TELLING = 1500.0  # length of what a unit adds to a state
PREDICTED = 12  # positions of the latent that are predicted from each caption in a step of the text encoder
CAPTIONS = (0,) * 3 + (1, 2, 3, 4)  # which of an emoji's pictures the captions are about whose states are kept
REHEARSED = (0,) * 40 + (1, 2, 3, 4) * 8  # the same of the captions that are learned by heart
FITTED = 2000  # pictures that the linear previewer is fitted to
HIGH_NOISE, P2_K = 0.6, 0.03  # Stages B and C learn most at high noise: its share of the times, P2 weighting's k
LARGEST_ERROR = 20.0  # of a sample in Stages B and C: with errors beyond it one would undo what many have taught
REPEATS = 2  # Stage C sees each caption of a batch at this many noise levels


def train_mini(data: str | Path, work: str | Path, only: str | None = None, steps: int | None = None) -> None:
    """Train the mini's networks, or `only` one of them, on the emoji of `data`; weights and checkpoints go to `work`.

    Networks whose weights are in `work` already are not trained again; an interrupted run resumes from its checkpoint.

    Raises:
        WuerstchenError: there is no data set in `data`, `only` is not one of the networks, or steps is below 1.
    """
    if only not in (None, *PLANS):
        raise WuerstchenError(f"the mini has no network {only!r}: choose one of {', '.join(PLANS)}")
    if steps is not None and steps < 1:
        raise WuerstchenError(f"steps is {steps}: it must be at least 1")
    emoji, work = EmojiSet(data), Path(work)
    work.mkdir(parents=True, exist_ok=True)
    for name in (only,) if only else PLANS:
        plan = dataclasses.replace(PLANS[name], steps=steps) if steps else PLANS[name]
        if not (work / f"{name}.safetensors").exists():
            TRAINERS[name](emoji, work, plan)


def train(network: nn.Module, loss: Callable[[random.Random], Tensor], plan: Plan, folder: Path) -> None:
    """Trains `network` in place to the end of the plan, from where the last run in `folder` has stopped, and leaves it
    with its averaged weights, in eval mode.

    `loss(generator)` draws one batch with the generator (and torch's own) and gives its loss.
    """
    recipe = Recipe(network, loss)
    run.train(recipe, plan, folder, lambda first, rank, world: repeat({"key": [""] * plan.batch}))
    kept = "averaged" if plan.steps >= plan.ema_every else "weights"  # there was no average yet
    recipe.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)[kept], strict=False)
    recipe.eval()


class Recipe(Task):
    """A network and its loss, which draws its own batches."""

    def __init__(self, network: nn.Module, loss: Callable[[random.Random], Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        return {"loss": self.loss(draws.common)}

    def exported(self) -> dict[str, nn.Module]:
        return {}


def train_stage_a(emoji: EmojiSet, work: Path, plan: Plan) -> None:
    """Reconstruction and codebook: a quarter of a batch is decoded from quantized latents, the rest as Stage B gives
    them."""
    stage_a = VQGAN(STAGE_A)

    def loss(generator: random.Random) -> Tensor:
        pictures = torch.stack([_crop(_draw(emoji, generator)[0], generator) for _ in range(plan.batch)])
        latent = stage_a.encode(pictures)
        quantized, indices = stage_a.quantize(latent)
        if generator.random() < 0.02:
            stage_a.revive(latent, indices)
        straight_through = latent + (quantized - latent).detach()
        some = plan.batch // 4
        drawn = stage_a.decode(torch.cat([straight_through[:some], latent[some:]]))
        error = F.l1_loss(drawn, pictures) + 10 * F.mse_loss(drawn, pictures)
        return error + 0.1 * quantization_loss(latent, quantized)

    train(stage_a, loss, plan, work / "stage_a")
    train_decoder(stage_a, emoji, plan, work / "stage_a_decoder")
    generator = random.Random(plan.seed)
    with torch.no_grad():
        deviation = stage_a.encode(torch.stack([_draw(emoji, generator)[0] for _ in range(64)])).std().item()
    stage_a.config = dataclasses.replace(stage_a.config, scale_factor=deviation)
    save(stage_a, work / "stage_a.safetensors", torch.float16)


def train_decoder(stage_a: VQGAN, emoji: EmojiSet, plan: Plan, folder: Path) -> None:
    """At the end the decoder learns on alone, from latents that are not quantized, as Stage B gives them."""
    decoder = nn.ModuleList([stage_a.up_blocks, stage_a.out_block])

    def loss(generator: random.Random) -> Tensor:
        pictures = torch.stack([_crop(_draw(emoji, generator)[0], generator) for _ in range(plan.batch)])
        with torch.no_grad():
            latent = stage_a.encode(pictures)
        return 10 * F.mse_loss(stage_a.decode(latent), pictures)

    end = dataclasses.replace(plan, steps=max(1, plan.steps // 4), learning_rate=plan.learning_rate / 2, cool_down=0.8)
    train(decoder, loss, end, folder)


class PictureDecoder(nn.Module):
    """Semantic latent (B, 16, p, q) -> picture of 16 times its size: what the compressor is trained with.

    It starts as the linear decoder of `patches`, the principal components of PATCH x PATCH pixels, to which its blocks
    learn to add.
    """

    def __init__(self, patches: "PatchComponents", widths: tuple[int, ...] = (256, 128, 64)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(16, widths[0], 1)]
        for width, narrower in zip(widths, (*widths[1:], None), strict=True):
            layers.append(ResBlock(width))
            if narrower:
                layers += [LayerNorm2d(), nn.ConvTranspose2d(width, narrower, 2, stride=2)]
        last = nn.Conv2d(widths[-1], 3 * 4**2, 3, padding=1)
        nn.init.zeros_(last.weight)
        layers += [LayerNorm2d(), last, nn.PixelShuffle(4)]
        self.layers = nn.Sequential(*layers)
        linear = nn.Conv2d(16, 3 * PATCH**2, 1)
        linear.weight.data = (patches.directions * patches.deviations[:, None]).T[:, :, None, None].contiguous()
        linear.bias = nn.Parameter(patches.mean)
        self.linear = nn.Sequential(linear, nn.PixelShuffle(PATCH))

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent.contiguous(memory_format=torch.channels_last)
        return self.layers(latent) + self.linear(latent)


@dataclasses.dataclass(frozen=True)
class PatchComponents:
    """The first 16 principal components of the patches of small pictures, one patch to a position of the latent."""

    mean: Tensor  # (3 * PATCH²,)
    directions: Tensor  # (16, 3 * PATCH²)
    deviations: Tensor  # (16,)

    @classmethod
    def of(cls, pictures: Tensor) -> "PatchComponents":
        patches = _patches(pictures)
        mean = patches.mean(dim=0)
        _, values, directions = torch.linalg.svd(patches - mean, full_matrices=False)
        return cls(mean, directions[:16], values[:16] / len(patches) ** 0.5)

    def coefficients(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, H, W) -> coefficients of unit variance (B, 16, H / PATCH, W / PATCH)"""
        coefficients = (_patches(pictures) - self.mean) @ self.directions.T / self.deviations
        rows = pictures.shape[2] // PATCH
        return rearrange(coefficients, "(b h w) c -> b c h w", b=len(pictures), h=rows)


def train_semantic_compressor(emoji: EmojiSet, work: Path, plan: Plan) -> None:
    """The compressor's features must be enough to draw the picture small, even with a little noise on them.

    Principal components are what it is led to first: a network that starts from random weights finds little more than
    colours in the time that the mini is given.
    """
    generator = random.Random(plan.seed)
    patches = PatchComponents.of(_small(torch.stack([_draw(emoji, generator)[0] for _ in range(400)])))
    compressor = SemanticCompressor(COMPRESSOR)
    networks = nn.ModuleDict({"compressor": compressor, "decoder": PictureDecoder(patches)})

    def loss(generator: random.Random) -> Tensor:
        drawn = torch.stack([_draw(emoji, generator)[0] for _ in range(plan.batch)])
        small = _small(drawn)
        features = semantic(compressor, drawn)
        again = networks["decoder"](features + 0.05 * torch.randn_like(features))
        return 10 * F.mse_loss(again, small) + 0.3 * F.mse_loss(features, patches.coefficients(small))

    train(networks, loss, plan, work / "semantic_compressor")

    # A batch's own mean and variance say too much about its few backgrounds: the end is learned without them.
    def loss_with_fixed_statistics(generator: random.Random) -> Tensor:
        for module in networks.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return loss(generator)

    end = dataclasses.replace(plan, steps=plan.steps // 2, learning_rate=plan.learning_rate / 2)
    train(networks, loss_with_fixed_statistics, end, work / "semantic_compressor_end")
    save(compressor, work / "semantic_compressor.safetensors", torch.float16)


@dataclasses.dataclass(frozen=True)
class Features:
    """What does not change while Stages B and C learn: some pictures of every emoji, seen by the trained networks.

    semantic (N, variants, 16, 6, 6) and stage_a (N, variants, 4, 64, 64) are float16 arrays, the first variant the
    plain picture; descriptions[i][v] says what a picture shows.
    """

    semantic: np.ndarray
    stage_a: np.ndarray | None
    descriptions: list[list[Description]]

    def draw(self, count: int, generator: random.Random, plain: float = 0.5) -> list[tuple[int, int]]:
        """`count` times an emoji and one of its pictures that have all features; `plain` is the share of plain ones."""
        variants = (self.semantic if self.stage_a is None else self.stage_a).shape[1]
        emoji = [generator.randrange(len(self.semantic)) for _ in range(count)]
        return [(i, 0 if generator.random() < plain else generator.randrange(1, variants)) for i in emoji]

    def captions(self, drawn: list[tuple[int, int]], generator: random.Random) -> list[str]:
        return [caption(self.descriptions[i][v], generator) for i, v in drawn]

    def captions_of(self, i: int, variants: tuple[int, ...], generator: random.Random) -> list[str]:
        """A caption for each of an emoji's pictures in `variants`; the first two, of the plain one, are canonical: by
        name and, if there are any, by keywords."""
        captions = self.captions([(i, variant) for variant in variants], generator)
        plain = self.descriptions[i][0]
        captions[0] = plain_caption(plain.name, plain.style)
        if plain.keywords:
            captions[1] = keyword_caption(plain.keywords, plain.style)
        return captions


def arrangements(emoji: EmojiSet, i: int) -> list[tuple[Description, dict]]:
    """The pictures of an emoji whose features are kept, always the same: the plain one, then others."""
    generator = random.Random(i)
    entry = emoji.entries[i]
    plain = Description(entry["name"], tuple(entry["keywords"]), entry["style"])
    arranged: list[tuple[Description, dict]] = [(plain, {})]
    while len(arranged) < max(VARIANTS.values()):
        description, arrangement = emoji.arrange(i, generator)
        if description != plain:
            arranged.append((description, arrangement))
    return arranged


@torch.no_grad()
def features(emoji: EmojiSet, work: Path, network: str) -> np.ndarray:
    """The features (N, variants, C, rows, columns) float16 of a trained network, computed once and kept in `work`."""
    path = work / f"features_{network}.npy"
    if not path.exists():
        weights = work / f"{network}.safetensors"
        see: Callable[[Tensor], Tensor]
        if network == "stage_a":
            see, shape = load_stage_a(weights).encode, (4, *GEOMETRY.stage_a)
        else:
            compressor = load_semantic_compressor(weights)
            see, shape = lambda image: semantic(compressor, image), SEMANTIC
        with replacing(path) as partial:
            variants = VARIANTS[network]
            kept = np.lib.format.open_memmap(partial, "w+", np.float16, (len(emoji), variants, *shape))
            for i in tqdm(range(len(emoji)), desc=f"features of {network}"):
                pictures = [emoji.compose(i, **how) for _, how in arrangements(emoji, i)[:variants]]
                kept[i] = see(torch.stack(pictures)).numpy()
            kept.flush()
    return np.load(path, mmap_mode="r")


def load_features(emoji: EmojiSet, work: Path, with_stage_a: bool = False) -> Features:
    descriptions = [[description for description, _ in arrangements(emoji, i)] for i in range(len(emoji))]
    stage_a = features(emoji, work, "stage_a") if with_stage_a else None
    return Features(features(emoji, work, "semantic_compressor"), stage_a, descriptions)


def train_text_encoder(emoji: EmojiSet, work: Path, plan: Plan) -> None:
    """The first blocks learn to read, the next to remember, the last one to place."""
    seen = load_features(emoji, work)
    reader = TextEncoder(dataclasses.replace(TEXT_ENCODER, layers=READING))
    learn_to_read(reader, seen, plan, work / "text_encoder")
    encoder = TextEncoder(TEXT_ENCODER)
    encoder.load_state_dict(reader.state_dict(), strict=False)
    remember(encoder, reader, seen, work / "text_encoder_memory")
    place(encoder, seen)
    save(encoder, work / "text_encoder.safetensors", torch.float16)


@torch.no_grad()
def mark_ends(encoder: TextEncoder) -> None:
    """Two channels of all states become the same, but for a difference of MARK in the end token's.

    So the last block can find the end token, whatever the others have made of its state.
    """
    one, other = MARKED
    for embedding in (encoder.tower.token_embedding.weight, encoder.tower.positional_embedding):
        embedding[:, one] = embedding[:, other] = (embedding[:, one] + embedding[:, other]) / 2
    end = encoder.tower.token_embedding.weight[encoder.tokenizer.eot_token_id]
    end[one] += MARK / 2
    end[other] -= MARK / 2
    keep_mark(encoder.tower.transformer.resblocks)


@torch.no_grad()
def keep_mark(blocks: Iterable[nn.Module]) -> None:
    """What blocks add to a state is the same in the two channels."""
    one, other = MARKED
    for block in blocks:
        for linear in ("attn.out_proj", "mlp.c_proj"):
            for parameter in block.get_submodule(linear).parameters():
                parameter[one] = parameter[other] = (parameter[one] + parameter[other]) / 2


def learn_to_read(reader: TextEncoder, seen: Features, plan: Plan, folder: Path) -> None:
    """CLIP's contrastive learning, of captions and the semantic latents of the pictures they describe.

    Each of the last states must also predict its position of the latent.
    """
    width = TEXT_ENCODER.width
    channels, *area = seen.semantic.shape[2:]
    networks = nn.ModuleDict(
        {
            "encoder": reader,
            "text": nn.Linear(width, width),
            "picture": nn.Sequential(nn.Linear(channels * math.prod(area), 512), nn.GELU(), nn.Linear(512, width)),
            "latent": nn.Linear(width, channels),
        }
    )
    scale = networks.scale = nn.Parameter(torch.tensor(2.5))

    def loss(generator: random.Random) -> Tensor:
        mark_ends(reader)
        drawn = seen.draw(plan.batch, generator, plain=PLAIN)
        positions = generator.sample(range(math.prod(GEOMETRY.stage_c)), PREDICTED)
        ends, states = _read(reader, seen.captions(drawn, generator), positions)
        latents = _stack(seen.semantic, drawn)
        index = torch.tensor(drawn)
        same = (index[:, None] == index[None]).all(dim=2)
        pictures = networks["picture"](latents.flatten(1))
        contrast = contrastive_loss(networks["text"](ends), pictures, scale.exp(), same)
        return contrast + 8 * F.mse_loss(networks["latent"](states), latents.flatten(2)[:, :, positions].mT)

    train(networks, loss, plan, folder)
    mark_ends(reader)


def remember(encoder: TextEncoder, reader: TextEncoder, seen: Features, folder: Path) -> None:
    """Which name stands for which picture is a table to be learned by heart.

    Blocks without attention learn to predict the whole latent from the end token's state alone, which costs a
    thousandth of a sample in Stage C.
    """
    blocks = encoder.tower.transformer.resblocks[READING : READING + REMEMBERING]
    for block in blocks:
        _silence(block.attn.out_proj)
    memory = nn.Sequential(*(Residual(nn.Sequential(block.ln_2, block.mlp)) for block in blocks))
    head = nn.Sequential(nn.LayerNorm(TEXT_ENCODER.width), nn.Linear(TEXT_ENCODER.width, math.prod(SEMANTIC)))
    networks = nn.Sequential(memory, head)
    ends, latents = _ends(reader, seen)

    def loss(generator: random.Random) -> Tensor:
        keep_mark(blocks)
        rows = torch.randint(len(ends), (MEMORY_PLAN.batch,))
        return F.mse_loss(networks(ends[rows]), latents[rows].float())

    train(networks, loss, MEMORY_PLAN, folder)
    keep_mark(blocks)


@torch.no_grad()
def place(encoder: TextEncoder, seen: Features) -> None:
    """Moves the latent that the end token's state holds to the last states, one position to each.

    Least squares puts the last block there, since gradient descent takes long to find it: attention brings the state
    that is marked to all padding, and the MLP is a linear map for every position, switched on by the code that the
    positional embedding gives to its seat. Of each channel half the latent comes to stand in its direction.
    """
    block, width, (channels, *area) = encoder.tower.transformer.resblocks[-1], TEXT_ENCODER.width, SEMANTIC
    positions = range(math.prod(area))
    basis = nn.init.orthogonal_(torch.empty(len(positions) + channels, width))
    codes, directions = SEAT_CODE * basis[: len(positions)], TELLING * basis[len(positions) :]
    encoder.tower.positional_embedding[-len(positions) :] = codes
    _bring_ends(block.attn)
    _silence(block.mlp.c_proj)

    states, there, latents, generator = [], [], [], random.Random("place")

    def look(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        states.append(output[:, -len(codes) :])
        there.append(arguments[0][:, -len(codes) :] @ directions.T / TELLING**2)

    hook = block.ln_2.register_forward_hook(look)
    for _ in tqdm(range(OBSERVED), desc="captions"):
        drawn = seen.draw(64, generator, plain=PLAIN)
        _read(encoder, seen.captions(drawn, generator), positions)
        latents.append(_stack(seen.semantic, drawn).flatten(2).mT)
    hook.remove()
    missing = torch.cat(latents) / 2 - torch.cat(there)
    _switch_on(block.mlp, torch.cat(states), missing, directions)


@torch.no_grad()
def _bring_ends(attention: nn.MultiheadAttention) -> None:
    """Sets attention to bring the normalised state that is marked to all that comes after it."""
    one, other = MARKED
    width = attention.embed_dim
    reach = width // attention.num_heads
    queries, keys, values = attention.in_proj_weight.chunk(3)
    for part in (queries, keys, attention.in_proj_bias, attention.out_proj.bias):
        part.zero_()
    attention.in_proj_bias[:width:reach] = reach**0.5
    keys[::reach, one], keys[::reach, other] = SHARPNESS / MARK_SEEN, -SHARPNESS / MARK_SEEN
    values.copy_(torch.eye(width))
    attention.out_proj.weight.copy_(BROUGHT * torch.eye(width))


@torch.no_grad()
def _switch_on(mlp: nn.Module, states: Tensor, missing: Tensor, directions: Tensor) -> None:
    """Sets an MLP to add what is `missing` (N, seats, channels), each channel in its direction (channels, width), by a
    linear map a seat of the states (N, seats, width).

    A hidden unit belongs to a seat and a channel. At its own seat it is raised by LIFT to where GELU is the identity;
    at all others it is lowered to where GELU is zero. One more unit per seat, only raised, subtracts LIFT again.
    """
    count, seats, width = states.shape
    channels = missing.shape[2]
    maps = torch.stack([_least_squares(states[:, seat], missing[:, seat]) for seat in range(seats)])
    own = 2 * torch.eye(seats) - 1
    switches = _least_squares(rearrange(states, "n s w -> (n s) w"), own.repeat(count, 1))
    into = F.pad(maps, (0, 1)) + LIFT * rearrange(switches, "w s -> s w 1")
    units = seats * (channels + 1)
    mlp.get_parameter("c_fc.weight")[:units] = rearrange(into[:, :-1], "s w c -> (s c) w").float()
    mlp.get_parameter("c_fc.bias")[:units] = rearrange(into[:, -1], "s c -> (s c)").float()
    directions = torch.cat([directions, -directions.sum(dim=0, keepdim=True)])
    mlp.get_parameter("c_proj.weight")[:, :units] = directions.T.repeat(1, seats)


def _least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    """The affine map (width + 1, outputs) from inputs (N, width) to targets (N, outputs), the offset last."""
    rows = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    ridge = 1e-4 * len(rows) * torch.eye(rows.shape[1]).double()
    return torch.linalg.solve(rows.T @ rows + ridge, rows.T @ targets.double())


def _silence(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _read(encoder: TextEncoder, captions: list[str], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Captions -> the states of their end tokens (B, width), and of the last states those (B, len(positions), width)
    that stand for these positions of the latent. Other padding is left out: no state depends on it."""
    tokens = encoder.tokenize(captions)[0][:, 0]
    end = (tokens == encoder.tokenizer.eot_token_id).int().argmax(dim=1)
    length, count = int(end.max()) + 1, math.prod(GEOMETRY.stage_c)
    seats = torch.cat([torch.arange(length), tokens.shape[1] - count + torch.tensor(positions, dtype=torch.long)])
    states = encoder.encode_tokens(tokens[:, seats], seats)
    return states[torch.arange(len(end)), end], states[:, length:]


class Residual(nn.Module):
    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@torch.no_grad()
def _ends(reader: TextEncoder, seen: Features) -> tuple[Tensor, Tensor]:
    """Many captions -> what the reader's last block says of their end tokens (rows, width), and the latents that they
    describe (rows, size)"""
    generator = random.Random("memory")
    norm, reader.tower.ln_final = reader.tower.ln_final, nn.Identity()
    ends, latents = [], []
    for i in tqdm(range(len(seen.semantic)), desc="captions"):
        ends.append(_read(reader, seen.captions_of(i, REHEARSED, generator), ())[0])
        latents.append(_stack(seen.semantic, [(i, variant) for variant in REHEARSED]).flatten(1).half())
    reader.tower.ln_final = norm
    return torch.cat(ends), torch.cat(latents)


@torch.no_grad()
def read_captions(seen: Features, encoder: TextEncoder, work: Path) -> np.ndarray:
    """The states of captions of every emoji's pictures (N, len(CAPTIONS), 77, width) float16, computed once."""
    path = work / "features_text_encoder.npy"
    if not path.exists():
        generator = random.Random("captions")
        shape = (len(seen.semantic), len(CAPTIONS), TEXT_ENCODER.context_length, TEXT_ENCODER.width)
        with replacing(path) as partial:
            kept = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
            for i in tqdm(range(len(kept)), desc="features of text_encoder"):
                kept[i] = encoder(seen.captions_of(i, CAPTIONS, generator)).numpy()
            kept.flush()
    return np.load(path, mmap_mode="r")


def train_stage_b(emoji: EmojiSet, work: Path, plan: Plan) -> None:
    """Diffusion in Stage A's space from semantic latents, some absent, some noisy; every other batch has text too."""
    seen = load_features(emoji, work, with_stage_a=True)
    latents = seen.stage_a
    assert latents is not None
    encoder = load_text_encoder(work / "text_encoder.safetensors")
    states, nothing = read_captions(seen, encoder, work), encoder([""])
    config: Any = outline(work / "stage_a.safetensors", "stage_a").config
    stage_b = DiffNeXt(dataclasses.replace(STAGE_B, stage_a_scale=config.scale_factor))
    initialise(stage_b)

    def loss(generator: random.Random) -> Tensor:
        drawn = seen.draw(plan.batch, generator)
        semantic = _spoil(_stack(seen.semantic, drawn), generator)
        text = None
        if generator.random() < 0.5:
            text = _drop(_stack(states, _captioned(drawn, generator)), nothing, generator)
        t = training_times(len(drawn), HIGH_NOISE)
        return diffusion_loss(
            lambda x, t: stage_b(x, t, semantic, text), _stack(latents, drawn), P2_K, t, None, LARGEST_ERROR
        )

    train(stage_b, loss, plan, work / "stage_b")
    save(stage_b, work / "stage_b.safetensors", torch.float16)


def train_stage_c(emoji: EmojiSet, work: Path, plan: Plan) -> None:
    """Diffusion in the compressor's space from text; each text serves REPEATS noise levels of its picture."""
    seen = load_features(emoji, work)
    encoder = load_text_encoder(work / "text_encoder.safetensors")
    states, nothing = read_captions(seen, encoder, work), encoder([""])
    stage_c = Prior(STAGE_C)
    initialise(stage_c)

    def loss(generator: random.Random) -> Tensor:
        drawn = seen.draw(plan.batch, generator, plain=PLAIN)
        text = _drop(_stack(states, _captioned(drawn, generator)), nothing, generator)
        t = training_times(len(drawn) * REPEATS, HIGH_NOISE)
        return noise_loss(stage_c, _stack(seen.semantic, drawn), text, REPEATS, P2_K, t, None, LARGEST_ERROR)

    train(stage_c, loss, plan, work / "stage_c")
    save(stage_c, work / "stage_c.safetensors", torch.float16)


def train_previewer(emoji: EmojiSet, work: Path, plan: Plan) -> None:
    """From semantic latents to small pictures; the linear previewer is fitted with it."""
    seen = load_features(emoji, work)
    previewer = Previewer(PREVIEWER)

    def loss(generator: random.Random) -> Tensor:
        drawn = seen.draw(plan.batch, generator)
        pictures = torch.stack([emoji.compose(i, **arrangements(emoji, i)[v][1]) for i, v in drawn])
        return F.mse_loss(previewer(_stack(seen.semantic, drawn)), small(pictures))

    train(previewer, loss, plan, work / "previewer")
    save(previewer, work / "previewer.safetensors", torch.float16)
    compressor = load_semantic_compressor(work / "semantic_compressor.safetensors")
    linear = linear_preview(emoji, compressor, count=FITTED)
    save(linear, work / "linear_preview.safetensors", torch.float16)


def _captioned(drawn: list[tuple[int, int]], generator: random.Random) -> list[tuple[int, int]]:
    """An emoji and one of its pictures -> the emoji and one of the captions of that picture"""
    return [(i, generator.choice([c for c, about in enumerate(CAPTIONS) if about == v])) for i, v in drawn]


def _stack(kept: np.ndarray, drawn: list[tuple[int, int]]) -> Tensor:
    return torch.from_numpy(np.stack([kept[i, v] for i, v in drawn])).float()


def _drop(text: Tensor, nothing: Tensor, generator: random.Random) -> Tensor:
    """5 % of the texts become the empty one."""
    return drop_captions(text, nothing, 0.05, torch.tensor([generator.random() for _ in text]))


def _spoil(semantic: Tensor, generator: random.Random) -> Tensor:
    """5 % of the semantic latents become zero, 30 % get noise up to t = 0.5 (paper, Stage B's training)."""
    t = torch.tensor([generator.random() * 0.5 for _ in semantic])
    chance = torch.tensor([generator.random() for _ in semantic])
    return spoil(semantic, LATENT_SPACE, 0.05, 0.3, chance, t, torch.randn_like(semantic))


def _draw(emoji: EmojiSet, generator: random.Random) -> tuple[Tensor, Description]:
    return emoji.draw(generator.randrange(len(emoji)), generator)


def _crop(picture: Tensor, generator: random.Random) -> Tensor:
    top, left = (generator.randrange(side - CROP + 1) for side in picture.shape[-2:])
    return picture[:, top : top + CROP, left : left + CROP]


def _small(pictures: Tensor) -> Tensor:
    """(B, 3, 256, 256) -> (B, 3, 6 * PATCH, 6 * PATCH)"""
    return F.interpolate(pictures, size=[side * PATCH for side in GEOMETRY.stage_c], mode="area")


def _patches(pictures: Tensor) -> Tensor:
    return rearrange(pictures, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH)


TRAINERS = {
    "stage_a": train_stage_a,
    "semantic_compressor": train_semantic_compressor,
    "text_encoder": train_text_encoder,
    "stage_b": train_stage_b,
    "stage_c": train_stage_c,
    "previewer": train_previewer,
}
