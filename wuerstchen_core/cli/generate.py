"""`wuerstchen generate`: a picture of a text."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..diffusion.options import STAGE_B, STAGE_C, SamplingOptions
from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from .common import add_model, check_png, check_text, command, given_networks, load_model


def add_commands(commands) -> None:
    generate = command(commands, "generate", _generate, "draw a picture of a text")
    about = {field.name: field.metadata["help"] for field in dataclasses.fields(SamplingOptions)}
    generate.add_argument("prompt", help='what to draw, such as "a slice of pizza"')
    generate.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("wuerstchen.png"),
        metavar="FILE",
        help="PNG file; a batch gets -1, -2, … before the ending (default: wuerstchen.png)",
    )
    generate.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from")
    generate.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from")
    generate.add_argument(
        "--denoise",
        type=float,
        metavar="D",
        help="how much of the picture to draw anew, 0 to 1 (default: 0.6; only with --image)",
    )
    generate.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA for Stage C (default strength: 1); give it again for several, which add up",
    )
    generate.add_argument("--width", type=int, default=256, metavar="PIXELS", help="multiple of 8 (default: 256)")
    generate.add_argument("--height", type=int, default=256, metavar="PIXELS", help="multiple of 8 (default: 256)")
    generate.add_argument("--batch", type=int, default=1, metavar="N", help="number of pictures (default: 1)")
    for stage, defaults in (("c", STAGE_C), ("b", STAGE_B)):
        for name, type_, metavar in (("steps", int, "N"), ("cfg", float, "S")):
            default = getattr(defaults, name)
            what = f"Stage {stage.upper()}: {about[name]} (default: {default:g})"
            generate.add_argument(f"--{name}-{stage}", type=type_, default=default, metavar=metavar, help=what)
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
        generate.add_argument(f"--{flag}", type=kind, default=default, metavar=metavar, help=what)
    low, high = STAGE_C.cfg_interval
    generate.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=STAGE_C.cfg_interval,
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

    check_text("the prompt", options.prompt)
    check_text("--negative", options.negative)
    if options.denoise is not None and options.image is None:
        raise WuerstchenError("--denoise is about a picture to start from: give one with --image")
    check_png(options.output)
    image = None if options.image is None else read_picture(options.image)
    settings = {
        "negative_prompt": options.negative,
        "width": options.width,
        "height": options.height,
        "batch_size": options.batch,
        "seed": options.seed,
        "steps_c": options.steps_c,
        "cfg_c": options.cfg_c,
        "steps_b": options.steps_b,
        "cfg_b": options.cfg_b,
        "sampler": options.sampler,
        "schedule": options.schedule,
        "schedule_b": options.schedule_b,
        "cfg_interval": options.cfg_interval,
        "cfg_rescale": options.cfg_rescale,
    }
    if options.tile is not None:
        settings["tile"] = options.tile
    if image is not None:
        settings["denoise"] = DENOISE if options.denoise is None else options.denoise
    chosen = [_lora(text) for text in options.lora]
    loras = [(load_lora(path), strength) for path, strength in chosen]
    model = load_model(options, options.offload)
    if options.compile:
        model.compile()
    with tqdm(unit="step", leave=False) as bar, apply_loras(model.stage_c, loras):

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
        told["loras"] = ", ".join(f"{path.name}:{strength:g}" for path, strength in chosen)
    for number, picture in enumerate(pictures, start=1):
        path = options.output
        if options.batch > 1:
            path = path.with_stem(f"{path.stem}-{number}")
            told["batch_number"] = number
        _write_image(picture, path, told)
        print(path)


def _lora(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH]; only a number behind the last colon is a strength, so that a path may have colons."""
    path, _, number = text.rpartition(":")
    try:
        return (Path(path), float(number)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _write_image(picture, path: Path, told: dict) -> None:
    """picture (H, W, 3) in [0, 1] -> PNG, whole or not at all.

    `told` is its metadata: as JSON under "wuerstchen", and for people under "Description". "prompt" and "workflow" are
    ComfyUI's, whose page reads them as JSON.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("wuerstchen", json.dumps(told))
    lines = (f"{name}: {value}" for name, value in told.items() if name != "prompt" and value != "")
    readable = "\n".join([told["prompt"], *lines])
    info.add_itxt("Description", readable.encode("utf-8", "backslashreplace").decode())
    image = Image.fromarray((picture.cpu() * 255).round().byte().numpy())
    try:
        with replacing(path) as partial:
            image.save(partial, format="PNG", pnginfo=info)
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error
