"""The training loop, and the mini's recipe from pictures to a model that draws."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wuerstchen_core as w
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.training import mini
from wuerstchen_core.training.emoji import EmojiSet
from wuerstchen_core.training.evaluate import _psnr, evaluate
from wuerstchen_core.training.loop import Plan, train
from wuerstchen_core.training.losses import contrastive_loss, quantization_loss


def line_fit(plan, checkpoint, losses=None, stop_at=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def loss(generator):
        if losses is not None and len(losses) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(plan.batch, 2) + generator.random()
        value = F.mse_loss(network(x), x.sum(dim=1, keepdim=True))
        if losses is not None:
            losses.append(value.item())
        return value

    train(network, loss, plan, checkpoint)
    return network


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    plan = Plan(steps=30, batch=4, learning_rate=0.05, warm_up=5, ema_every=3, save_every=7)
    whole, parts = [], []
    expected = line_fit(plan, tmp_path / "whole.pt", whole)
    with pytest.raises(KeyboardInterrupt):
        line_fit(plan, tmp_path / "parts.pt", parts, stop_at=17)
    del parts[14:]  # saved at step 14; what came after is done again
    resumed = line_fit(plan, tmp_path / "parts.pt", parts)
    assert parts == whole
    for ours, theirs in zip(resumed.state_dict().values(), expected.state_dict().values()):
        assert torch.equal(ours, theirs)
    assert not list(tmp_path.glob("*.partial"))


def test_the_run_learns_and_the_rate_rises_and_falls(tmp_path):
    plan = Plan(steps=200, batch=64, learning_rate=0.03, warm_up=10)
    losses = []
    line_fit(plan, tmp_path / "run.pt", losses)
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:10])
    assert plan.rate(0) == pytest.approx(0.003) and plan.rate(100) == 0.03
    assert plan.rate(175) == pytest.approx(0.015) and plan.rate(200) == 0


def test_a_loss_that_is_no_number_ends_the_run_with_what_was_saved(tmp_path):
    network = nn.Linear(1, 1)
    values = iter([1.0, 1.0, float("nan")])
    plan = Plan(steps=9, batch=1, learning_rate=0.1, save_every=1)
    with pytest.raises(w.WuerstchenError, match="step 2 is nan"):
        train(network, lambda generator: network(torch.ones(1)).sum() * next(values), plan, tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 2


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    plan = Plan(steps=1, batch=1, learning_rate=0.1)
    train(one := nn.Linear(1, 1), lambda generator: one(torch.ones(1)).sum(), plan, tmp_path / "run.pt")
    with pytest.raises(w.WuerstchenError, match="run.pt belongs to another network"):
        train(nn.Linear(2, 1), None, plan, tmp_path / "run.pt")


def test_contrastive_loss_is_cross_entropy_both_ways():
    torch.manual_seed(1)
    texts, pictures, scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(3.0)
    logits = 3 * F.normalize(texts) @ F.normalize(pictures).T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(contrastive_loss(texts, pictures, scale, torch.eye(5).bool()), expected)


def test_quantization_moves_codebook_and_latent():
    latent = torch.tensor([1.0], requires_grad=True)
    quantized = torch.tensor([3.0], requires_grad=True)
    loss = quantization_loss(latent, quantized, commitment=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(5.0)
    assert (quantized.grad.item(), latent.grad.item()) == pytest.approx((4.0, -1.0))


@pytest.fixture
def short_plans(monkeypatch):
    for name, plan in mini.PLANS.items():
        monkeypatch.setitem(mini.PLANS, name, Plan(steps=2, batch=4, learning_rate=plan.learning_rate))
    monkeypatch.setattr(mini, "MEMORY_PLAN", Plan(steps=2, batch=4, learning_rate=1e-3))


@pytest.fixture
def tiny_encoder():
    torch.manual_seed(0)
    return TextEncoder(mini.TEXT_ENCODER).requires_grad_(False)


def test_the_recipe_makes_a_model_that_draws(emoji, tmp_path, short_plans):
    work = tmp_path / "work"
    mini.train_mini(emoji, work)
    model = w.Wuerstchen.from_folder(work)
    assert model.generate("red disc, noto style", steps_c=2, steps_b=2).shape == (1, 256, 256, 3)
    assert model.stage_b.config == mini.STAGE_B and model.stage_c.config == mini.STAGE_C
    pictures = torch.stack([EmojiSet(emoji).plain(i) for i in range(6)])
    assert model.stage_a.encode(pictures).std().item() == pytest.approx(1, abs=0.35)

    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    mini.train_mini(emoji, work)
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_features_are_those_of_the_pictures_described(emoji, tmp_path, short_plans):
    for name in ("stage_a", "semantic_compressor"):
        mini.train_mini(emoji, tmp_path, only=name)
    data = EmojiSet(emoji)
    seen = mini.load_features(data, tmp_path, with_stage_a=True)
    assert seen.semantic.shape == (6, 5, 16, 6, 6) and seen.stage_a.shape == (6, 2, 4, 64, 64)
    stage_a = w.load_stage_a(tmp_path / "stage_a.safetensors")
    compress = w.load_semantic_compressor(tmp_path / "semantic_compressor.safetensors")
    for variant, (description, arrangement) in enumerate(mini.arrangements(data, 4)[:2]):
        assert seen.descriptions[4][variant] == description
        picture = data.compose(4, **arrangement)
        expected = stage_a.encode(picture[None])[0]
        torch.testing.assert_close(torch.tensor(seen.stage_a[4, variant]).float(), expected, rtol=1e-2, atol=1e-2)
        expected = compress(mini._shrink(picture)[None])[0]
        torch.testing.assert_close(torch.tensor(seen.semantic[4, variant]).float(), expected, rtol=1e-2, atol=1e-2)
    drawn = seen.draw(400, random.Random(0))
    assert {i for i, _ in drawn} == set(range(6)) and {variant for _, variant in drawn} == {0, 1}
    assert 0.4 < np.mean([variant == 0 for _, variant in drawn]) < 0.6


def test_captions_kept_are_those_of_the_pictures_drawn(emoji, tmp_path, tiny_encoder):
    data = EmojiSet(emoji)
    plain = [[description for description, _ in mini.arrangements(data, i)] for i in range(len(data))]
    seen = mini.Features(np.zeros((6, 5, 16, 6, 6), np.float16), None, plain)
    kept = mini.read_captions(seen, tiny_encoder, tmp_path)
    assert np.abs(kept[4, 0] - tiny_encoder(["green disc, noto style"])[0].numpy()).max() < 1e-2
    for drawn in [(4, 0), (5, 1), (0, 4)]:
        seats = {mini._captioned([drawn], random.Random(seed))[0] for seed in range(50)}
        assert seats == {(drawn[0], c) for c, about in enumerate(mini.CAPTIONS) if about == drawn[1]}


def test_psnr_is_its_formula():
    truth = torch.zeros(2, 4, 4, 3)
    images = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert _psnr(images, truth).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_a_model_that_draws_what_is_asked_scores_full_marks(emoji, tiny, monkeypatch):
    """Stage A draws, in place of the decoded latent, the plain picture that the text encoder was asked for."""
    data = EmojiSet(emoji)
    asked = []
    original = type(tiny.text_encoder_b).forward

    def remember(self, prompts):
        asked[:] = prompts
        return original(self, prompts)

    def draw(stage_a, latent, geometry):
        order = [f"{entry['name']}, {entry['style']} style" for entry in data.entries]
        return torch.stack([data.plain(order.index(prompt)).permute(1, 2, 0) for prompt in asked])

    monkeypatch.setattr(type(tiny.text_encoder_b), "forward", remember)
    monkeypatch.setattr("wuerstchen_core.pipeline.sample_stage_c", lambda *a, **k: torch.zeros(6, 16, 6, 6))
    monkeypatch.setattr("wuerstchen_core.pipeline.sample_stage_b", lambda *a, **k: None)
    monkeypatch.setattr("wuerstchen_core.pipeline.decode", draw)
    monkeypatch.setattr("wuerstchen_core.training.evaluate._through_a", lambda model, images: images + 0.1)
    monkeypatch.setattr("wuerstchen_core.training.evaluate._through_b", lambda model, images: images + 0.01)
    lines = list(evaluate(tiny, data, 6))
    assert "PSNR 20.00 dB" in lines[0] and "PSNR 40.00 dB" in lines[1]
    assert lines[-1] == "text to picture: top-1 100.0% of 6 prompts"

    monkeypatch.setattr("wuerstchen_core.pipeline.decode", lambda *a: draw(*a).flip(-1))
    lines = list(evaluate(tiny, data, 6))
    assert lines[-1] == "text to picture: top-1 33.3% of 6 prompts"  # green stays green when red and blue change places
