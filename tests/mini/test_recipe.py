"""The mini's recipe, from pictures to a model that draws."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wuerstchen_core as w
from wuerstchen_core.mini import recipe
from wuerstchen_core.mini.captions import plain_caption
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig
from wuerstchen_core.training.stages.conditioning import compressor_input


@pytest.fixture
def short_plans(monkeypatch):
    for name, plan in recipe.PLANS.items():
        monkeypatch.setitem(recipe.PLANS, name, recipe.Plan(steps=2, batch=4, learning_rate=plan.learning_rate))
    monkeypatch.setattr(recipe, "FITTED", 20)
    monkeypatch.setattr(recipe, "OBSERVED", 2)
    monkeypatch.setattr(recipe, "MEMORY_PLAN", recipe.Plan(steps=2, batch=4, learning_rate=1e-3))


@pytest.fixture
def tiny_encoder():
    torch.manual_seed(0)
    return TextEncoder(recipe.TEXT_ENCODER).requires_grad_(False)


def test_the_recipe_makes_a_model_that_draws(emoji, tmp_path, short_plans):
    work = tmp_path / "work"
    recipe.train_mini(emoji, work)
    model = w.Wuerstchen.from_folder(work)
    assert model.generate("red disc, noto style", steps_c=2, steps_b=2).shape == (1, 256, 256, 3)
    stage_b = replace(recipe.STAGE_B, stage_a_scale=model.stage_a.config.scale_factor)
    assert model.stage_b.config == stage_b and model.stage_c.config == recipe.STAGE_C
    assert model.previewer.config == recipe.PREVIEWER
    assert w.load_previewer(work / "linear_preview.safetensors").config.widths == ()
    pictures = torch.stack([EmojiSet(emoji).plain(i) for i in range(6)])
    assert model.stage_a.encode(pictures).std().item() == pytest.approx(1, abs=0.35)

    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    recipe.train_mini(emoji, work)
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_features_are_those_of_the_pictures_described(emoji, tmp_path, short_plans):
    for name in ("stage_a", "semantic_compressor"):
        recipe.train_mini(emoji, tmp_path, only=name)
    data = EmojiSet(emoji)
    seen = recipe.load_features(data, tmp_path, with_stage_a=True)
    assert seen.semantic.shape == (6, 5, 16, 6, 6) and seen.stage_a.shape == (6, 2, 4, 64, 64)
    stage_a = w.load_stage_a(tmp_path / "stage_a.safetensors")
    compress = w.load_semantic_compressor(tmp_path / "semantic_compressor.safetensors")
    for variant, (description, arrangement) in enumerate(recipe.arrangements(data, 4)[:2]):
        assert seen.descriptions[4][variant] == description
        picture = data.compose(4, **arrangement)
        expected = stage_a.encode(picture[None])[0]
        torch.testing.assert_close(torch.tensor(seen.stage_a[4, variant]).float(), expected, rtol=1e-2, atol=1e-2)
        expected = compress(compressor_input(picture[None]))[0]
        torch.testing.assert_close(torch.tensor(seen.semantic[4, variant]).float(), expected, rtol=1e-2, atol=1e-2)
    drawn = seen.draw(400, random.Random(0))
    assert {i for i, _ in drawn} == set(range(6)) and {variant for _, variant in drawn} == {0, 1}
    assert 0.4 < np.mean([variant == 0 for _, variant in drawn]) < 0.6


def test_captions_kept_are_those_of_the_pictures_drawn(emoji, tmp_path, tiny_encoder):
    data = EmojiSet(emoji)
    plain = [[description for description, _ in recipe.arrangements(data, i)] for i in range(len(data))]
    seen = recipe.Features(np.zeros((6, 5, 16, 6, 6), np.float16), None, plain)
    kept = recipe.read_captions(seen, tiny_encoder, tmp_path)
    assert np.abs(kept[4, 0] - tiny_encoder(["green disc, noto style"])[0].numpy()).max() < 1e-2
    assert np.abs(kept[4, 1] - tiny_encoder(["round, green, noto style"])[0].numpy()).max() < 1e-2
    for drawn in [(4, 0), (5, 1), (0, 4)]:
        seats = {recipe._captioned([drawn], random.Random(seed))[0] for seed in range(50)}
        assert seats == {(drawn[0], c) for c, about in enumerate(recipe.CAPTIONS) if about == drawn[1]}


@pytest.fixture
def marked():
    """A text encoder whose blocks but the last do what they may, in the scale that they have after training."""
    torch.manual_seed(0)
    encoder = TextEncoder(recipe.TEXT_ENCODER).requires_grad_(False).eval()
    for block in encoder.tower.transformer.resblocks[:-1]:
        block.mlp.c_proj.weight.mul_(300)
    recipe.mark_ends(encoder)
    return encoder


def test_only_the_end_token_is_marked_whatever_blocks_do(marked):
    one, other = recipe.MARKED
    states = []
    last = marked.tower.transformer.resblocks[-1]
    last.register_forward_hook(lambda m, arguments, output: states.append(arguments[0]))
    marked(["a slice of pizza", "ghost"])
    (x,) = states
    difference = x[..., one] - x[..., other]
    for row, end in enumerate((5, 2)):
        assert difference[row, :end].abs().max() < 1e-4
        assert difference[row, end].item() == pytest.approx(recipe.MARK, rel=1e-2)
    assert x.norm(dim=-1).mean() > 100


def test_attention_brings_the_end_tokens_state(marked):
    block = marked.tower.transformer.resblocks[-1]
    recipe._bring_ends(block.attn)
    normed, brought = [], []
    block.ln_1.register_forward_hook(lambda m, arguments, output: normed.append(output))
    block.attn.register_forward_hook(lambda m, arguments, output: brought.append(output[0]))
    marked(["a slice of pizza"])
    expected = recipe.BROUGHT * normed[0][0, 5]
    assert ((brought[0][0, 5:] - expected).norm(dim=-1) / expected.norm()).max() < 1e-2


def test_an_mlp_tells_each_seat_its_own_channels():
    torch.manual_seed(0)
    count, seats, width, channels = 400, 6, 48, 4
    codes = torch.linalg.qr(torch.randn(width, seats))[0].T
    content = torch.randn(count, width // 2) @ torch.linalg.qr(torch.randn(width, width // 2))[0].T
    states = F.layer_norm(30 * codes + content[:, None], (width,))
    maps = torch.randn(seats, width, channels) / 8
    missing = torch.einsum("nsw,swc->nsc", states, maps) - torch.einsum("sw,swc->sc", states.mean(dim=0), maps)
    mlp = TextEncoder(TextEncoderConfig(width=width, layers=1, heads=1)).tower.transformer.resblocks[0].mlp
    recipe._silence(mlp.c_proj)
    directions = recipe.TELLING * torch.linalg.qr(torch.randn(width, channels))[0].T
    recipe._switch_on(mlp, states, missing, directions)
    added = mlp(states) @ directions.T / recipe.TELLING**2
    assert (added - missing).square().mean() < 1e-2 * missing.square().mean()


def test_what_is_brought_does_not_blur_what_is_told(emoji, marked, monkeypatch):
    data = EmojiSet(emoji)
    names = [plain_caption(entry["name"], entry["style"]) for entry in data.entries]
    monkeypatch.setattr(recipe, "OBSERVED", 2)
    monkeypatch.setattr(recipe.Features, "captions", lambda self, drawn, generator: [names[i] for i, _ in drawn])
    plain = [[description for description, _ in recipe.arrangements(data, i)[:2]] for i in range(len(data))]
    latents = np.random.default_rng(0).normal(size=(6, 1, 16, 6, 6)).astype(np.float16).repeat(2, axis=1)
    recipe.place(marked, recipe.Features(latents, None, plain))
    last = marked.tower.transformer.resblocks[-1]
    told = []
    last.register_forward_hook(
        lambda m, arguments, output: told.append(output[:, -36:] @ last.mlp.c_proj.weight[:, :16])
    )
    marked(names)
    told = 2 * told[0] / recipe.TELLING**2
    truth = torch.from_numpy(latents[:, 0]).float().flatten(2).mT
    assert (told - truth).square().mean() < 0.05
