"""A blind comparison of two sets by people (paper, appendix C): a page for it, and what their votes say (figure 5)."""

import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from einops import rearrange
from PIL import Image
from torch import Tensor

from ...training.data.files import read_regular
from ...util.errors import WuerstchenError, readable
from .preference import WinRate, win_rate
from .reading import samples

CHOICES = ("A", "equal", "B")
LARGEST = 64 << 20  # bytes of a file of votes


def check_page(folder: Path) -> None:
    """Raises WuerstchenError if a page can't be written there, since there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WuerstchenError(f"{folder}: --page takes a folder that is empty or does not exist yet")


def write_page(folder: Path, sets: dict[str, str], keys: Sequence[str], prompts: Sequence[str]) -> None:
    """A page, index.html, that shows two sets side by side, in a random order that nothing on the page tells.

    It needs no server. Pictures are written anew as PNG files without metadata, under random names.

    Args:
        folder: must not exist yet, or be empty.
        sets: a folder or shards each for "A" and "B".
        keys, prompts: the pictures to show, all in both sets, and the prompt of each.

    Raises:
        WuerstchenError: there is something in the folder.
    """
    check_page(folder)
    (folder / "pictures").mkdir(parents=True)
    pairs = {key: {"key": key, "prompt": prompt} for key, prompt in zip(keys, prompts, strict=True)}
    for name, data in sets.items():
        for sample in samples(data):
            if sample.key in pairs:
                file = f"{secrets.token_hex(8)}.png"
                _save(sample.image, folder / "pictures" / file)
                pairs[sample.key][name] = file
    study = {"study": secrets.token_hex(8), **sets, "pairs": list(pairs.values())}
    text = json.dumps(study).replace("<", "\\u003c")  # a prompt must not end the script
    page = files(__package__).joinpath("page.html").read_text("utf-8").replace("PAIRS", text, 1)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _save(image: Tensor, path: Path) -> None:
    Image.fromarray(rearrange((image * 255).round().byte(), "c h w -> h w c").numpy()).save(path)


class Votes(NamedTuple):
    study: str
    sets: tuple[str, str]
    participant: str
    choices: dict[str, str]  # key of the pair -> one of CHOICES


def read_votes(path: Path) -> Votes:
    """The votes that one participant downloaded. Raises WuerstchenError for anything else."""
    try:
        content = json.loads(read_regular(path, LARGEST))
        choices = {vote["key"]: vote["choice"] for vote in content["votes"]}
        texts = [content[name] for name in ("study", "A", "B", "participant")]
        good = all(isinstance(text, str) for text in (*texts, *choices)) and set(choices.values()) <= set(CHOICES)
        if not good or not choices or len(choices) < len(content["votes"]):
            raise ValueError("a vote is missing, twice there, or neither A, B nor equal")
    except FileNotFoundError as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WuerstchenError(
            f"{path}: no votes that the page of `evaluate preference --page` saved ({readable(error, 150)})"
        ) from error
    study, a, b, participant = texts
    return Votes(study, (a, b), participant, choices)


class Row(NamedTuple):
    name: str
    counts: tuple[int, int, int]  # A, equal, B
    rate: WinRate  # of A


def tallied(votes: Sequence[Votes]) -> list[Row]:
    """A row for each participant, one for all votes, and one for the majority of each prompt's votes.

    The majority goes to A or B, whichever has more votes, and is equal if they have as many.

    Raises WuerstchenError if the votes are of several studies, or a participant is there twice.
    """
    if len({one.study for one in votes}) > 1:
        raise WuerstchenError("the votes are of several studies: tally those of one page at a time")
    twice = [name for name, times in Counter(one.participant for one in votes).items() if times > 1]
    if twice:
        raise WuerstchenError(f"participant {readable(twice[0], 60)} is there twice: leave out the older file of votes")
    rows = [_row(one.participant, list(one.choices.values())) for one in votes]
    by_prompt: dict[str, Counter] = defaultdict(Counter)
    for one in votes:
        for key, choice in one.choices.items():
            by_prompt[key][choice] += 1
    majority = []
    for counts in by_prompt.values():
        lead = counts["A"] - counts["B"]
        majority.append("A" if lead > 0 else "B" if lead < 0 else "equal")
    rows.append(_row("all votes", [choice for one in votes for choice in one.choices.values()]))
    rows.append(_row("majority per prompt", majority))
    return rows


def _row(name: str, choices: Sequence[str]) -> Row:
    counted = Counter(choices)
    counts = (counted["A"], counted["equal"], counted["B"])
    return Row(name, counts, win_rate(*counts))


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| votes | A | equal | B | win rate of A | 95 % interval |"
    yield "|---|---|---|---|---|---|"
    for name, counts, rate in rows:
        shares = (f"{count} ({count / sum(counts):.0%})" for count in counts)
        yield f"| {readable(name, 40)} | {' | '.join(shares)} | {rate.rate:.1%} | {rate.low:.1%} to {rate.high:.1%} |"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {"votes": row.name, **dict(zip(CHOICES, row.counts, strict=True)), "win_rate": row.rate._asdict()}
        for row in rows
    ]
