"""Files of prompts: their formats, what is wrong with a line, and whose picture is drawn with whose."""

import io
import json
import sys

import pytest

from wuerstchen_core.bulk.lines import BadLine, Line, Prompts
from wuerstchen_core.bulk.plan import Share, batches, blocks
from wuerstchen_core.util.errors import WuerstchenError

ASKED = {"width": 256, "height": 256, "seed": 5}


@pytest.fixture
def read(tiny):
    return lambda path, asked=ASKED, loras=(), model=tiny: list(Prompts(str(path), asked, model.sampling, loras))


def test_the_same_lines_in_every_format(read, tmp_path, monkeypatch):
    """Expected values are written out; blank lines count for nothing, and the seed follows from the line's index."""
    (tmp_path / "p.txt").write_bytes("\ufeffein Würstchen\r\n\n  a cat, (red:1.2)\n".encode())
    rows = [{"prompt": "ein Würstchen"}, {"prompt": "a cat, (red:1.2)"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.csv").write_text('prompt,seed\nein Würstchen,\n"a cat, (red:1.2)",\n')
    expected = [(0, "000000", "ein Würstchen", 5), (1, "000001", "a cat, (red:1.2)", 6)]
    paths = [tmp_path / name for name in ("p.txt", "p.jsonl", "p.csv")]
    for path in [*paths, *paths[:2]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        for name in (str(path), "-")[: 1 if path.suffix == ".csv" else 2]:
            found = [(one.index, one.name, one.settings["prompt"], one.settings["seed"]) for one in read(name)]
            assert found == expected, path


def test_every_field_reaches_its_setting(read, tmp_path):
    row = {
        "prompt": "p", "negative": "n", "id": "a-1", "lora": "x.safetensors:0.5", "seed": -3, "seed_b": 9, "width": 264,
        "height": 512, "steps_c": 3, "cfg_c": 1.5, "steps_b": 2, "cfg_b": 1.25, "sampler": "ddim", "schedule": "uneven",
        "sampler_b": "lcm", "schedule_b": "even", "cfg_interval": [0.2, 0.8], "cfg_rescale": 0.5, "distilled": False,
    }  # fmt: skip
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    table = {**row, "cfg_interval": "0.2 0.8"}
    (tmp_path / "p.csv").write_text(",".join(table) + "\n" + ",".join(map(str, table.values())) + "\n")
    for name in ("p.jsonl", "p.csv"):
        (line,) = read(tmp_path / name)
        expected = {**row, "negative_prompt": "n", "cfg_interval": (0.2, 0.8)}
        assert line.name == "a-1" and line.loras == ("x.safetensors:0.5",) and line.seed_b == 9
        assert dict(line.settings) == {key: expected[key] for key in expected if key not in ("negative", "id", "lora")}


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"negative": "x"}', "no prompt"),
        ('{"prompt": 3}', "prompt is 3"),
        ('{"prompt": "x", "colour": "red"}', "unknown field 'colour'"),
        ('{"prompt": "x", "width": 100}', "width is 100"),
        ('{"prompt": "x", "height": "256"}', "height is '256'"),
        ('{"prompt": "x", "seed": 1.5}', "seed is 1.5"),
        ('{"prompt": "x", "steps_c": 0}', "steps_c is 0"),
        ('{"prompt": "x", "cfg_b": NaN}', "cfg_b is nan"),
        ('{"prompt": "x", "sampler": "lms"}', "unknown sampler"),
        ('{"prompt": "x", "distilled": "yes"}', "distilled is 'yes'"),
        ('{"prompt": "x", "distilled": true}', "has no distilled networks"),
        ('{"prompt": "x", "id": "../x"}', "id is '../x'"),
        ('{"prompt": "x", "id": "a.b"}', "id is 'a.b'"),
        ('{"prompt": "x", "id": ""}', "id is ''"),
        ('{"prompt": "x", "id": "FIRST"}', "that of an earlier line"),
        ('{"prompt": "x", "lora": 3}', "lora is 3"),
        ('{"prompt": "x", "lora": [3]}', "lora is 3"),
        ('{"prompt": "\\ud800"}', "prompt is not UTF-8"),
        (b'{"prompt": "\xff"}', "prompt is not UTF-8"),
    ],
)
def test_a_bad_line_stops_no_other(read, tmp_path, line, why):
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a", "id": "first"}\n' + line + b'\n{"prompt": "b"}\n')
    first, bad, last = read(path)
    assert isinstance(bad, BadLine) and why in bad.reason and (bad.index, bad.number) == (1, 2)
    assert (first.name, last.name, last.settings["seed"]) == ("first", "000002", 7)


def test_bad_rows_of_a_table(read, tmp_path):
    (tmp_path / "p.csv").write_text('prompt,width\na,256\nb,wide\nc,256,7\n"d"x,256\ne,256\n')
    kinds = [type(line) for line in read(tmp_path / "p.csv")]
    assert kinds == [Line, BadLine, BadLine, BadLine, Line]


def test_a_file_of_another_kind_is_refused(read, tmp_path):
    (tmp_path / "p.doc").write_text("a cat")
    with pytest.raises(WuerstchenError, match=r"p.doc: prompts are read from .txt, .jsonl or .csv"):
        read(tmp_path / "p.doc")


def test_batches_have_one_size_and_follow_from_the_file_alone(read, tmp_path):
    """Every line is in exactly one batch of its block, with lines of its size only."""
    rows = [{"prompt": str(i), "width": 256 + 64 * (i % 3 == 0)} for i in range(25)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = []
    for number, good, _ in blocks(read(tmp_path / "p.jsonl"), 10):
        for batch in batches(good, lambda line: (1, 1), lambda line: 4):
            assert len({line.settings["width"] for line in batch}) == 1 and len(batch) <= 4
            assert {line.index // 10 for line in batch} == {number}
            made.append([line.index for line in batch])
    assert sorted(sum(made, [])) == list(range(25))
    assert made[:4] == [[0, 3, 6, 9], [1, 2, 4, 5], [7, 8], [10, 11, 13, 14]]


def test_shares(monkeypatch):
    """Three machines of two processes each: six different shares of six."""
    found = set()
    for shard in ("1/3", "2/3", "3/3"):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            share = Share.of(shard)
            assert share.world == 6
            found.add(share.rank)
    assert found == set(range(6))
    for wrong in ("0/3", "4/3", "3", "a/b", "1/3/5", "-1/3"):
        with pytest.raises(WuerstchenError, match="--shard"):
            Share.of(wrong)
