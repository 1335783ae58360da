"""`wuerstchen generate --prompts FILE --out FOLDER`, and `--from LATENTS`, which finishes chosen ones."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..util.errors import WuerstchenError
from .common import check_text, circumstances, load_model, told_of_model
from .reproduce import read_lora, shown_strength

OWN = ("prompts", "out", "shard", "until", "pick", "per_shard")


def add_options(parser: argparse.ArgumentParser) -> None:
    many = parser.add_argument_group("many pictures")
    many.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt (a prompt a line), .jsonl or .csv (prompt, negative, seed, width, height, id, lora, …), or - for "
        "stdin; --seed is that of the first, the next ones have the numbers after it",
    )
    many.add_argument(
        "--out",
        metavar="FOLDER",
        help="where the pictures go: a folder, or shards for training such as 'shards/{000000..}.tar'; what is there "
        "is not drawn again",
    )
    many.add_argument("--per-shard", type=int, metavar="N", help="pictures to a shard (default: 1000)")
    many.add_argument(
        "--shard", metavar="I/N", help="draw only part I of N, such as 3/16: for machines that don't see each other"
    )
    many.add_argument("--until", choices=["stage-c"], help="stop there: latents and previews, for --from FOLDER")
    many.add_argument(
        "--pick", type=Path, metavar="FILE", help="of the latents of --from, those named here, one a line"
    )


def is_asked_for(options: argparse.Namespace) -> bool:
    if options.prompts is not None or options.source is not None and options.source.is_dir():
        return True
    for name in OWN:
        if getattr(options, name) is not None:
            if options.source is not None and not options.source.exists():
                raise WuerstchenError(f"{options.source}: there is no such folder of latents")
            raise WuerstchenError(f"--{name.replace('_', '-')} is about many pictures: give --prompts FILE as well")
    return False


def generate_many(options: argparse.Namespace) -> None:
    """Raises WuerstchenError at the end, if a picture could not be drawn."""
    from tqdm import tqdm

    from ..bulk.draw import Painter
    from ..bulk.lines import SETTINGS, Line, Prompts, completed
    from ..bulk.output import Errors, Folder, Shards, read_latents
    from ..bulk.plan import BLOCK, Share
    from ..bulk.run import Run
    from ..checkpoints.lora import load_lora
    from ..diffusion.options import STAGE_C
    from ..geometry import Geometry
    from ..pipeline import MAX_BATCH
    from ..util.checks import whole_number
    from ..workflow.drawing import graph_of

    _check(options)
    share = Share.of(options.shard)
    device = options.device  # which pictures are to name alike, whichever GPU drew them
    if options.device == "cuda" and "LOCAL_RANK" in os.environ:
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    size = None if options.batch_size is None else whole_number("--batch", options.batch_size, 1, MAX_BATCH)
    block = BLOCK if options.per_shard is None else whole_number("--per-shard", options.per_shard, 1, 1_000_000)
    if options.prompts not in (None, "-") and not Path(options.prompts).is_file():
        raise WuerstchenError(f"{options.prompts}: there is no such file")
    model = load_model(options, options.offload)
    given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    lines: Any
    if options.prompts is not None:
        asked = {"width": model.defaults.side, "height": model.defaults.side, "seed": STAGE_C.seed, **given}
        check_text("--negative", asked.get("negative_prompt", ""))
        for lora in options.loras or ():
            loaded = load_lora(read_lora(lora)[0])
            loaded.check(model.stage_c if loaded.stage == "Stage C" else model.stage_b)
        _ = Geometry(asked["width"], asked["height"]), completed(asked, model.sampling, bool(options.loras))
        lines = Prompts(options.prompts, asked, model.sampling, tuple(options.loras or ()))
        if options.prompts == "-":
            lines = list(lines)
    else:
        picked = None if options.pick is None else _picked(options.pick)
        lines = read_latents(options.source, picked, given)
    if options.compile:
        model.compile()

    output: Folder | Shards
    if ".tar" in options.out or "{" in options.out:
        output = Shards(options.out)
    else:
        output = Folder(Path(options.out), latents=options.until is not None)
    errors = Errors(output.folder, share.rank, share.world)
    about, around = told_of_model(options, model) | {"device": device}, circumstances(model, None)

    def record(line: Line, loras_of_stage_b: frozenset[str]) -> tuple[dict[str, Any], Any]:
        told = {**line.settings, "batch_size": 1, **about}
        if told.pop("distilled"):
            told["distilled"] = list(model.distilled)
        if line.loras:
            loras = map(read_lora, line.loras)
            told["loras"] = [f"{path.name}:{shown_strength(strength)}" for path, strength in loras]
        return told, graph_of(told, replace(around, loras_of_stage_b=loras_of_stage_b))

    with tqdm(unit="picture", leave=False) as bar:
        previewer = model.previewer if options.until else None
        Run(Painter(model), lines, output, errors, record, read_lora, share, size, block, previewer, bar.update)()
        drawn = bar.n
    print(f"{drawn} picture{'s' * (drawn != 1)} in {options.out}")
    if errors.count:
        raise WuerstchenError(f"{errors.count} lines could not be drawn: {errors.path} says why")


def _check(options: argparse.Namespace) -> None:
    """Raises WuerstchenError if an option has no meaning here."""
    for name, value in {"-o": options.output, "--image": options.image, "--denoise": options.denoise}.items():
        if value is not None:
            raise WuerstchenError(f"{name} is for a single picture: leave it out")
    if options.prompt is not None:
        raise WuerstchenError("the prompts come from --prompts or --from: leave the one on the command line out")
    if options.out is None:
        raise WuerstchenError("give --out FOLDER, or --out 'shards/{000000..}.tar'")
    shards = ".tar" in options.out or "{" in options.out
    if options.until is not None and shards:
        raise WuerstchenError("--until stage-c writes to a folder: give --out FOLDER")
    if options.per_shard is not None and not shards:
        raise WuerstchenError("--per-shard is about shards: give --out 'shards/{000000..}.tar'")
    if options.source is None:
        if options.pick is not None:
            raise WuerstchenError("--pick chooses among the latents of --from FOLDER: give that instead of --prompts")
        return
    if options.prompts is not None or options.until is not None:
        raise WuerstchenError("--from finishes what --prompts and --until stage-c began: leave these out")
    decided = ("negative_prompt", "width", "height", "seed", "steps_c", "cfg_c", "sampler", "schedule", "cfg_interval")
    for name in (*decided, "cfg_rescale", "distilled", "loras"):
        if getattr(options, name) is not None:
            option = {"negative_prompt": "negative", "loras": "lora"}.get(name, name.replace("_", "-"))
            raise WuerstchenError(f"--{option} has been decided in the latents of --from: leave it out")


def _picked(path: Path) -> set[str]:
    """Names of latents, one a line, with or without an ending."""
    try:
        names = path.read_text("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise WuerstchenError(f"{path}: not a text file in UTF-8") from error
    if not names:
        raise WuerstchenError(f"{path}: it names no picture")
    return {Path(name).name.split(".")[0] for name in names}
