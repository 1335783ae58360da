"""Messages of errors: one line, short, and nothing that a terminal would obey."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.checkpoints.published import prior
from wuerstchen_core.cli import main
from wuerstchen_core.util.errors import first_line


@pytest.mark.parametrize(
    "message, expected",
    [
        ("c.safetensors: Würstchen – 24×24 “fine”", "c.safetensors: Würstchen – 24×24 “fine”"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b]52;c;eA==\x07\x00\x7f\x9b", r"\x1b]52;c;eA==\x07\x00\x7f\x9b"),
        ("\u202egpj.exe\u2028\udc80", r"\u202egpj.exe\u2028\udc80"),
        (ValueError("x"), "x"),
    ],
)
def test_a_message_is_one_line_without_control_characters(message, expected):
    assert str(w.WuerstchenError(message)) == expected
    assert str(pickle.loads(pickle.dumps(w.WuerstchenError(message)))) == expected


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0001"])
def test_a_message_is_under_500_letters_and_keeps_both_ends(letter):
    text = str(w.WuerstchenError("model.safetensors: " + letter * 10**6 + ": use another"))
    assert len(text) < 500 and text.isprintable()
    assert text.startswith("model.safetensors: ") and text.endswith(": use another") and " … " in text


def test_the_first_line_of_another_error_is_what_it_says():
    assert first_line(RuntimeError("\nout of memory\nException raised from c10::Error\n#0 frame")) == "out of memory"
    assert first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize("name", ["\x1b]0;title\x07.blocks.0.kv_mapper.1.weight", "a\nb", "\x1b[2J", "x" * 10**6])
def test_the_names_in_a_file_reach_the_terminal_spelled_out(tmp_path, capsys, name):
    save_file({name: torch.zeros(1)}, tmp_path / "n.safetensors")
    assert main(["inspect", str(tmp_path / "n.safetensors")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.removesuffix("\n").isprintable() and len(told) < 520
    if len(name) < 100:
        weights = {f"{name.replace('.', '')}.{key}": tensor for key, tensor in prior().state_dict().items()}
        save_file(weights, tmp_path / "c.safetensors")
        assert main(["inspect", str(tmp_path / "c.safetensors")]) == 0
        assert all(line.isprintable() for line in capsys.readouterr().out.removesuffix("\n").split("\n"))
