"""What Stages B and C are given to train with."""

import re
import tarfile
import time

import pytest
import torch
from accelerate.state import AcceleratorState

import wuerstchen_core as w
from tests.training.runs import logged
from tests.training.stages.tasks import task_b, task_c, train
from wuerstchen_core import cli
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.stages import previewer, stage_b, stage_c
from wuerstchen_core.training.stages.conditioning import CaptionEncoder, encode_captions


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


@pytest.fixture(scope="module")
def encoder():
    return w.Wuerstchen.mini().text_encoder_c


CAPTIONS = ["a cat", "", "one (two) [three] \\(four\\)", "word " * 75, "word " * 76, "a " * 2000, "\n".join(["x"] * 90)]


@torch.no_grad()
def test_captions_are_cut_before_they_are_encoded(encoder, monkeypatch):
    """What is encoded has 77 tokens, and its states are the first 77 of the whole caption's."""
    escaped = [re.sub(r"([()])", r"\\\1", caption) for caption in CAPTIONS]
    expected = torch.cat([encoder([caption])[:, :77] for caption in escaped])
    shapes = []
    encode_tokens = type(encoder).encode_tokens
    monkeypatch.setattr(
        type(encoder), "encode_tokens", lambda self, tokens: shapes.append(tokens.shape) or encode_tokens(self, tokens)
    )
    for encode in (lambda: encode_captions(encoder, CAPTIONS), lambda: CaptionEncoder(encoder)(CAPTIONS)):
        torch.testing.assert_close(encode(), expected, rtol=1e-4, atol=1e-4)
        assert shapes.pop() == (len(CAPTIONS), 77)


def test_captions_that_are_cut_are_counted_and_reported(encoder, caplog):
    encode = CaptionEncoder(encoder)
    encode(CAPTIONS[:4])
    assert not caplog.messages
    for _ in range(4):
        encode(CAPTIONS)
    says = "captions so far are longer than the 75 tokens that the text encoder reads: the rest of each is cut off"
    assert caplog.messages == [f"3 of 11 {says}", f"12 of 32 {says}"]


@pytest.mark.parametrize("unit", ["word ", "((", "a", "\\(", "猫", ") (", "&amp;", "\u00e9 ", " ", "<|endoftext|>"])
def test_a_caption_of_a_megabyte_costs_no_more_than_a_long_one(encoder, unit):
    begun = time.process_time()
    states = encode_captions(encoder, [unit * (1_000_000 // len(unit)), "b"])
    assert time.process_time() - begun < 2
    assert states.shape == (2, 77, encoder.config.width) and states.isfinite().all()


# Precision


def task_previewer(tiny_folder, **options):
    name = str(tiny_folder / SET["semantic_compressor"])
    return previewer.build(previewer.Options(semantic_compressor=name, **options), DataOptions(data="x", size=64))


@pytest.mark.parametrize("make", [task_c, task_b, task_previewer])
def test_features_are_computed_in_the_precision_that_is_asked_for(tiny_folder, make):
    batch = {"image": torch.rand(2, 3, 64, 64), "caption": ["a cat", "b (c)"]}
    with torch.no_grad():
        plain = make(tiny_folder).features(batch)
        with torch.autocast("cpu", torch.bfloat16):
            within = make(tiny_folder).features(batch)
            lower = make(tiny_folder, frozen_precision="float16").features(batch)
        other = make(tiny_folder, frozen_precision="bfloat16").features(batch)
    assert all(torch.equal(within[name], value) and value.dtype == torch.float32 for name, value in plain.items())
    for name, largest in (("semantic", 0.1), ("text", 0.1)):
        if name in plain:
            errors = [(values[name].float() - plain[name]).abs().max() for values in (lower, other)]
            assert 0 < errors[0] < errors[1] < largest * plain[name].abs().max()
    with pytest.raises(w.WuerstchenError, match="frozen_precision is 'half': choose one of float32, bfloat16, float16"):
        make(tiny_folder, frozen_precision="half")


def test_mixed_precision_changes_no_feature_and_the_cache_knows_theirs(place, monkeypatch):
    seen = []
    features = stage_c.StageCTask.features

    def watched(task, batch):
        found = features(task, batch)
        seen.append(found["semantic"])
        return found

    monkeypatch.setattr(stage_c.StageCTask, "features", watched)
    train("c", "--folder", "plain", "--steps", "3", "--cache", "cache")
    plain = seen[:]
    AcceleratorState._reset_state(True)  # as in a process of its own
    train("c", "--folder", "mixed", "--steps", "3", "--mixed-precision", "bf16")
    AcceleratorState._reset_state(True)
    assert len(seen) == 6 and all(map(torch.equal, seen[3:], plain))
    train("c", "--folder", "again", "--steps", "3", "--cache", "cache")
    assert len(seen) == 6 and logged("again") == logged("plain")
    train("c", "--folder", "lower", "--steps", "3", "--cache", "cache", "--frozen-precision", "bfloat16")
    assert len(seen) == 9 and not torch.equal(seen[6], plain[0])


# Captions of a run


def test_only_what_reads_captions_needs_them(place, capsys, caplog):
    for path in (place / "pictures").glob("*.txt"):
        path.unlink()
    few = ["--steps", "1", "--sample-every", "0"]
    for stage in "bc":
        assert cli.main(["train", f"stage-{stage}", "--config", f"{stage}.toml", *few]) == 2
        assert "none of its 12 pictures has a caption" in capsys.readouterr().err
    train("c", *few, "--folder", "c", "--allow-empty-captions", "true")
    assert "12 of 12 pictures have no caption" in caplog.text
    caplog.clear()
    train("b", *few, "--folder", "b", "--text-encoder", "")
    assert cli.main(["train", "previewer", "--config", "mini", "--data", "pictures", "--size", "64", *few]) == 0
    assert "caption" not in caplog.text
    (place / "pictures" / "00.txt").write_text("word " * 100)
    train("b", *few, "--folder", "b2", "--batch", "12", "--buckets", "false")
    assert "11 of 12 pictures have no caption" in caplog.text
    assert "1 of 12 captions so far are longer than the 75 tokens" in caplog.text


def test_stage_b_tells_whether_it_reads_captions(tiny_folder):
    assert task_b(tiny_folder).reads_captions and not task_b(tiny_folder, text_encoder="").reads_captions
    assert isinstance(task_b(tiny_folder), stage_b.StageBTask) and task_c(tiny_folder).reads_captions
