"""The training of a text encoder: its losses against open_clip's, and its runs."""

import pytest
import torch
import torch.nn.functional as F

import wuerstchen_core as w
from tests.training.runs import logged
from wuerstchen_core import cli
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.stages.text_encoder import Options, build

CONFIG = TextEncoderConfig(width=32, layers=2, heads=2)
TINY = [
    "--size", "64", "--batch", "4", "--workers", "0", "--steps", "6", "--warm-up", "2", "--learning-rate", "1e-3",
    "--save-every", "3", "--log-every", "1", "--ema-every", "2", "--grid", "2", "--prediction", "0.5",
    "--embedding", "8", "--hidden", "16", "--network.width", "32", "--network.layers", "1", "--network.heads", "2",
    "--buckets", "false",
]  # fmt: skip


def task_of(tiny_folder, **options):
    torch.manual_seed(0)
    compressor = str(tiny_folder / SET["semantic_compressor"])
    return build(
        Options(**{"semantic_compressor": compressor, "network": CONFIG, "grid": 2, **options}),
        DataOptions("pictures", 64),
    )


def batch_of(latents, captions):
    return {"features": {"semantic": latents}, "caption": captions}


CAPTIONS = ["a fox", "A photo of a very small fox, at the top", "pizza (2)", "owl"]


def test_the_contrastive_loss_is_open_clips(tiny_folder):
    from open_clip.loss import ClipLoss

    task = task_of(tiny_folder).eval()
    latents = torch.randn(4, 16, 2, 2)
    loss = task(batch_of(latents, CAPTIONS), Draws(0, 0, 4))
    assert loss.keys() == {"contrastive"}
    states = task.encoder([caption.replace("(", r"\(").replace(")", r"\)") for caption in CAPTIONS])
    ends = torch.stack([states[row, end] for row, end in enumerate((3, 12, 5, 2))])
    pictures, texts = F.normalize(task.picture(latents.flatten(1)), dim=1), F.normalize(task.text(ends), dim=1)
    expected = ClipLoss()(pictures, texts, torch.tensor(1 / 0.07))
    assert loss["contrastive"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_captions_of_all_lengths_have_the_states_of_reading_each_alone(tiny_folder):
    task = task_of(tiny_folder).eval()
    captions = [" ".join(["fox"] * (number * 7 % 19)) for number in range(21)]
    alone = torch.cat([task.encoder.encode_tokens(task.captions.tokens([caption])) for caption in captions])
    expected = alone[torch.arange(21), [number * 7 % 19 + 1 for number in range(21)]]
    torch.testing.assert_close(task.ends(task.captions.tokens(captions)), expected, rtol=1e-5, atol=1e-5)


def test_what_is_the_same_twice_is_no_negative(tiny_folder):
    """Pictures 0 and 1 are the same, captions 2 and 3 are: against the sums over what is left, in float64."""
    task = task_of(tiny_folder).eval()
    latents = torch.randn(4, 16, 2, 2)
    latents[1] = latents[0]
    captions = ["a fox", "an owl", "Pizza", "pizza"]
    loss = task(batch_of(latents, captions), Draws(0, 0, 4))["contrastive"].item()
    ends = task.ends(task.captions.tokens(captions))
    texts, pictures = (F.normalize(e.double(), dim=1) for e in (task.text(ends), task.picture(latents.flatten(1))))
    logits = texts @ pictures.T / 0.07
    target = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).double() / 2
    expected = -(target * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / 8
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_the_latent_is_predicted_from_the_end_token(tiny_folder):
    task = task_of(tiny_folder, prediction=3.0, contrastive=0.0).eval()
    latents = torch.randn(4, 16, 4, 6)
    loss = task(batch_of(latents, CAPTIONS), Draws(0, 0, 4))
    pooled = latents.unflatten(2, (2, 2)).unflatten(4, (2, 3)).mean(dim=(3, 5)).flatten(1)
    told = task.latent(task.ends(task.captions.tokens(CAPTIONS)))
    assert loss.keys() == {"prediction"}
    assert loss["prediction"].item() == pytest.approx(3 * (told - pooled).square().mean().item(), rel=1e-4)
    assert not any(name.startswith(("text.", "picture.", "scale")) for name, _ in task.named_parameters())


def test_words_that_no_caption_had_are_written_as_zeros(tiny_folder, tmp_path):
    task = task_of(tiny_folder).train()
    captions = ["a fox", "an owl", "pizza", "pizza"]
    task(batch_of(torch.randn(4, 16, 2, 2), captions), Draws(0, 0, 4))
    kept = task.encoder.tower.token_embedding.weight.detach().clone()
    task.export(tmp_path, torch.float32)
    table = w.load_text_encoder(tmp_path / "text_encoder.safetensors").tower.token_embedding.weight
    used = sorted({*task.captions.tokens(captions).flatten().tolist()})
    assert len(used) == 7  # start, end and five words
    assert torch.equal(table[used], kept[used]) and table.abs().sum(dim=1).count_nonzero() == 7
    assert torch.equal(task.encoder.tower.token_embedding.weight, kept)
    started = task_of(tiny_folder, init=str(tmp_path / "text_encoder.safetensors"), network=TextEncoderConfig())
    assert started.encoder.config == CONFIG
    started.encoder.tower.token_embedding.weight.data[5] = 1.0
    assert started.exported()["text_encoder"].tower.token_embedding.weight[5, 0] == 1.0


def test_a_stopped_run_goes_on_exactly_with_cached_features(place, tiny_folder):
    compressor = ["--semantic-compressor", str(tiny_folder / SET["semantic_compressor"])]
    command = [
        "train",
        "text-encoder",
        "--config",
        "mini",
        "--data",
        "pictures",
        *compressor,
        *TINY,
        "--cool-down",
        "0",
    ]
    for steps in ("4", "6"):
        assert cli.main([*command, "--folder", "half", "--cache", "cache", "--steps", steps]) == 0
    assert cli.main([*command, "--folder", "whole"]) == 0
    assert logged("half") == logged("whole")
    assert {"loss/contrastive", "loss/prediction"} <= logged("whole").keys()
    half, whole = (torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("half", "whole"))
    for part in ("weights", "averaged"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, half[part][name]), name
    encoder = w.load_text_encoder("half/text_encoder.safetensors")
    assert encoder(["number 3 (grey)"]).shape == (1, 77, 32)
    stage_c = ["train", "stage-c", "--config", "c.toml", "--text-encoder", "half/text_encoder.safetensors"]
    assert cli.main([*stage_c, "--steps", "1"]) == 0


def test_captions_are_told_apart(place, tiny_folder):
    """Twelve pictures, each with a caption of its own, which begin as good as alike."""
    compressor = str(tiny_folder / SET["semantic_compressor"])
    w.train("text-encoder", config="mini", folder="run", data="pictures", semantic_compressor=compressor, size=64,
            batch=12, workers=0, steps=60, warm_up=5, learning_rate=3e-3, buckets=False, grid=2, embedding=16,
            save_every=60, network={"width": 32, "layers": 1, "heads": 2})  # fmt: skip
    losses = logged("run")["loss/contrastive"]
    first, last = losses[min(losses)][0], losses[60][0]
    assert last < 0.5 * first


@pytest.mark.parametrize("asked, told", [
    ({"contrastive": 0.0}, "contrastive and prediction are both 0"),
    ({"temperature": 0.0}, "temperature is 0"),
    ({"grid": 0}, "grid is 0"),
    ({"semantic_compressor": "nowhere.pt"}, "semantic_compressor: there is no nowhere.pt"),
])  # fmt: skip
def test_what_cannot_be_trained_is_told(asked, told):
    with pytest.raises(w.WuerstchenError, match=told) as error:
        build(Options(**asked), DataOptions("pictures", 64))
    assert "\n" not in str(error.value)


def test_a_new_one_is_loaded_as_any_other(tiny_folder, tmp_path):
    task_of(tiny_folder).export(tmp_path, torch.float32)
    loaded = w.load_text_encoder(tmp_path / "text_encoder.safetensors")
    assert isinstance(loaded, TextEncoder) and loaded.config == CONFIG
