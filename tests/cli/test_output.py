"""What the command line writes into pipes of any encoding, and what it says when it is stopped."""

import io
import subprocess
import sys

import pytest

from wuerstchen_core import cli
from wuerstchen_core.cli import main


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "cp437", "ascii"])
def test_help_and_names_are_written_into_any_pipe(monkeypatch, encoding):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding=encoding))
    with pytest.raises(SystemExit):
        main(["--help"])
    print("日本.png ü … 10⁹", flush=True)
    told = pipe.getvalue().decode(encoding)
    assert "rstchen: text to image" in told
    assert encoding != "ascii" or r"\u65e5\u672c.png \xfc \u2026" in told


def test_a_prompt_that_is_not_utf8_is_told_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("wuerstchen_core.cli.generate.load_model", lambda *_: pytest.fail("loaded"))
    assert main(["generate", "caf\udce9"]) == 2
    assert capsys.readouterr().err.startswith(r"wuerstchen: the prompt is not UTF-8: 'caf\udce9'")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [
        sys.executable,
        "-c",
        "from wuerstchen_core.cli import main; raise SystemExit(main(['cost', '--size', 'mini']))",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize("stop, says", [(KeyboardInterrupt(), "interrupted"), (KeyboardInterrupt("at 3"), "at 3")])
def test_an_interruption_says_something(monkeypatch, capsys, stop, says):
    def stopped(*_):
        raise stop

    monkeypatch.setattr("wuerstchen_core.cli.generate.load_model", stopped)
    assert main(["generate", "a cat"]) == 130
    assert capsys.readouterr().err == f"wuerstchen: {says}\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr("wuerstchen_core.cli.generate.load_model", full)
    assert main(["generate", "a cat"]) == 2
    assert capsys.readouterr().err.startswith("wuerstchen: out of memory")


def test_a_name_with_control_characters_does_not_reach_the_terminal(capsys):
    assert cli.main(["inspect", "a\x1b]52;x\nb.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and len(error) < 500


def test_an_argument_that_is_no_number_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a cat", "--seed", "9" * 5000])
    error = capsys.readouterr().err
    assert error.startswith("wuerstchen: argument --seed: ") and error.count("\n") == 1 and len(error) < 600
