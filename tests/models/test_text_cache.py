"""A prompt is encoded once, and again as soon as anything about its encoder is another."""

import pytest
import torch
from torch import nn

from wuerstchen_core.models import text_cache
from wuerstchen_core.models.text_cache import TextCache
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig


class Counting(TextEncoder):
    asked = 0

    def encode_tokens(self, *inputs):
        self.asked += 1
        return super().encode_tokens(*inputs)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return Counting(TextEncoderConfig(width=32, layers=1, heads=2)).eval()


@pytest.fixture
def encoder(built):
    state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    built.asked = 0
    yield built
    built.load_state_dict(state)


def test_a_prompt_is_encoded_once(encoder):
    cache = TextCache()
    for _ in range(3):
        for prompts in (["a cat"], ["a cat", "a dog"], ["a dog", "a cat"]):
            with torch.inference_mode():
                assert torch.equal(cache(encoder, prompts), encoder(prompts))
    assert encoder.asked == 3 + 9


def replaced(encoder):
    encoder.tower.ln_final.weight = nn.Parameter(encoder.tower.ln_final.weight * 1.5)


@torch.no_grad()
def in_place(encoder):
    encoder.tower.ln_final.weight.mul_(1.5)


def behind_autograd(encoder):
    encoder.tower.ln_final.weight.data.mul_(1.5)


def swapped(encoder):
    """The sum stays the same."""
    with torch.no_grad():
        encoder.tower.token_embedding.weight.copy_(encoder.tower.token_embedding.weight.flip(0))


def loaded(encoder):
    encoder.load_state_dict({name: tensor * 1.5 for name, tensor in encoder.state_dict().items()})


def narrowed(encoder):
    encoder.bfloat16().float()


@pytest.mark.parametrize("change", [replaced, in_place, behind_autograd, swapped, loaded, narrowed])
def test_changed_weights_are_noticed(encoder, change):
    cache = TextCache()
    with torch.inference_mode():
        before = cache(encoder, ["a cat"])
    change(encoder)
    with torch.inference_mode():
        after = cache(encoder, ["a cat"])
        assert not torch.equal(after, before) and torch.equal(after, encoder(["a cat"]))


def test_hooks_and_functions_in_its_place_are_asked_each_time(encoder):
    cache, asked = TextCache(), []
    hook = encoder.tower.ln_final.register_forward_hook(lambda module, inputs, output: asked.append(1))
    for _ in range(2):
        cache(encoder, ["a cat"])
    hook.remove()
    assert len(asked) == 2
    for _ in range(2):
        assert cache(lambda prompts: asked.append(2) or prompts, ["a cat"]) == ["a cat"]
    assert asked == [1, 1, 2, 2]


def test_the_oldest_texts_are_forgotten(encoder, monkeypatch):
    monkeypatch.setattr(text_cache, "ENTRIES", 2)
    cache = TextCache()
    for prompt in ("one", "two", "one", "three", "one", "two"):  # "two" goes as "three" comes
        cache(encoder, [prompt])
    assert encoder.asked == 4 and len(cache.entries) == 2
