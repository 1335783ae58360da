"""What Stages B and C are given to train with."""

import re
import tarfile

import torch

import wuerstchen_core as w
from tests.training.stages.tasks import train
from wuerstchen_core import cli
from wuerstchen_core.training.stages.conditioning import encode_captions


def test_networks_that_do_not_fit_together_are_named(place, tiny_folder, capsys):
    for arguments, told in (
        (["--network.text-width", "48"], "text_encoder: .* width 32, but this Stage C reads 48"),
        (["--size", "100"], "size is 100: it must be a multiple of 64"),
        (["--noise-levels", "0"], "noise_levels and sample_steps must be at least 1"),
        (["--semantic-compressor", "gone.safetensors"], "semantic_compressor: there is no gone.safetensors"),
    ):
        assert cli.main(["train", "stage-c", "--config", "c.toml", *arguments]) == 2
        assert re.search(told, capsys.readouterr().err)
    assert cli.main(["train", "stage-b", "--config", "b.toml", "--zeroed", "0.8"]) == 2
    assert "together 1 at most" in capsys.readouterr().err


def test_an_unreadable_shard_is_named_and_passed_over(place, capsys, caplog):
    with tarfile.open("good.tar", "w") as tar:
        for path in sorted((place / "pictures").iterdir()):
            tar.add(path, path.name)
    (place / "bad.tar").write_bytes(b"not a tar file" * 100)
    train("c", "--data", "{good,bad}.tar", "--steps", "3")
    assert any("bad.tar" in record.message for record in caplog.records)
    assert cli.main(["train", "stage-c", "--config", "c.toml", "--data", "bad.tar", "--folder", "none"]) == 2
    assert "bad.tar" in capsys.readouterr().err


def test_long_captions_are_cut_and_parentheses_read():
    encoder = w.Wuerstchen.mini().text_encoder_c
    long = encode_captions(encoder, ["a " * 200, "b"])
    assert long.shape == (2, 77, encoder.config.width)
    torch.testing.assert_close(long[1:], encode_captions(encoder, ["b"]), rtol=1e-4, atol=1e-5)
