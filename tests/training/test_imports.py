"""What training says about packages that are there but can't be imported, and what it knows nothing of."""

import sys
from pathlib import Path

import pytest

import wuerstchen_core.training
from wuerstchen_core import WuerstchenError
from wuerstchen_core.mini import emoji
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.training.data.shards import expand
from wuerstchen_core.training.stages.lora import add_lora


def add_a_lora():
    add_lora(Prior(StageCConfig(width=32, depth=1, heads=2, text_width=32)), rank=1, alpha=1)


@pytest.mark.parametrize(
    "package, use, says",
    [
        ("peft", add_a_lora, "needs peft 0.18 or later"),
        ("webdataset", lambda: expand("x.tar"), "pip install webdataset"),
        ("resvg_py", lambda: emoji.build("gone"), "pip install resvg-py"),
    ],
)
def test_a_package_that_can_not_be_imported_is_told_with_the_reason(tmp_path, monkeypatch, package, use, says):
    """As with peft 0.17 beside transformers 5: it is installed, and something else lacks a name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{package}.py").write_text("raise ImportError('cannot import name\\n \\'HybridCache\\'')")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WuerstchenError, match="cannot import name 'HybridCache'") as error:
        use()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_training_knows_no_emoji():
    for path in Path(wuerstchen_core.training.__path__[0]).rglob("*.py"):
        assert "emoji" not in path.read_text("utf-8").lower(), path
