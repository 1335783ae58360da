"""Values that no run can have, each told in one line before anything is loaded or read."""

import os

import pytest

import wuerstchen_core as w
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop import record
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.options import load


def told(**options):
    with pytest.raises(w.WuerstchenError) as error:
        w.train("stage-c", **{"config": "mini", "folder": "run", "data": "pictures", "steps": 1, **options})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and not os.path.exists("run")
    return str(error.value)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"seed": 1 << 64}, "seed is of 65 bits"),
        ({"batch": 1 << 20}, "batch is 1048576: it must be at most 65536"),
        ({"workers": 10**6}, "workers is 1000000: it must be at most 1024"),
        ({"size": 64 * 10**7}, "size is 640000000: it must be at most 8192"),
        ({"weight_decay": float("nan")}, "weight_decay is nan: a finite number is needed"),
        ({"sample_cfg": float("inf")}, "sample_cfg is inf: a finite number is needed"),
        ({"largest_error": float("nan")}, "largest_error is nan: a finite number is needed"),
        ({"prompts": ["a \udcff"]}, "prompts: 'a \\udcff' is not UTF-8"),
        ({"folder": "a \udcff"}, "folder: 'a \\udcff' is not UTF-8"),
        ({"text_encoder": "x" * 5000}, "text_encoder: there is no xxx"),
        ({"config": "x" * 5000}, "the configuration can't be read (File name too long)"),
        ({"config": "a\0b"}, "a\\x00b: the configuration can't be read"),
        ({"config": "/dev/zero"}, "/dev/zero: the configuration can't be read (not a regular file)"),
    ],
)
def test_what_can_not_be_is_one_line(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    assert says in told(**options)


def test_a_name_of_data_that_is_too_long_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(w.WuerstchenError, match="^x+\\.\\.\\.: there is no such folder$"):
        next(DataOptions(data="x" * 5000, size=64, workers=0).open(0))
    assert record.facts(DataOptions(data="x" * 300 + ".tar"))["data"].startswith("1 shards")  # its absence comes later


def test_plans_made_in_python_are_held_to_the_same():
    with pytest.raises(w.WuerstchenError, match="weight_decay is nan: it must be at least 0"):
        Plan(steps=1, weight_decay=float("nan"))
    with pytest.raises(w.WuerstchenError, match="learning_rate is inf: it must be above 0, and finite"):
        Plan(steps=1, learning_rate=float("inf"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_configuration_is_a_regular_file_of_a_sensible_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(w.WuerstchenError, match="pipe.toml: the configuration can't be read .not a regular file"):
        load(str(tmp_path / "pipe.toml"))
    (tmp_path / "large.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(w.WuerstchenError, match="large.toml: the configuration has more than 1048576 bytes"):
        load(str(tmp_path / "large.toml"))
