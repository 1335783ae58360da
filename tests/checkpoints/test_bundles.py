"""Bundles: a whole set in one file."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests.checkpoints.published import clip_of_comfyui, prior
from wuerstchen_core.checkpoints.archive import BUNDLE_KEY, open_archive
from wuerstchen_core.checkpoints.sets import DISTILLED, MINI, SET, find_distilled, find_set
from wuerstchen_core.cli import main
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny set with all that a set may have."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    shutil.copytree(tiny_folder, folder)
    torch.manual_seed(1)
    w.save(TextEncoder(TextEncoderConfig(width=32, layers=1, heads=2)), folder / SET["text_encoder_b"])
    w.save(Previewer(PreviewerConfig(widths=(8, 8, 4, 4))), folder / SET["previewer"], torch.bfloat16)
    for stage, module in (("stage_c", "blocks.2.attention.to_q"), ("stage_b", "down_blocks.1.3.attention.to_q")):
        halves = {"lora_A": torch.randn(2, 32), "lora_B": torch.randn(32, 2)}
        sampling = {"wuerstchen_sampling": json.dumps({"steps": 2, "cfg": 1.0})}
        tensors = {f"{module}.{half}.weight": tensor for half, tensor in halves.items()}
        save_file(tensors, folder / DISTILLED[stage], sampling)
    return folder


@pytest.fixture(scope="module")
def bundle(folder):
    path = folder.parent / "bundle.safetensors"
    assert main(["convert", str(folder), "--bundle", "-o", str(path)]) == 0
    return path


def content(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


def test_a_bundle_is_the_files_that_it_was_made_of(folder, bundle, tmp_path):
    assert main(["convert", str(bundle), "-o", str(tmp_path)]) == 0
    names = [*SET.values(), *DISTILLED.values()]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        (metadata, tensors), (expected, theirs) = content(tmp_path / name), content(folder / name)
        assert metadata == expected and tensors.keys() == theirs.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key])
    assert main(["convert", str(tmp_path), "--bundle", "-o", str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == bundle.read_bytes()


def test_a_bundle_draws_what_its_folder_draws(folder, bundle, tmp_path):
    ours, theirs = w.Wuerstchen.from_file(bundle), w.Wuerstchen.from_folder(folder)
    assert ours.previewer is not None and ours.text_encoder_b is not ours.text_encoder_c
    assert ours.distilled.keys() == {"stage_c", "stage_b"}
    for prompts in ({"prompt": "a cat"}, {"prompt": "a cat", "negative_prompt": "a dog", "steps_c": 2}):
        settings = {"width": 64, "height": 64, "seed": 3, **prompts}
        assert torch.equal(ours.generate(**settings), theirs.generate(**settings))
    size = ["--width", "64", "--height", "64", "-o", str(tmp_path / "cat.png")]
    assert main(["generate", "a cat", "--model", str(bundle), *size]) == 0


def test_in_float8_are_stages_b_and_c_alone(tmp_path):
    """The mini's: 42 MB in place of 48."""
    path = tmp_path / "small.safetensors"
    assert main(["convert", str(MINI), "--bundle", "--dtype", "float8_e4m3fn", "-o", str(path)]) == 0
    assert path.stat().st_size < 42e6
    dtypes: dict = {}
    for name, tensor in load_file(path).items():
        dtypes.setdefault(name.split(".")[0], set()).add(tensor.dtype)
    small = {name for name, found in dtypes.items() if torch.float8_e4m3fn in found}
    assert small == {"stage_b", "stage_c"} and dtypes["text_encoder"] == {torch.float16}
    assert w.Wuerstchen.from_file(path).distilled.keys() == {"stage_c"}


def test_text_encoders_are_told_apart(bundle, folder):
    """Both are of one kind; a loader that is given the whole bundle takes Stage C's."""
    for path, name in ((bundle, "text_encoder_c"), (find_set(bundle)["text_encoder_b"], "text_encoder_b")):
        ours, theirs = w.load_text_encoder(path).state_dict(), w.load_text_encoder(folder / SET[name]).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_a_set_with_one_text_encoder_keeps_it_once(tiny_folder, tmp_path):
    path = tmp_path / "b.safetensors"
    assert main(["convert", str(tiny_folder), "--bundle", "-o", str(path)]) == 0
    paths = find_set(path)
    assert paths["text_encoder_b"] == paths["text_encoder_c"] == path / "text_encoder"
    assert find_distilled(path) == {}


def test_networks_in_a_bundle_may_be_of_any_layout(tiny_folder, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(tiny_folder, folder)
    save_file(prior(published=True).state_dict(), folder / SET["stage_c"])
    save_file(clip_of_comfyui().state_dict(), folder / SET["text_encoder_c"])
    path = tmp_path / "b.safetensors"
    assert main(["convert", str(folder), "--bundle", "--dtype", "float16", "-o", str(path)]) == 0
    ours, theirs = w.load_stage_c(path), w.load_stage_c(folder / SET["stage_c"], dtype=torch.float16)
    assert ours.config == theirs.config
    assert all(torch.equal(tensor.half(), theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())
    with pytest.raises(w.WuerstchenError, match="b.safetensors/stage_a: this is a stage_a file"):
        w.load_stage_c(path / "stage_a")


def test_inspect_shows_what_is_in_a_bundle(bundle, capsys):
    assert main(["inspect", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("text_encoder_b, semantic_compressor, previewer, stage_c_distilled, stage_b_distilled")
    place = lines.index("stage_b_distilled:")
    assert lines[place + 1 : place + 3] == ["  lora: load_lora takes it", "    for a Stage B"]
    assert "  text_encoder: load_text_encoder takes it" in lines


@pytest.mark.parametrize(
    "metadata, says",
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"stage_c": 3}', "is not as we write it"),
        ('{"stage_c": {"wuerstchen": 3}}', "is not as we write it"),
        ('{"stage_c": {}, "stage_c": {}}', "stage_c is in it twice"),
        ('{"stage_c": {"wuerstchen": "{}"}}', "is not as we write it"),
        ('{"../stage_c": {}}', "not a whole set of weights, stage_a"),
    ],
)
def test_a_damaged_bundle_is_named(tmp_path, metadata, says):
    path = tmp_path / "bad.safetensors"
    save_file({"stage_c.out.1.bias": torch.zeros(2)}, path, {BUNDLE_KEY: metadata})
    with pytest.raises(w.WuerstchenError, match=says) as error:
        find_set(path) if "../" in metadata else w.load_stage_c(path)
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_in_a_bundle_is_named(bundle, tiny_folder):
    with pytest.raises(
        w.WuerstchenError, match="bundle.safetensors: there is no stage_d in it: it is a bundle of stage_a"
    ):
        open_archive(bundle / "stage_d")
    with pytest.raises(
        w.WuerstchenError, match="stage_c.safetensors: there is no x in it: it is a file, and no bundle"
    ):
        open_archive(tiny_folder / SET["stage_c"] / "x")
    with pytest.raises(w.WuerstchenError, match="nowhere: there is no such file"):
        open_archive(bundle.parent / "nowhere")
    with pytest.raises(w.WuerstchenError, match="one file, and no bundle of a whole set"):
        w.Wuerstchen.from_file(tiny_folder / SET["stage_c"])
