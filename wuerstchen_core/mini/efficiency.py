"""The paper's claim in the mini's size: text is learned with fewer operations in the semantic compressor's space.

Stage C and the paper's baseline, a latent diffusion model of a single stage on Stage A's latents, learn the same
pictures by the same trainer and from the same text encoder, which is random and stays so: the mini's own was taught
with semantic latents. After equally many operations of training each is asked for every picture by its caption.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .. import pipeline
from ..checkpoints.load import load_stage_a, load_stage_b, load_stage_c, load_text_encoder, save
from ..checkpoints.sets import MINI, SET
from ..diffusion.options import SamplingOptions
from ..geometry import Geometry
from ..models.stage_b import DiffNeXt
from ..models.stage_c import Prior
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from ..reports.cost import operations
from ..reports.plots import plotted
from ..training.command import configured, train
from ..training.stages.stage_c import predictor
from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from ..util.json_file import write_json
from .captions import plain_caption
from .emoji import EmojiSet
from .evaluation import thumbnail

GEOMETRY = Geometry(256, 256)
TEXT_ENCODER = TextEncoderConfig(width=192, layers=2, heads=3, context_length=24)
STYLE = "noto"
BATCH = 25  # pictures that are drawn at once
WARM_UP = 100  # steps: the shortest runs are not much longer
TERA = 10**12
TEXT_FILE = "text_encoder.safetensors"
LARGEST_BUDGET = 1e9


class Contender(NamedTuple):
    """A network that learns to draw from text, and how."""

    stage: str
    config: str  # of the trainer
    batch: int


CONTENDERS = {  # whose steps take equally many operations
    "Stage C": Contender("stage-c", "mini", batch=20),
    "baseline": Contender("stage-b", "baseline", batch=16),
}


def compare(emoji: EmojiSet, work: Path, count: int, budgets: Sequence[float]) -> Iterator[dict]:
    """Trains both on `count` emoji and gives a row for each and every budget, in 10¹² operations, the smallest first.

    A row has "network", "budget", "steps", "operations" (a multiplication and an addition are two), "pictures" (drawn
    from the training data so far) and "top-1", the share of captions whose picture is nearer to the right one than to
    the others. Runs and rows (`efficiency.json`) are kept in `work`: what is there is not computed again.

    Raises:
        WuerstchenError: there are not so many emoji, a budget is not above 0, the rows in `work` are of other emoji, or
            as training does.
    """
    chosen = chosen_emoji(emoji, count)
    if not budgets or not all(0 < budget < LARGEST_BUDGET for budget in budgets):
        raise WuerstchenError(f"budgets are numbers above 0 and below {LARGEST_BUDGET:g}, in 10¹² operations")
    kept = work / "efficiency.json"
    rows = _kept(kept, count)
    done = {(row["network"], row["budget"]) for row in rows}
    encoder = prepare(emoji, chosen, work)
    captions = [_caption(emoji, i) for i in chosen]
    references = torch.stack([thumbnail(emoji.plain(i)) for i in chosen])
    yield from rows
    for budget in sorted(budgets):
        for name, contender in CONTENDERS.items():
            if (name, budget) in done:
                continue
            each = operations_of_step(contender)
            steps = max(1, round(budget * TERA / each))
            network = _trained(contender, work, steps)
            row = {
                "network": name,
                "budget": budget,
                "steps": steps,
                "operations": steps * each,
                "pictures": steps * contender.batch,
                "top-1": recognised(drawn(network, encoder, captions), references),
            }
            rows.append(row)
            write_json(kept, {"emoji": count, "rows": rows})
            yield row


def chosen_emoji(emoji: EmojiSet, count: int) -> list[int]:
    """Always the same ones. Raises WuerstchenError where there are not so many."""
    of_style = [i for i, entry in enumerate(emoji.entries) if entry["style"] == STYLE]
    if not 2 <= count <= len(of_style):
        raise WuerstchenError(f"count is {count}: it must be from 2 to {len(of_style)}, the emoji of {STYLE}")
    return random.Random("efficiency").sample(of_style, count)


def prepare(emoji: EmojiSet, chosen: Sequence[int], work: Path) -> TextEncoder:
    """Writes what both learn from, pictures with captions, and the text encoder, which it returns."""
    pictures = work / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(chosen):
        picture = pictures / f"{number:04}.png"
        if not picture.exists():
            picture.with_suffix(".txt").write_text(_caption(emoji, i), encoding="utf-8")
            pixels = (emoji.plain(i) * 255).round().byte()
            with replacing(picture) as partial:
                Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()).save(partial)
    path = work / TEXT_FILE
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save(TextEncoder(TEXT_ENCODER), path)
    return load_text_encoder(path)


def operations_of_step(contender: Contender) -> int:
    """Of a step of training: a forward and a backward pass of the network that learns."""
    options, batch = configured(contender.stage, contender.config), contender.batch
    with torch.device("meta"):
        text = torch.empty(batch, TEXT_ENCODER.context_length, TEXT_ENCODER.width)
        if contender.stage == "stage-c":
            stage_c, levels = Prior(options.network), options.noise_levels
            x, t = (
                torch.empty(batch * levels, stage_c.config.latent_channels, *GEOMETRY.stage_c),
                torch.empty(batch * levels),
            )
            return operations(lambda: predictor(stage_c, text, levels)(x, t).sum().backward())
        network = DiffNeXt(options.network)
        x, t = torch.empty(batch, network.config.latent_channels, *GEOMETRY.stage_a), torch.empty(batch)
        nothing = torch.empty(batch, network.config.semantic_channels, *GEOMETRY.stage_c)
        return operations(lambda: network(x, t, nothing, text).sum().backward())


def drawn(network: Prior | DiffNeXt, encoder: TextEncoder, captions: Sequence[str]) -> Iterator[Tensor]:
    """A picture (256, 256, 3) for each caption; both networks sample alike.

    From Stage C's latent the mini's Stage B draws on, without text.
    """
    stage_a, stage_b = load_stage_a(MINI / SET["stage_a"]), load_stage_b(MINI / SET["stage_b"])
    with torch.inference_mode():
        empty = encoder([""])
        for start in range(0, len(captions), BATCH):
            text = encoder(list(captions[start : start + BATCH]))
            options = SamplingOptions(seed=start)
            nothing = torch.zeros(len(text), stage_b.config.semantic_channels, *GEOMETRY.stage_c)
            if isinstance(network, Prior):
                semantic = pipeline.sample_stage_c(network, nothing, text, empty, options)
                latent = pipeline.sample_stage_b(stage_b, semantic, GEOMETRY, seed=start)
            else:
                latent = pipeline.sample_stage_b(network, nothing, GEOMETRY, text, empty, options)
            yield from pipeline.decode(stage_a, latent, GEOMETRY)


def recognised(images: Iterable[Tensor], references: Tensor) -> float:
    """The share of images (H, W, 3) that no reference is nearer to than their own; references are `thumbnail`s."""
    likeness = torch.stack([references @ thumbnail(rearrange(image, "h w c -> c h w")) for image in images])
    return (likeness.diagonal() >= likeness.max(dim=1).values).double().mean().item()


def plot(path: Path, rows: Sequence[dict]) -> None:
    """Writes recognition over operations to a PNG file."""
    with plotted(path) as (axis,):
        for name in CONTENDERS:
            own = [row for row in rows if row["network"] == name]
            axis.plot([row["operations"] for row in own], [100 * row["top-1"] for row in own], "o-", label=name)
        axis.set_xscale("log")
        axis.set_xlabel("operations of training")
        axis.set_ylabel("recognised, %")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
        axis.legend()


def _trained(contender: Contender, work: Path, steps: int) -> Prior | DiffNeXt:
    """The averaged weights after so many steps; the run goes on from where it has stopped before."""
    folder = work / contender.stage
    train(
        contender.stage,
        config=contender.config,
        folder=folder,
        data=work / "pictures",
        cache=str(work / "cache"),
        text_encoder=str(work / TEXT_FILE),
        batch=contender.batch,
        steps=steps,
        warm_up=WARM_UP,
        cool_down=0.0,
        sample_every=0,
        workers=0,
    )
    if contender.stage == "stage-c":
        return load_stage_c(folder / SET["stage_c"])
    return load_stage_b(folder / SET["stage_b"])


def _caption(emoji: EmojiSet, i: int) -> str:
    return plain_caption(emoji.entries[i]["name"], emoji.entries[i]["style"])


def _kept(path: Path, count: int) -> list[dict]:
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["emoji"] != count:
        raise WuerstchenError(f"{path}: of {content['emoji']} emoji, not of {count}: name another folder")
    return content["rows"]
