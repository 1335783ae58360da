"""The command line, `wuerstchen`."""

import argparse
import re
import sys
from pathlib import Path

from .atomic import replacing
from .errors import WuerstchenError
from .training import command as training


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line and exit status 2."""
    parser = _parser()
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and "stage" not in options:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    try:
        options.run(options)
    except WuerstchenError as error:
        print(f"wuerstchen: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"wuerstchen: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"wuerstchen: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wuerstchen", description="Würstchen: text to image in three stages (arXiv 2306.00637)."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    generate = _command(commands, "generate", _generate, "draw a picture of a text")
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
    _add_model(generate)

    data = commands.add_parser("data", help="build a data set").add_subparsers(metavar="SET", required=True)
    emoji = _command(data, "emoji", _build_emoji, "the embedded model's data set: emoji with their names (needs npm)")
    emoji.add_argument("folder", type=Path, help="where to write it; must not exist yet")

    train = commands.add_parser("train", help="train networks").add_subparsers(metavar="WHAT", required=True)
    mini = _command(train, "mini", _train_mini, "the embedded model, from scratch or from where a run was stopped")
    mini.add_argument("data", type=Path, help="the data set, from `wuerstchen data emoji`")
    mini.add_argument("work", type=Path, help="folder for checkpoints and the finished weights")
    mini.add_argument(
        "--only", metavar="NETWORK", help="stage_a, semantic_compressor, text_encoder, stage_b, stage_c or previewer"
    )
    mini.add_argument("--steps", type=int, metavar="N", help="instead of the recipe's")
    for stage, (_, what) in training.STAGES.items():
        command = _command(train, stage, _train_stage, f"{what}; --help lists its options", add_help=False)
        command.set_defaults(stage=stage)

    evaluate = _command(commands, "evaluate", _evaluate, "measure a model on the emoji data set")
    evaluate.add_argument("data", type=Path, help="the data set, from `wuerstchen data emoji`")
    evaluate.add_argument("--count", type=int, default=200, metavar="N", help="pictures and prompts (default: 200)")
    evaluate.add_argument(
        "--sheet", type=Path, metavar="FILE", help="only draw the model card's pictures, to a PNG file"
    )
    _add_model(evaluate)

    inspect = _command(commands, "inspect", _inspect, "say what a file of weights is, and which loader takes it")
    inspect.add_argument("file", type=Path, help="safetensors or PyTorch file, in any layout")

    convert = _command(commands, "convert", _convert, "write a published file of weights as one of ours")
    convert.add_argument("file", type=Path, help="safetensors or PyTorch file, in any layout")
    convert.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors file, or a folder: there every network of the file gets its usual name",
    )
    convert.add_argument("--part", metavar="NETWORK", help="which network, where the file holds several")
    convert.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: the file's own")

    benchmark = _command(commands, "benchmark", _benchmark, "time loading and drawing")
    benchmark.add_argument(
        "--load",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only load these files of weights, in any layout, and tell the time and the peak of memory (Linux)",
    )
    benchmark.add_argument("--runs", type=int, default=3, metavar="N", help="pictures to draw (default: 3)")
    _add_model(benchmark)

    cost = _command(commands, "cost", _cost, "count parameters and operations, beside Stable Diffusion 2.1's")
    which = cost.add_mutually_exclusive_group()
    which.add_argument("--size", choices=["v2", "mini"], default="v2", help="default: v2, the released one")
    which.add_argument("--model", type=Path, metavar="FOLDER", help="instead, that of a folder with a set of weights")
    cost.add_argument("--width", type=int, default=1024, metavar="PIXELS", help="multiple of 8 (default: 1024)")
    cost.add_argument("--height", type=int, default=1024, metavar="PIXELS", help="multiple of 8 (default: 1024)")
    cost.add_argument("--steps-c", type=int, default=60, metavar="N", help="of Stage C (default: 60, as in the paper)")
    cost.add_argument("--steps-b", type=int, default=12, metavar="N", help="of Stage B (default: 12)")
    return parser


def _command(commands, name: str, run, help: str, add_help: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", add_help=add_help)
    parser.set_defaults(run=run)
    return parser


# What may take the place of a network of the set, by the names that `Wuerstchen.from_files` has.
NETWORKS = {
    "stage_a": "Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "semantic_compressor": "the semantic compressor",
    "text_encoder_c": "Stage C's text encoder (and Stage B's, where the set has one for both)",
    "text_encoder_b": "Stage B's text encoder",
}


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a folder with a set of weights (default: the mini)"
    )
    for role, what in NETWORKS.items():
        name = "text-encoder" if role == "text_encoder_c" else role.replace("_", "-")
        parser.add_argument(f"--{name}", dest=role, type=Path, metavar="FILE", help=f"{what} from a file instead")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")


def _load(options: argparse.Namespace):
    from .checkpoints import files
    from .pipeline import MINI, Wuerstchen

    _check_device(options.device)
    paths = files.find_set(MINI if options.model is None else options.model)
    given = _given_networks(options)
    if paths["text_encoder_b"] == paths["text_encoder_c"] and "text_encoder_c" in given:
        given = {"text_encoder_b": given["text_encoder_c"]} | given
    return Wuerstchen.from_files(**paths | given, device=options.device)


def _given_networks(options: argparse.Namespace) -> dict[str, Path]:
    return {role: path for role in NETWORKS if (path := getattr(options, role)) is not None}


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise WuerstchenError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise WuerstchenError(f"{path}: pictures are written as PNG, so the name must end in .png")
    if not path.absolute().parent.is_dir():
        raise WuerstchenError(f"{path.parent}: there is no such folder")


def _generate(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .checkpoints.lora import apply_loras, load_lora
    from .pictures import read_picture

    if options.denoise is not None and options.image is None:
        raise WuerstchenError("--denoise is about a picture to start from: give one with --image")
    image = None if options.image is None else read_picture(options.image)
    denoise = 0.6 if options.denoise is None else options.denoise
    _check_png(options.output)
    chosen = [_lora(text) for text in options.lora]
    loras = [(load_lora(path), strength) for path, strength in chosen]
    model = _load(options)
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
    told |= {role: path.name for role, path in _given_networks(options).items()}
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


def _build_emoji(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .training import emoji

    with tqdm(unit="emoji", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        emoji.build(options.folder, progress=show)
    print(f"{len(emoji.EmojiSet(options.folder))} emoji in {options.folder}")


def _train_mini(options: argparse.Namespace) -> None:
    from .training.mini import train_mini

    train_mini(options.data, options.work, options.only, options.steps)


def _train_stage(options: argparse.Namespace) -> None:
    training.run(options.stage, options.rest)


def _evaluate(options: argparse.Namespace) -> None:
    from .training.emoji import EmojiSet
    from .training.evaluate import evaluate

    emoji = EmojiSet(options.data)
    if options.sheet is not None:
        from .training.samples import sample_sheet

        _check_png(options.sheet)
        with replacing(options.sheet) as partial:
            sample_sheet(_load(options)).save(partial, format="PNG")
        return
    for line in evaluate(_load(options), emoji, options.count):
        print(line, flush=True)


def _inspect(options: argparse.Namespace) -> None:
    from .checkpoints.files import describe

    for line in describe(options.file):
        print(line)


def _convert(options: argparse.Namespace) -> None:
    import torch
    from safetensors import SafetensorError

    from .checkpoints import files
    from .checkpoints.archive import open_archive

    kinds = list(files.parts(open_archive(options.file)))
    if options.part is not None:
        if options.part not in kinds:
            raise WuerstchenError(f"{options.file}: there is no {options.part} in it, only {' and '.join(kinds)}")
        kinds = [options.part]
    into_folder = options.output.is_dir()
    if len(kinds) > 1 and not into_folder:
        raise WuerstchenError(
            f"{options.file}: it holds {' and '.join(kinds)}: name one with --part, or give a folder as -o for all"
        )
    if not into_folder and options.output.suffix != ".safetensors":
        raise WuerstchenError(f"{options.output}: neither a folder nor a name that ends in .safetensors")
    dtype = options.dtype and getattr(torch, options.dtype)
    for kind in kinds:
        path = options.output / f"{kind}.safetensors" if into_folder else options.output
        network = getattr(files, f"load_{kind}")(options.file, dtype=dtype)
        try:
            files.save(network, path)
        except (OSError, SafetensorError) as error:
            raise WuerstchenError(f"{path}: could not be written ({error})") from error
        print(path)


def _benchmark(options: argparse.Namespace) -> None:
    from .benchmark import benchmark, benchmark_loading

    if options.load is None:
        lines = benchmark(lambda: _load(options), options.runs)
    else:
        _check_device(options.device)
        lines = (line for path in options.load for line in benchmark_loading(path, options.device))
    for line in lines:
        print(line, flush=True)


def _cost(options: argparse.Namespace) -> None:
    from .cost import cost, outline, released
    from .geometry import Geometry
    from .pipeline import MINI

    if options.model is not None:
        name, networks = str(options.model), outline(options.model)
    elif options.size == "mini":
        name, networks = "mini", outline(MINI)
    else:
        name, networks = "v2", released()
    for line in cost(networks, name, Geometry(options.width, options.height), options.steps_c, options.steps_b):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
