"""`wuerstchen generate`: a picture of a text, or of what another picture says of itself."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..diffusion.options import STAGE_B, STAGE_C, SamplingOptions
from ..models.defaults import RELEASED, SMALL
from ..util.errors import WuerstchenError
from ..workflow.drawing import Circumstances, graph_of
from .common import add_model, check_png, check_text, command, given_networks, load_model
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
        "other options change them",
    )
    generate.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("wuerstchen.png"),
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
    generate.add_argument("--batch", dest="batch_size", type=int, metavar="N", help="number of pictures (default: 1)")
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
        help="compile Stages C, B and A first (torch.compile, which needs a C++ compiler): minutes, for faster steps",
    )
    generate.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="side of Stage A's tiles and of the windows of Stage B's attention, a multiple of 64 from 256 on; 0: the "
        "whole picture (default: Stage A as memory allows, Stage B 1024 where a side has more than 1536)",
    )
    add_model(generate)
    generate.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help="only the network at work is on the device (default: where it cannot hold all)",
    )


def _generate(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ..checkpoints.lora import load_lora
    from ..models.lora import apply_loras
    from ..pipeline import DENOISE
    from ..util.pictures import read_picture
    from ..util.precision import dtype_of, name_of
    from ..workflow import png

    if options.source is not None:
        fill_in(options)
    if options.prompt is None:
        raise WuerstchenError("there is nothing to draw: give a prompt, or a picture with --from")
    check_text("the prompt", options.prompt)
    if options.denoise is not None and options.image is None:
        raise WuerstchenError("--denoise is about a picture to start from: give one with --image")
    check_png(options.output)
    image = None if options.image is None else read_picture(options.image)
    settings = {name: getattr(options, name) for name in DEFAULTS}
    settings = {name: DEFAULTS[name] if value is None else value for name, value in settings.items()}
    check_text("--negative", settings["negative_prompt"])
    settings |= {name: value for name in ("seed_b", "tile") if (value := getattr(options, name)) is not None}
    if image is not None:
        settings["denoise"] = DENOISE if options.denoise is None else options.denoise
    chosen = [read_lora(text) for text in options.loras or ()]
    loras = [(load_lora(path), strength) for path, strength in chosen]
    model = load_model(options, options.offload)
    own = {"width": model.defaults.side, "height": model.defaults.side, "cfg_c": model.defaults.cfg}
    settings |= {name: value for name, value in own.items() if settings[name] is None}
    if options.source is not None:
        print(command_line(options, {name: value for name, value in settings.items() if value != DEFAULTS.get(name)}))
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
    told = {"prompt": options.prompt, **settings, "device": options.device}
    if dtype_of(model.stage_c) != torch.float32:
        told["dtype"] = name_of(dtype_of(model.stage_c))
    told["model"] = "mini" if options.model is None else options.model.absolute().name
    if options.image is not None:
        told["image"] = options.image.name
    told |= {role: path.name for role, path in given_networks(options).items()}
    if chosen:
        told["loras"] = [f"{path.name}:{shown_strength(strength)}" for path, strength in chosen]
    around = _circumstances(model, options.image)
    for number, picture in enumerate(pictures, start=1):
        path = options.output
        if settings["batch_size"] > 1:
            path = path.with_stem(f"{path.stem}-{number}")
            told["batch_number"] = number
        png.write(picture, path, told, graph_of(told, around))
        print(path)


def _circumstances(model, image: Path | None) -> Circumstances:
    from PIL import Image

    transparent = profile = False
    if image is not None:
        with Image.open(image) as opened:
            transparent, profile = opened.has_transparency_data, "icc_profile" in opened.info
    return Circumstances(
        one_text_encoder=model.text_encoder_b is model.text_encoder_c,
        text_for_stage_b=model.text_encoder_b is not None,
        transparent=transparent,
        has_profile=profile,
    )
