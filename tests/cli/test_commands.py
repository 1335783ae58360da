"""The other commands: what they say when something is wrong."""

import pytest

from wuerstchen_core.cli import main


@pytest.mark.parametrize("command", [["evaluate", "emoji", "none"], ["train", "mini", "none", "work"]])
def test_a_missing_data_set_is_named(command, capsys):
    assert main(command) == 2
    assert "none" in capsys.readouterr().err


def test_a_network_that_the_recipe_does_not_have_is_named(tmp_path, capsys):
    assert main(["train", "mini", "data", "work", "--only", "stage_d"]) == 2
    assert (
        "stage_a, semantic_compressor, linear_preview, text_encoder, stage_c, stage_b, distill"
        in capsys.readouterr().err
    )


def test_no_steps_are_no_training(tmp_path, capsys):
    assert main(["train", "mini", "data", "work", "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("sheet, says", [("nowhere/sheet.png", "nowhere"), ("sheet.jpg", ".png")])
def test_a_sheet_that_cannot_be_written_is_named(emoji, sheet, says, capsys):
    assert main(["evaluate", "emoji", str(emoji), "--sheet", sheet]) == 2
    assert says in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["data", "emoji", "file/emoji"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"wuerstchen: {tmp_path / 'file'}: File exists"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    told = capsys.readouterr().out
    commands = ("generate", "data", "train", "evaluate", "inspect", "convert", "benchmark", "cost")
    assert all(command in told for command in commands)


@pytest.mark.parametrize("wrong", [["--width", "9" * 5000], ["--" + "x" * 5000], ["--seed", "\x1b]52;" * 300]])
def test_what_the_parser_refuses_is_one_short_line(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "cat", *wrong])
    line, end = capsys.readouterr().err.split("\n")
    assert stop.value.code == 2 and end == "" and len(line) < 500 and line.isprintable()
    assert line.startswith("wuerstchen: ") and line.endswith("--help)")
