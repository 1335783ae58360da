"""`wuerstchen generate`: a picture of a text, or of what another picture says of itself."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..diffusion.options import STAGE_B, STAGE_C, SamplingOptions
from ..models.defaults import RELEASED, SMALL
from ..util.errors import WuerstchenError
from ..workflow.drawing import graph_of
from . import bulk
from .common import add_model, check_png, check_text, circumstances, command, load_model, told_of_model
from .reproduce import command_line, fill_in, read_lora, shown_strength

DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "width": None,  # None: the set's own
    "height": None,
    "batch_size": 1,
    "seed": STAGE_C.seed,
    "steps_c": STAGE_C.steps,
    "cfg_c": None,
    "steps_b": STAGE_B.steps,
    "cfg_b": STAGE_B.cfg,
    "sampler": STAGE_C.sampler,
    "schedule": STAGE_C.schedule,
    "schedule_b": STAGE_B.schedule,
    "cfg_interval": STAGE_C.cfg_interval,
    "cfg_rescale": STAGE_C.cfg_rescale,
}


def add_commands(commands) -> None:
    generate = command(commands, "generate", _generate, "draw a picture of a text")
    about = {field.name: field.metadata["help"] for field in dataclasses.fields(SamplingOptions)}
    generate.add_argument("prompt", nargs="?", help='what to draw, such as "a slice of pizza"')
    generate.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PICTURE",
        help="draw again a PNG that generate, or ComfyUI with Würstchen, drew: its settings are read from it, and "
        "other options change them; or finish the latents in a folder of --until stage-c",
    )
    generate.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="PNG file; a batch gets -1, -2, … before the ending (default: wuerstchen.png)",
    )
    generate.add_argument("--negative", dest="negative_prompt", metavar="TEXT", help="what to keep away from")
    generate.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from")
    generate.add_argument(
        "--denoise",
        type=float,
        metavar="D",
        help="how much of the picture to draw anew, 0 to 1 (default: 0.6; only with --image)",
    )
    generate.add_argument(
        "--lora",
        dest="loras",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="a LoRA for Stage C or Stage B (default strength: 1); give it again for several, which add up",
    )
    own = f"{SMALL.side} for the mini, {RELEASED.side} for the released weights"
    for side in ("width", "height"):
        generate.add_argument(f"--{side}", type=int, metavar="PIXELS", help=f"multiple of 8 (default: {own})")
    generate.add_argument(
        "--batch",
        dest="batch_size",
        type=int,
        metavar="N",
        help="number of pictures (default: 1); of --prompts, how many at a time",
    )
    for stage, defaults in (("c", STAGE_C), ("b", STAGE_B)):
        for name, type_, metavar in (("steps", int, "N"), ("cfg", float, "S")):
            default = f"{getattr(defaults, name):g}"
            if (name, stage) == ("cfg", "c"):
                default = f"{SMALL.cfg:g} for the mini, {RELEASED.cfg:g} for the released weights"
            what = f"Stage {stage.upper()}: {about[name]} (default: {default})"
            generate.add_argument(f"--{name}-{stage}", type=type_, metavar=metavar, help=what)
    for flag, stage, defaults, kind, metavar in (
        ("seed", "", STAGE_C, int, "N"),
        ("sampler", "", STAGE_C, str, "NAME"),
        ("schedule", "Stage C: ", STAGE_C, str, "NAME"),
        ("schedule-b", "Stage B: ", STAGE_B, str, "NAME"),
        ("cfg-rescale", "Stage C: ", STAGE_C, float, "SHARE"),
    ):
        name = flag.removesuffix("-b").replace("-", "_")
        default = getattr(defaults, name)
        what = f"{stage}{about[name]} (default: {default})"
        generate.add_argument(f"--{flag}", type=kind, metavar=metavar, help=what)
    generate.add_argument("--sampler-b", metavar="NAME", help="Stage B's sampler (default: the same)")
    generate.add_argument(
        "--distilled",
        action=argparse.BooleanOptionalAction,
        help="draw by the set's distilled networks, in a few steps without guidance (default: if the set has any, and "
        "none of these options, no LoRA and no negative prompt is given)",
    )
    generate.add_argument("--seed-b", type=int, metavar="N", help="Stage B's seed (default: the same)")
    low, high = STAGE_C.cfg_interval
    generate.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"Stage C: {about['cfg_interval']} (default: {low:g} {high:g})",
    )
    generate.add_argument(
        "--compile",
        action="store_true",
        help="compile Stages C, B and A first (torch.compile, which needs a C++ compiler): for GPUs, on a CPU no gain",
    )
    generate.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="side of Stage A's tiles and of the windows of Stage B's attention, a multiple of 64 from 256 on; 0: the "
        "whole picture (default: Stage A as memory allows, Stage B 1024 where a side has more than 1536)",
    )
    bulk.add_options(generate)
    add_model(generate)
    generate.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help="only the network at work is on the device (default: where it cannot hold all)",
    )


def _generate(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..bulk.lines import SAMPLING, completed
    from ..checkpoints.lora import load_lora
    from ..models.lora import apply_loras
    from ..pipeline import DENOISE
    from ..util.pictures import read_picture
    from ..workflow import png

    if bulk.is_asked_for(options):
        bulk.generate_many(options)
        return
    options.output = Path("wuerstchen.png") if options.output is None else options.output
    if options.source is not None:
        fill_in(options)
    if options.prompt is None:
        raise WuerstchenError("there is nothing to draw: give a prompt, or a picture with --from")
    check_text("the prompt", options.prompt)
    if options.denoise is not None and options.image is None:
        raise WuerstchenError("--denoise is about a picture to start from: give one with --image")
    check_png(options.output)
    image = None if options.image is None else read_picture(options.image)
    check_text("--negative", options.negative_prompt or "")
    settings = {name: getattr(options, name) for name in ("negative_prompt", "width", "height", "batch_size", "seed")}
    settings = {name: DEFAULTS[name] if value is None else value for name, value in settings.items()}
    settings |= {name: value for name in ("seed_b", "tile") if (value := getattr(options, name)) is not None}
    if image is not None:
        settings["denoise"] = DENOISE if options.denoise is None else options.denoise
    chosen = [read_lora(text) for text in options.loras or ()]
    loras = [(load_lora(path), strength) for path, strength in chosen]
    model = load_model(options, options.offload)
    settings |= {side: model.defaults.side for side in ("width", "height") if settings[side] is None}
    asked = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    settings |= completed(asked, model.sampling, bool(options.loras))
    if options.source is not None:
        usual = DEFAULTS if model.distilled else {**DEFAULTS, "distilled": False}
        print(command_line(options, {name: value for name, value in settings.items() if value != usual.get(name)}))
    if options.compile:
        model.compile()
    of_c, of_b = ([one for one in loras if one[0].stage == stage] for stage in ("Stage C", "Stage B"))
    with tqdm(unit="step", leave=False) as bar, apply_loras(model.stage_c, of_c), apply_loras(model.stage_b, of_b):

        def show(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.reset(total=steps)
            bar.set_description(stage, refresh=False)
            bar.update()

        pictures = model.generate(options.prompt, **settings, image=image, progress=show)
    told = {"prompt": options.prompt, **settings, **told_of_model(options, model)}
    if told.pop("distilled"):
        told["distilled"] = list(model.distilled)
    if options.image is not None:
        told["image"] = options.image.name
    if chosen:
        told["loras"] = [f"{path.name}:{shown_strength(strength)}" for path, strength in chosen]
    around = circumstances(model, options.image, frozenset(Path(lora.path).name for lora, _ in of_b))
    for number, picture in enumerate(pictures, start=1):
        path = options.output
        if settings["batch_size"] > 1:
            path = path.with_stem(f"{path.stem}-{number}")
            told["batch_number"] = number
        png.write(picture, path, told, graph_of(told, around))
        print(path)
