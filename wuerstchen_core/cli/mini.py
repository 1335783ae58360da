"""What is about the embedded model: its data set, its training, its figures."""

import argparse
from pathlib import Path

from ..diffusion.options import SamplingOptions
from ..util.atomic import replacing
from ..util.checks import whole_number
from ..util.errors import WuerstchenError
from ..util.json_file import write_json
from .common import add_model, check_png, command, load_model


def add_data_command(commands) -> None:
    data = commands.add_parser("data", help="build a data set").add_subparsers(metavar="SET", required=True)
    emoji = command(data, "emoji", _build_emoji, "the embedded model's data set: emoji with their names (needs npm)")
    emoji.add_argument("folder", type=Path, help="where to write it; must not exist yet")


def add_train_command(train) -> None:
    mini = command(train, "mini", _train_mini, "the embedded model, from scratch or from where a run was stopped")
    mini.add_argument("data", type=Path, help="the data set, from `wuerstchen data emoji`")
    mini.add_argument("work", type=Path, help="folder for checkpoints and the finished weights")
    mini.add_argument(
        "--only",
        metavar="RUN",
        help="stage_a, semantic_compressor, linear_preview, text_encoder, stage_c, stage_b or distill",
    )
    mini.add_argument("--steps", type=int, metavar="N", help="of every run, instead of its own")


def add_evaluate_commands(evaluate) -> None:
    emoji = command(evaluate, "emoji", _evaluate, "a model on the emoji data set")
    _add_data(emoji)
    emoji.add_argument(
        "--distilled", action="store_true", help="draw by the set's distilled networks (default: by the set's own)"
    )
    emoji.add_argument("--count", type=int, default=200, metavar="N", help="pictures and prompts (default: 200)")
    emoji.add_argument("--sheet", type=Path, metavar="FILE", help="only draw the model card's pictures, to a PNG file")
    add_model(emoji)

    sweep = command(
        evaluate, "solvers", _sweep, "one stage's latents by samplers, schedules and steps, on the emoji data set"
    )
    _add_data(sweep)
    sweep.add_argument("--stage", choices=["c", "b"], default="c", help="Stage C (default) or Stage B")
    sweep.add_argument("--samplers", nargs="+", default=["ddpm", "dpmpp_2m_sde"], metavar="NAME", help="to compare")
    sweep.add_argument("--schedules", nargs="+", default=["even"], metavar="NAME", help="to compare")
    sweep.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12, 30], metavar="N", help="to compare")
    sweep.add_argument("--count", type=int, default=12, metavar="N", help="prompts or pictures (default: 12)")
    sweep.add_argument("--draws", type=int, default=4, metavar="N", help="of each of them (default: 4)")
    sweep.add_argument("--cfg", type=float, metavar="S", help="strength of Stage C's guidance (default: the model's)")
    sweep.add_argument("--reference", type=int, default=200, metavar="N", help="steps to compare with (default: 200)")
    sweep.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON; a plot of its name beside it")
    add_model(sweep)

    efficiency = command(
        evaluate, "efficiency", _efficiency, "Stage C and a single-stage baseline after equal amounts of training"
    )
    _add_data(efficiency)
    efficiency.add_argument("work", type=Path, help="folder for the two runs and the figures; what is there goes on")
    efficiency.add_argument("--count", type=int, default=100, metavar="N", help="emoji to learn (default: 100)")
    efficiency.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        metavar="N",
        help="operations of training at which both are measured, in 10¹² (default: 1 2 4 8 16 32)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=Path,
        nargs="?",
        default=Path("emoji"),
        help="the data set, from `wuerstchen data emoji` (default: emoji)",
    )


def _build_emoji(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..mini import emoji

    with tqdm(unit="emoji", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        emoji.build(options.folder, progress=show)
    print(f"{len(emoji.EmojiSet(options.folder))} emoji in {options.folder}")


def _train_mini(options: argparse.Namespace) -> None:
    from ..mini.recipe import train_mini

    train_mini(options.data, options.work, options.only, options.steps)


def _evaluate(options: argparse.Namespace) -> None:
    from ..mini.emoji import EmojiSet
    from ..mini.evaluation import evaluate

    emoji = EmojiSet(options.data)
    if options.sheet is not None:
        from ..mini.samples import sample_sheet

        check_png(options.sheet)
        with replacing(options.sheet) as partial:
            sample_sheet(load_model(options)).save(partial, format="PNG")
        return
    model = load_model(options)
    sampling = None
    if options.distilled:
        sampling = model.sampling()
        if not sampling.distilled:
            raise WuerstchenError(
                "--distilled: this set has no distilled networks, or other networks are in their place"
            )
    for line in evaluate(model, emoji, options.count, sampling):
        print(line, flush=True)


def _sweep(options: argparse.Namespace) -> None:
    from ..mini.emoji import EmojiSet
    from ..mini.sweep import stage_b_draws, stage_c_draws
    from ..reports.sweep import grid, plot, sweep, table

    settings = grid(options.samplers, options.schedules, options.steps)
    for setting in settings:
        SamplingOptions(**vars(setting))
    whole_number("--draws", options.draws, 2, 1000)
    whole_number("--reference", options.reference, 1, 10_000)
    if options.output.suffix != ".json":
        raise WuerstchenError(f"{options.output}: --output takes a .json file")
    if options.stage == "b" and options.cfg is not None:
        raise WuerstchenError("--cfg is Stage C's, and --stage b draws by Stage B alone: leave it out")
    emoji, model = EmojiSet(options.data), load_model(options)
    about = {name: getattr(options, name) for name in ("stage", "count", "draws", "reference")}
    if options.stage == "c":
        about["cfg"] = model.defaults.cfg if options.cfg is None else options.cfg
        draw, figures = stage_c_draws(model, emoji, options.count, options.draws, about["cfg"])
    else:
        draw, figures = stage_b_draws(model, emoji, options.count, options.draws)
    rows: list[dict] = []
    for row in sweep(draw, settings, figures, options.reference):
        rows.append(row)
        write_json(options.output, {**about, "rows": rows})
        for line in list(table(rows))[0 if len(rows) == 1 else -1 :]:
            print(line, flush=True)
    plot(options.output.with_suffix(".png"), rows, f"Stage {options.stage.upper()}")


def _efficiency(options: argparse.Namespace) -> None:
    from ..mini.efficiency import compare, plot
    from ..mini.emoji import EmojiSet

    rows = []
    for row in compare(EmojiSet(options.data), options.work, options.count, options.budgets):
        rows.append(row)
        print(
            f"{row['network']:<9} {row['operations'] / 1e12:6.2f} T in {row['steps']:5} steps: "
            f"{row['top-1']:.1%} of {options.count} names",
            flush=True,
        )
    plot(options.work / "efficiency.png", rows)
