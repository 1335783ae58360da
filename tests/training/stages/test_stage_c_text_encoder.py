"""Stage C's training with its text encoder."""

import pytest
import torch

import wuerstchen_core as w
from tests.training.runs import logged
from tests.training.stages.tasks import task_c, train
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.stages import lora

TRAINED = ["--train-text-encoder", "true", "--caption-drop", "0.3"]


def test_the_loss_is_that_with_a_frozen_one_and_its_gradient_reaches_it(tiny_folder):
    """With the same draws, captions dropped too; the states come from the batch's captions, not from the features."""
    options = {"noise_levels": 2, "caption_drop": 0.5}
    frozen, trained = task_c(tiny_folder, **options), task_c(tiny_folder, **options, train_text_encoder=True)
    batch = {"image": torch.rand(6, 3, 64, 128), "caption": ["one", "two (2)", "", "four", "five", "six"]}
    losses = {}
    for task in (frozen, trained):
        batch["features"] = task.features(batch)
        losses[task] = task(batch, Draws(3, 5, 6))["noise"]
    assert losses[trained].item() == pytest.approx(losses[frozen].item(), rel=1e-5)
    assert batch["features"].keys() == {"semantic"}
    losses[trained].backward()
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters() if name.startswith("encoder.")}
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert not any(name.startswith("encoder.") for name, _ in frozen.named_parameters())


def test_it_learns_at_a_rate_of_its_own(place, tiny_folder):
    """AdamW's first step moves every weight by its rate, whatever the gradient."""
    moved = {}
    for factor in ("0.1", "0.5"):
        train("c", *TRAINED, "--steps", "1", "--warm-up", "0", "--weight-decay", "0", "--folder", factor,
              "--text-encoder-rate", factor, "--init", str(tiny_folder / SET["stage_c"]))  # fmt: skip
        start = w.load_text_encoder(tiny_folder / SET["text_encoder_c"]).tower.ln_final.weight
        moved[factor] = (w.load_text_encoder(f"{factor}/text_encoder.safetensors").tower.ln_final.weight - start).abs()
    assert moved["0.1"].median().item() == pytest.approx(1e-4, rel=0.05)
    assert moved["0.5"].median().item() == pytest.approx(5e-4, rel=0.05)
    first, second = (w.load_stage_c(f"{factor}/stage_c.safetensors").projection.weight for factor in ("0.1", "0.5"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_it_resumes_exactly_with_latents_from_a_cache(place, monkeypatch):
    train("c", *TRAINED, "--folder", "whole")
    train("c", *TRAINED, "--folder", "half", "--steps", "4", "--cache", "cache")
    train("c", *TRAINED, "--folder", "half", "--cache", "cache")
    assert logged("half") == logged("whole")
    half, whole = (torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("half", "whole"))
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, half["weights"][name]), name
        assert torch.equal(whole["averaged"][name], half["averaged"][name]), name
    for name, tensor in w.load_text_encoder("half/text_encoder.safetensors").state_dict().items():
        assert torch.equal(tensor, whole["averaged"][f"encoder.{name}"])


def test_samples_are_drawn_with_the_text_encoder_that_learns(place, monkeypatch):
    train("c", *TRAINED, "--steps", "2", "--sample-every", "2", "--sample-steps", "2", "--prompts", '["a disc"]')
    assert (place / "run" / "samples" / "0000002.png").exists()


def test_a_lora_leaves_the_text_encoder_as_it_is(tiny_folder):
    with pytest.raises(TypeError, match="train_text_encoder"):
        lora.Options(init=str(tiny_folder / SET["stage_c"]), train_text_encoder=True)
    with pytest.raises(w.WuerstchenError, match="there is no option 'train_text_encoder'"):
        w.train("lora", config="mini", train_text_encoder=True)


def test_a_rate_that_is_none_is_refused(tiny_folder):
    with pytest.raises(w.WuerstchenError, match="text_encoder_rate is 0"):
        task_c(tiny_folder, text_encoder_rate=0.0)
