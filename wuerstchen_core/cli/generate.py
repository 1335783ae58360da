"""`wuerstchen generate`: a picture of a text."""

import argparse
import re
from pathlib import Path

from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from .common import add_model, check_png, command, given_networks, load_model


def add_commands(commands) -> None:
    generate = command(commands, "generate", _generate, "draw a picture of a text")
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
    generate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed, the same picture (default: 0)"
    )
    generate.add_argument("--steps-c", type=int, default=30, metavar="N", help="steps of Stage C (default: 30)")
    generate.add_argument(
        "--cfg-c", type=float, default=4.0, metavar="S", help="guidance of Stage C, 1 is off (default: 4)"
    )
    generate.add_argument("--steps-b", type=int, default=12, metavar="N", help="steps of Stage B (default: 12)")
    generate.add_argument("--cfg-b", type=float, default=1.0, metavar="S", help="guidance of Stage B (default: 1, off)")
    generate.add_argument("--sampler", default="ddpm", metavar="NAME", help="ddpm or ddim (default: ddpm)")
    generate.add_argument(
        "--schedule", default="even", metavar="NAME", help="Stage C's times: even or uneven (default: even)"
    )
    add_model(generate)


def _generate(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..checkpoints.lora import load_lora
    from ..models.lora import apply_loras
    from ..util.pictures import read_picture

    if options.denoise is not None and options.image is None:
        raise WuerstchenError("--denoise is about a picture to start from: give one with --image")
    image = None if options.image is None else read_picture(options.image)
    denoise = 0.6 if options.denoise is None else options.denoise
    check_png(options.output)
    chosen = [_lora(text) for text in options.lora]
    loras = [(load_lora(path), strength) for path, strength in chosen]
    model = load_model(options)
    with tqdm(unit="step", leave=False) as bar, apply_loras(model.stage_c, loras):

        def show(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.reset(total=steps)
            bar.set_description(stage, refresh=False)
            bar.update()

        pictures = model.generate(
            options.prompt,
            negative_prompt=options.negative,
            width=options.width,
            height=options.height,
            batch_size=options.batch,
            seed=options.seed,
            steps_c=options.steps_c,
            cfg_c=options.cfg_c,
            steps_b=options.steps_b,
            cfg_b=options.cfg_b,
            sampler=options.sampler,
            schedule=options.schedule,
            image=image,
            denoise=denoise,
            progress=show,
        )
    told = {
        "prompt": options.prompt,
        "negative_prompt": options.negative,
        "seed": options.seed,
        "steps_c": options.steps_c,
        "cfg_c": options.cfg_c,
        "steps_b": options.steps_b,
        "cfg_b": options.cfg_b,
        "sampler": options.sampler,
        "schedule": options.schedule,
    }
    if image is not None:
        told["denoise"] = denoise
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
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (Path(match[1]), float(match[2])) if match else (Path(text), 1.0)


def _write_image(picture, path: Path, told: dict) -> None:
    """picture (H, W, 3) in [0, 1] -> PNG, whole or not at all, with `told` as its text chunks"""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in told.items():
        info.add_itxt(key, str(value))
    image = Image.fromarray((picture.cpu() * 255).round().byte().numpy())
    try:
        with replacing(path) as partial:
            image.save(partial, format="PNG", pnginfo=info)
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error
