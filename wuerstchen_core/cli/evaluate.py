"""`wuerstchen evaluate`: figures of pictures from anywhere."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..util.checks import whole_number
from ..util.errors import WuerstchenError, one_line
from ..util.json_file import write_json
from .common import check_device, check_file, command

CLIP = "ViT-L-14"  # open_clip's name


def add_commands(evaluate) -> None:
    pictures = command(evaluate, "pictures", _pictures, "generated pictures: FID, KID, IS, CLIP score, PickScore, …")
    pictures.add_argument("generated", metavar="GENERATED", help="a folder of pictures, or shards")
    pictures.add_argument("--real", metavar="FOLDER", help="pictures to compare with; a folder, or shards")
    _add_prompts(pictures)
    _add_features(pictures)
    pictures.add_argument(
        "--clip", type=Path, metavar="FILE", help="weights for the CLIP score, as open_clip reads them"
    )
    pictures.add_argument("--clip-model", metavar="NAME", help="open_clip's name of it (default: ViT-L-14)")
    pictures.add_argument("--pickscore", type=Path, metavar="FOLDER", help="PickScore_v1, in transformers' layout")
    _add_reading(pictures)
    _add_output(pictures)

    robust = command(evaluate, "robustness", _robustness, "FID of pictures against themselves, changed slightly")
    robust.add_argument("pictures", metavar="PICTURES", help="a folder of pictures, or shards")
    _add_features(robust)
    _add_reading(robust)
    _add_output(robust)

    preference = command(evaluate, "preference", _preference, "which of two sets on the same prompts is preferred")
    preference.add_argument("a", metavar="A", help="a folder of pictures, or shards")
    preference.add_argument("b", metavar="B", help="the same prompts, pictures of the same names")
    _add_prompts(preference)
    preference.add_argument("--pickscore", type=Path, metavar="FOLDER", help="PickScore_v1, in transformers' layout")
    preference.add_argument("--page", type=Path, metavar="FOLDER", help="write a page for a blind comparison by people")
    _add_reading(preference)
    preference.add_argument("--output", type=Path, metavar="FILE", help="JSON")

    votes = command(evaluate, "votes", _votes, "what people voted on the page of `evaluate preference --page`")
    votes.add_argument("files", nargs="+", type=Path, metavar="FILE", help="votes, a file for each participant")
    votes.add_argument("--output", type=Path, metavar="FILE", help="JSON")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt per line, for the pictures in the order of their names (default: captions, as for training)",
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    features = parser.add_mutually_exclusive_group()
    features.add_argument(
        "--inception", type=Path, metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
    )
    features.add_argument(
        "--semantic-compressor",
        type=Path,
        metavar="FILE",
        help="features of a semantic compressor instead of Inception's (default: the mini's)",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of each set")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep what the networks make of pictures there, and go on from it"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON; a plot of its name beside it")


def _check(options: argparse.Namespace) -> None:
    whole_number("--batch", options.batch, 1, 4096)
    if options.limit is not None:
        whole_number("--limit", options.limit, 1, 10**9)
    if options.device == "cuda" and "LOCAL_RANK" in os.environ:  # of accelerate's processes, each has its own
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(options.device)
    _check_output(options)


def _check_output(options: argparse.Namespace) -> None:
    if options.output is not None:
        if options.output.suffix != ".json":
            raise WuerstchenError(f"{options.output}: --output takes a .json file")
        check_file(options.output)


def _prompts(options: argparse.Namespace, *sets: str) -> list[str] | None:
    from ..reports.evaluation.reading import is_folder, read_prompts

    if options.prompts is None:
        return None
    for one in sets:
        if not is_folder(one):
            raise WuerstchenError(f"{one}: --prompts is for folders; shards carry their captions themselves")
    return read_prompts(options.prompts)


def _extractor(options: argparse.Namespace):
    from ..reports.evaluation.extractors import load_compressor_features, load_inception

    if options.inception is not None:
        return load_inception(options.inception, options.device)
    return load_compressor_features(options.semantic_compressor, options.device)


def _kept(options: argparse.Namespace, features: Sequence[str]):
    """What --keep names, for the scorers that the options name, those of `features` among them."""
    from ..checkpoints.sets import MINI, SET
    from ..reports.evaluation.kept import Kept, hash_of

    if options.keep is None:
        return None
    given = vars(options)
    weights = {}
    if features:
        compressor = given.get("semantic_compressor") or MINI / SET["semantic_compressor"]
        weights = dict.fromkeys(features, hash_of(given.get("inception") or compressor))
    if given.get("clip") is not None:
        weights["clip"] = f"{options.clip_model or CLIP} {hash_of(options.clip)}"
    if given.get("pickscore") is not None:
        weights["pick"] = hash_of(options.pickscore)
    return Kept(options.keep, weights)


def _pictures(options: argparse.Namespace) -> None:
    from ..reports.evaluation.figures import figures, notes, plot, table
    from ..reports.evaluation.processes import joined
    from ..reports.evaluation.reading import check_captions, check_set, score

    _check(options)
    for data in filter(None, (options.generated, options.real)):
        check_set(data)
    prompts = _prompts(options, options.generated)
    if prompts is not None and options.clip is None and options.pickscore is None:
        raise WuerstchenError("--prompts is for the CLIP score and PickScore: add --clip FILE or --pickscore FOLDER")
    if options.real is None and options.clip is None and options.pickscore is None and options.inception is None:
        raise WuerstchenError("nothing to measure: give --real FOLDER, --inception, --clip or --pickscore")
    if options.clip is None and options.clip_model is not None:
        raise WuerstchenError("--clip-model is of the CLIP score: add --clip FILE")
    if options.real is None and options.semantic_compressor is not None:
        raise WuerstchenError("--semantic-compressor is for a comparison with --real FOLDER: give both, or neither")
    extractor = None if options.real is None and options.inception is None else _extractor(options)
    scorers = scorers_of(options, extractor)
    kept, real = _kept(options, ["features"] if extractor else []), None
    with joined(options.device) as share:
        generated = score(options.generated, scorers, options.batch, options.limit, prompts, kept, share)
        if options.real is not None:
            features = {"features": scorers["features"]}
            real = score(options.real, features, options.batch, options.limit, None, kept, share)
    if share.rank > 0:
        return
    if options.clip is not None or options.pickscore is not None:
        check_captions(options.generated, generated)
    if extractor is not None:
        extractor.cpu()
    rows, told = list(figures(generated, real, extractor)), list(notes(generated, real, extractor))
    for line in (*table(rows), *told):
        print(line)
    if options.output is not None:
        about = {
            "generated": options.generated,
            "real": options.real,
            "pictures": len(generated.keys),
            "real_pictures": None if real is None else len(real.keys),
            "notes": told,
        }
        write_json(options.output, {**about, "figures": [row._asdict() for row in rows]})
        plot(options.output.with_suffix(".png"), rows, options.generated)


def scorers_of(options: argparse.Namespace, extractor) -> dict[str, Any]:
    """Name -> what `score` calls with pictures and captions, for each of the figures that the options ask for."""
    from ..reports.evaluation.text_scores import clip_score, pick_score

    scorers: dict[str, Any] = {}
    if extractor is not None:
        scorers["features"] = extractor.score
    if options.clip is not None:
        scorers["clip"] = clip_score(options.clip, options.clip_model or CLIP, options.device)
    if options.pickscore is not None:
        scorers["pick"] = pick_score(options.pickscore, options.device)
    return scorers


def _robustness(options: argparse.Namespace) -> None:
    from ..reports.evaluation.processes import joined
    from ..reports.evaluation.reading import check_set
    from ..reports.evaluation.robustness import OPERATIONS, plot, robustness, table

    _check(options)
    check_set(options.pictures)
    extractor = _extractor(options)
    kept = _kept(options, ["features", *OPERATIONS])
    with joined(options.device) as share:
        distances, count = robustness(options.pictures, extractor, options.batch, options.limit, kept, share)
    if share.rank > 0:
        return
    for line in (*table(distances), f"{count} pictures", extractor.about):
        print(line)
    if options.output is not None:
        about = {"pictures": options.pictures, "count": count, "features": extractor.about}
        write_json(options.output, {**about, "FID": distances})
        plot(options.output.with_suffix(".png"), distances, options.pictures)


def _preference(options: argparse.Namespace) -> None:
    import torch

    from ..reports.evaluation.preference import counted, paired, win_rate
    from ..reports.evaluation.processes import joined
    from ..reports.evaluation.reading import Scorer, check_captions, check_set, score
    from ..reports.evaluation.study import check_page, write_page
    from ..reports.evaluation.text_scores import pick_score

    _check(options)
    if options.pickscore is None and (options.page is None or options.output is not None):
        raise WuerstchenError("--pickscore FOLDER is missing; without it, only --page FOLDER can be written")
    if options.pickscore is None and options.keep is not None:
        raise WuerstchenError("--keep is for PickScore: add --pickscore FOLDER, or leave it out")
    sets = {"A": options.a, "B": options.b}
    for data in sets.values():
        check_set(data)
    if options.page is not None:
        check_page(options.page)
    prompts = _prompts(options, *sets.values())

    def read(images: list, captions: list[str]):
        return torch.zeros(len(images))

    scorer: Scorer = read if options.pickscore is None else pick_score(options.pickscore, options.device)
    kept = _kept(options, [])
    with joined(options.device) as share:
        a, b = (
            score(data, {"pick": scorer}, options.batch, options.limit, prompts, kept, share) for data in sets.values()
        )
    if share.rank > 0:
        return
    order = paired(a, b, (options.a, options.b))
    check_captions(options.a, a)
    if options.pickscore is not None:
        ours, theirs = a.values["pick"], b.values["pick"][order]
        wins, ties, losses = counted(ours, theirs)
        rate = win_rate(wins, ties, losses)
        print(f"PickScore prefers A on {rate.rate:.1%} of {len(order)} prompts ({rate.low:.1%} to {rate.high:.1%})")
        print(f"{wins} for A, {ties} equal, {losses} for B; mean {ours.mean():.3f} (A), {theirs.mean():.3f} (B)")
        if options.output is not None:
            counts = {"A_wins": wins, "equal": ties, "B_wins": losses}
            means = {"mean_A": ours.double().mean().item(), "mean_B": theirs.double().mean().item()}
            write_json(options.output, {**sets, **counts, **means, "win_rate": rate._asdict()})
    if options.page is not None:
        write_page(options.page, sets, a.keys, a.captions)
        print(f"{len(order)} pairs in {options.page / 'index.html'}")


def _votes(options: argparse.Namespace) -> None:
    from ..reports.evaluation.study import as_json, read_votes, table, tallied

    _check_output(options)
    votes = [read_votes(path) for path in options.files]
    rows = tallied(votes)
    (a, b) = votes[0].sets
    for line in (*table(rows), one_line(f"A: {a}, B: {b}")):
        print(line)
    if options.output is not None:
        write_json(options.output, {"A": a, "B": b, "rows": as_json(rows)})
