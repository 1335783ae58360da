"""peft's patterns against the regular expression that peft makes of them."""

import json
import random
import re
import time

import pytest
import torch
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.loras import pair
from wuerstchen_core.checkpoints.peft_pattern import Pattern


def test_they_match_what_peft_matches():
    draw, found = random.Random(0), 0
    for _ in range(1000):
        atoms = [draw.choice(["a", "b", ".", r"\.", r"\d", "1"]) + draw.choice(["", "", "*", "+", "?"])
                 for _ in range(draw.randint(1, 5))]  # fmt: skip
        pattern = draw.choice(["", "", "^"]) + "".join(atoms) + draw.choice(["", "", "$", "|b.a", "|^a.*"])
        name = "".join(draw.choice("ab.1") for _ in range(draw.randint(1, 9)))
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert Pattern(pattern).matches(name) == expected, (pattern, name)
        found += expected
    assert 100 < found < 900


@pytest.mark.parametrize(
    "pattern", [r"([\w.]+)+!", "(a+)+$", "[a-z]*", "a{9}", r"\w+", "a**", r"\1", "(?i)a", "x" * 500]
)
def test_what_could_take_for_ever_is_refused(tmp_path, pattern):
    with pytest.raises(ValueError):
        Pattern(pattern)
    save_file(
        pair(), tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps({"alpha_pattern": {pattern: 4}})}
    )
    with pytest.raises(w.WuerstchenError, match="l.safetensors: its alpha_pattern is not one of peft"):
        w.load_lora(tmp_path / "l.safetensors")


def test_a_pattern_for_every_module_takes_no_time(tmp_path):
    """As peft writes it where alphas differ; and many that must be followed letter by letter are refused."""
    names = [f"blocks.{3 * i + 2}.attention.to_{name}" for i in range(50) for name in "qkv"]
    tensors = {key: tensor for name in names for key, tensor in pair(name, lora_A=torch.ones(1, 2),
                                                                    lora_B=torch.ones(2, 1)).items()}  # fmt: skip
    told = {name: float(i) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps({"alpha_pattern": told})})
    start = time.process_time()
    changes = w.load_lora(tmp_path / "l.safetensors").changes
    assert {name: change.alpha for name, change in changes.items()} == told
    many = {f"x{i}.*.*.*y": 1.0 for i in range(300)}
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps({"alpha_pattern": many})})
    with pytest.raises(w.WuerstchenError, match="more patterns than modules"):
        w.load_lora(tmp_path / "l.safetensors")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("value", [10**400, True, "16", [1], None, float("inf")])
def test_an_alpha_is_a_number(tmp_path, value):
    for config in ({"lora_alpha": value}, {"alpha_pattern": {"to_q": value}}):
        save_file(pair(), tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        with pytest.raises(w.WuerstchenError, match="damaged LoRA, .*alpha"):
            w.load_lora(tmp_path / "l.safetensors")
