"""`wuerstchen evaluate stages` and `evaluate sweep`: figures of what a set of weights draws."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..util.atomic import replacing
from ..util.checks import whole_number
from ..util.errors import WuerstchenError
from ..util.json_file import write_json
from .common import add_model, check_device, check_file, command, given_networks, load_model
from .evaluate import scorers_of

GRID: dict[str, dict[str, Any]] = {
    "cfg": {"type": float, "metavar": "S", "help": "strength of Stage C's guidance (default: the set's)"},
    "steps-c": {"type": int, "metavar": "N", "help": "of Stage C"},
    "steps-b": {"type": int, "metavar": "N", "help": "of Stage B"},
    "sampler": {"metavar": "NAME", "help": "of both stages"},
    "sampler-b": {"metavar": "NAME", "help": "of Stage B (default: that of both)"},
    "schedule": {"metavar": "NAME", "help": "where Stage C's steps lie"},
    "schedule-b": {"metavar": "NAME", "help": "where Stage B's steps lie"},
}

EMOJI_PROMPTS = 40  # where nobody says how many


def add_commands(evaluate) -> None:
    stages = command(
        evaluate, "stages", _stages, "what Stage B changes in what Stage C decided, and what its text does"
    )
    _add_drawing(stages)
    stages.add_argument("--pickscore", type=Path, metavar="FOLDER", help="PickScore_v1, in transformers' layout")
    for name, about in GRID.items():
        stages.add_argument(f"--{name}", **about)

    sweep = command(evaluate, "sweep", _sweep, "figures and time over guidance, steps and samplers, every combination")
    _add_drawing(sweep)
    for name, about in GRID.items():
        sweep.add_argument(f"--{name}", nargs="+", **about)
    sweep.add_argument("--clip", type=Path, metavar="FILE", help="weights for the CLIP score, as open_clip reads them")
    sweep.add_argument("--clip-model", metavar="NAME", help="open_clip's name of it (default: ViT-L-14)")
    sweep.add_argument("--pickscore", type=Path, metavar="FOLDER", help="PickScore_v1, in transformers' layout")
    sweep.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the pictures, a folder per combination")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a text file, a prompt per line; or a folder: its captions"
    )
    parser.add_argument(
        "--emoji", type=Path, metavar="FOLDER", help="prompts from the mini's data set (`wuerstchen data emoji`)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help=f"only N prompts (of --emoji, by default {EMOJI_PROMPTS})"
    )
    parser.add_argument("--real", metavar="FOLDER", help="pictures to compare with; a folder, or shards")
    features = parser.add_mutually_exclusive_group()
    features.add_argument(
        "--inception", type=Path, metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
    )
    features.add_argument(
        "--features", type=Path, metavar="FILE", help="features of a semantic compressor (default: the mini's)"
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="multiple of 64 (default: what suits the set)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="multiple of 64 (default: what suits the set)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first prompt; the next have the next")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures at a time (default: 8)")
    parser.add_argument("--distilled", action="store_true", default=None, help="draw by the set's distilled networks")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON; tables and pictures of its name beside it"
    )
    add_model(parser)


def _check(options: argparse.Namespace, *suffixes: str) -> None:
    """What can be wrong before anything is loaded."""
    from ..diffusion.options import MAX_SEED, MIN_SEED
    from ..reports.evaluation.reading import check_set

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise WuerstchenError("this command draws in one process: start it without accelerate launch")
    if options.prompts is None and options.emoji is None:
        raise WuerstchenError("give --prompts FILE, or --emoji FOLDER for the mini")
    whole_number("--batch", options.batch, 2, 1024)
    whole_number("--seed", options.seed, MIN_SEED, MAX_SEED - 10**9)
    if options.limit is not None:
        whole_number("--limit", options.limit, 1, 10**8)
    if options.output.suffix != ".json":
        raise WuerstchenError(f"{options.output}: --output takes a .json file")
    for suffix in (".json", *suffixes):
        check_file(options.output.with_suffix(suffix))
    if options.real is not None:
        check_set(options.real)
    check_device(options.device)


def _emoji(options: argparse.Namespace):
    from ..mini.emoji import EmojiSet

    return None if options.emoji is None else EmojiSet(options.emoji)


def _prompts(options: argparse.Namespace, emoji) -> list[str]:
    from ..mini.recognition import check_prompts, plain_prompts
    from ..reports.evaluation.reading import read_captions, read_prompts

    if options.prompts is None:
        return plain_prompts(emoji, options.limit or EMOJI_PROMPTS)
    read = read_captions if options.prompts.is_dir() else read_prompts
    prompts = read(options.prompts)[: options.limit]
    if emoji is not None:
        check_prompts(emoji, prompts)
    return prompts


def _geometry(options: argparse.Namespace, model):
    from ..geometry import MAX_SIDE, WORK_STEP, Geometry

    sides = {
        name: model.defaults.side if given is None else whole_number(f"--{name}", given, 64, MAX_SIDE, WORK_STEP)
        for name, given in (("width", options.width), ("height", options.height))
    }
    return Geometry(**sides)


def _extractor(options: argparse.Namespace):
    from ..reports.evaluation.extractors import load_compressor_features, load_inception

    if options.inception is not None:
        return load_inception(options.inception, options.device)
    return load_compressor_features(options.features, options.device)


def _real(options: argparse.Namespace, extractor):
    from ..reports.evaluation.reading import score

    return None if options.real is None else score(options.real, {"features": extractor.score}, options.batch)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of GRID by the names that `Wuerstchen.sampling` has."""
    names = {name: "cfg_c" if name == "cfg" else name.replace("-", "_") for name in GRID}
    return {names[name]: getattr(options, name.replace("-", "_")) for name in GRID}


def _about(options: argparse.Namespace, prompts: list[str], geometry, extractor) -> dict[str, Any]:
    """What figures depend on beside the combination."""
    return {
        "model": "mini" if options.model is None else str(options.model),
        **{role: str(path) for role, path in given_networks(options).items()},
        "prompts": len(prompts),
        "seed": options.seed,
        "width": geometry.width,
        "height": geometry.height,
        "features": None if extractor is None else extractor.about,
        "real": options.real,
    }


def _stages(options: argparse.Namespace) -> None:
    from ..reports.evaluation.stages import against, draw, preferred, sheet, table
    from ..reports.evaluation.text_scores import pick_score

    _check(options, ".png")
    prompts = _prompts(options, _emoji(options))
    extractor = _extractor(options)
    model = load_model(options)
    sampling, geometry = model.sampling(**_given(options), distilled=options.distilled), _geometry(options, model)
    real = _real(options, extractor)
    pick = None if options.pickscore is None else pick_score(options.pickscore, options.device)
    if pick is not None and model.text_encoder_b is None:
        raise WuerstchenError("--pickscore is for what Stage B's text is worth, but in this set Stage B reads none")
    drawn = draw(model, prompts, geometry, sampling, extractor, options.batch, options.seed, pick)
    distances = {} if real is None else against(drawn, real.values["features"])
    for line in (
        *table(drawn.rows),
        *(f"FID of {name} against {options.real}: {far:.4g}" for name, far in distances.items()),
    ):
        print(line)
    print(f"{len(prompts)} prompts; {extractor.about}")
    rate = preferred(drawn)
    if rate is not None:
        print(f"PickScore prefers B + A without text on {rate.rate:.1%} ({rate.low:.1%} to {rate.high:.1%})")
    about = _about(options, prompts, geometry, extractor)
    found = {"FID_to_real": distances, "without_text_preferred": None if rate is None else rate._asdict()}
    write_json(options.output, {**about, "rows": [row._asdict() for row in drawn.rows], **found})
    with replacing(options.output.with_suffix(".png")) as partial:
        sheet(drawn).save(partial, format="PNG")


def _sweep(options: argparse.Namespace) -> None:
    from ..mini.recognition import recognition
    from ..reports.evaluation.curves import (
        combinations,
        measure,
        name_of,
        plot,
        settings,
        sweep,
        table,
        warm_up,
        write_csv,
    )
    from ..reports.evaluation.figures import least_pictures

    _check(options, ".csv", ".png")
    measured = (options.real, options.inception, options.clip, options.pickscore, options.emoji)
    if not any(one is not None for one in measured):
        raise WuerstchenError("nothing to measure: give --real FOLDER, --inception, --clip, --pickscore or --emoji")
    if options.clip_model is not None and options.clip is None:
        raise WuerstchenError("--clip-model is of the CLIP score: add --clip FILE")
    if options.features is not None and options.real is None:
        raise WuerstchenError("--features is for a comparison with --real FOLDER: give both, or neither")
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
        check_file(options.pictures / "000000.png")
    emoji = _emoji(options)
    prompts = _prompts(options, emoji)
    extractor = None if options.real is None and options.inception is None else _extractor(options)
    least = least_pictures(options.real is not None, extractor)
    if len(prompts) < least:
        raise WuerstchenError(f"{len(prompts)} prompts: these figures need the pictures of at least {least}")
    scorers = scorers_of(options, extractor)
    if emoji is not None:
        scorers["top-1"] = recognition(emoji)
    model = load_model(options)
    samplings, geometry = combinations(model, options.distilled, _given(options)), _geometry(options, model)
    about = {**_about(options, prompts, geometry, extractor), **_identity(options, prompts)}
    real = _real(options, extractor)

    def pictures(row: Mapping[str, Any]) -> Path | None:
        return None if options.pictures is None else options.pictures / name_of(row)

    def lacks_pictures(row: Mapping[str, Any]) -> bool:
        folder = pictures(row)
        return folder is not None and not all((folder / f"{i:06}.png").is_file() for i in range(len(prompts)))

    def measured_row(sampling):
        folder = pictures(settings(sampling))
        return measure(
            model, prompts, sampling, geometry, scorers, real, extractor, options.batch, options.seed, folder
        )

    warm_up(model, prompts[: options.batch], samplings[0], geometry)
    shown = 0
    for rows in sweep(samplings, about, options.output, measured_row, lacks_pictures):
        for line in list(table(rows))[shown:]:
            print(line, flush=True)
        shown = len(rows) + 2
        write_csv(options.output.with_suffix(".csv"), rows)
    plot(options.output.with_suffix(".png"), rows, about["model"])


def _identity(options: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """Hashes of all that a sweep reads, and what its times depend on: it goes on only where they are the same."""
    from ..checkpoints.sets import MINI, find_distilled, find_set
    from ..reports.evaluation.kept import hash_of, hash_of_texts
    from ..reports.evaluation.reading import hash_of_set

    folder = MINI if options.model is None else options.model
    weights = [*find_set(folder, given_networks(options)).values(), *find_distilled(folder).values()]
    files = {
        "inception": options.inception,
        "features": options.features,
        "clip": options.clip,
        "pickscore": options.pickscore,
    }
    return {
        "device": options.device,
        "dtype": options.dtype,
        "batch": options.batch,
        "clip_model": options.clip_model,
        "emoji": options.emoji is not None,
        "sha256": {
            "weights": hash_of_texts([hash_of(path) for path in weights]),
            "prompts": hash_of_texts(prompts),
            "real": None if options.real is None else hash_of_set(options.real),
            **{name: None if path is None else hash_of(path) for name, path in files.items()},
        },
    }
