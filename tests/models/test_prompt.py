"""Emphasis and long prompts."""

import random
import time

import pytest
import torch

from wuerstchen_core import WuerstchenError
from wuerstchen_core.models.prompt import parse_emphasis


# ComfyUI's README: parentheses are 1.1, (words:1.2) is 1.2, \( and \) are to be read; the innermost number counts.
@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((red))", [("red", 1.21)]),
        ("(red:1.5) cat", [("red", 1.5), (" cat", 1)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("(a (red) cat:1.5)", [("a ", 1.5), ("red", 1.65), (" cat", 1.5)]),
        ("(a (red:0.5) cat)", [("a ", 1.1), ("red", 0.5), (" cat", 1.1)]),
        ("(16:9)", [("16", 9)]),
        ("(flag: red)", [("flag: red", 1.1)]),
        (r"smile \(happy\)", [("smile (happy)", 1)]),
        (r"(smile \(happy\):1.2)", [("smile (happy)", 1.2)]),
        ("a :( face", [("a :", 1), ("( face", 1)]),
        ("a :) (red) face", [("a :) (red) face", 1)]),
        ("a :) (red) (face)", [("a :) (red) (face)", 1)]),
        (":) ( (red) face", [(":) ( ", 1), ("red", 1.1), (" face", 1)]),
        ("( (red) cat", [("( (red) cat", 1)]),
        ("((red)", [("(red", 1.1)]),
        ("a ((red) (cat:1.5)", [("a ", 1), ("red", 1.65), (" ", 1.5), ("(cat", 1.5)]),
        ("(((red) cat)", [("((red) cat", 1.1)]),
        ("((red:0.5)", [("(red", 0.5)]),
        ("(:2)", [(":2", 1.1)]),
        ("(red:1_0) (cat:1e1)", [("red", 10), (" ", 1), ("cat", 10)]),
        ("(red:)x", [("red:", 1.1), ("x", 1)]),
        (r"((red\)", [("((red)", 1)]),
        ("()", []),
        ("(good code:1.2) or (bad code:0.8)", [("good code", 1.2), (" or ", 1), ("bad code", 0.8)]),
        ("(((red)))", [("red", 1.331)]),
        ("((red:1.2))", [("red", 1.2)]),
        ("((red) cat:0.5)", [("red", 0.55), (" cat", 0.5)]),
        ("(((a:0.5) b:2) c)", [("a", 0.5), (" b", 2), (" c", 1.1)]),
        (r"\((red:1.2)\)", [("(", 1), ("red", 1.2), (")", 1)]),
        (r"\(red:1.2\)", [("(red:1.2)", 1)]),
        (r"(a \(b\) (c:0.5)\::1.5)", [("a (b) ", 1.5), ("c", 0.5), ("\\:", 1.5)]),
        ("(a:1.2:1.3)", [("a:1.2", 1.3)]),
        ("(a:)", [("a:", 1.1)]),
        ("(red:.5) [blue] {green}", [("red", 0.5), (" [blue] {green}", 1)]),
        ("(two\nlines:1.3)", [("two\nlines", 1.3)]),
        ("(猫:1.2)🍕", [("猫", 1.2), ("🍕", 1)]),
    ],
)
def test_emphasis(prompt, parts):
    parsed = parse_emphasis(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in parts]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in parts])


def test_emphasis_moves_a_token_away_from_the_empty_prompt(tiny):
    encoder = tiny.text_encoder_c
    plain, empty, strong = encoder(["a red cat"]), encoder([""]), encoder(["a (red:1.5) cat"])
    expected = plain.clone()
    expected[:, 2] = empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2])  # start, "a", "red"
    torch.testing.assert_close(strong, expected)
    torch.testing.assert_close(encoder(["a (red:1.0) cat"]), plain)


def test_a_long_prompt_goes_on_in_further_chunks_and_no_word_is_cut(tiny):
    encoder = tiny.text_encoder_c
    words = ["wurstchen"] * 40  # several tokens each
    tokens, _ = encoder.tokenize([" ".join(words), "a cat"])
    count = len(encoder.tokenizer.encode("wurstchen"))
    assert count > 1 and tokens.shape[1] > 1
    text = [[token for token in chunk if token < 49406] for chunk in tokens[0].tolist()]
    assert sum(text, []) == encoder.tokenizer.encode(" ".join(words))
    assert all(len(chunk) % count == 0 for chunk in text)
    assert tokens[1, 1:].eq(49407).sum(dim=1).tolist() == [76] * (tokens.shape[1] - 1)
    assert encoder(["a cat"]).shape == (1, 77, 32)


def test_prompt_and_negative_of_different_lengths_go_together(tiny):
    few = {"steps_c": 1, "steps_b": 1, "cfg_b": 2.0}
    long = "a cat and " * 60
    assert torch.isfinite(tiny.generate(long, negative_prompt="a dog", **few)).all()
    assert not torch.equal(tiny.generate(long, **few), tiny.generate(long + "a red mouse", **few))


def test_a_word_longer_than_a_chunk_is_cut(tiny):
    tokens, _ = tiny.text_encoder_c.tokenize(["x" * 1000])
    text = [token for token in tokens.flatten().tolist() if token < 49406]
    assert text == tiny.text_encoder_c.tokenizer.encode("x" * 1000)


def weights_of(text, weight=1.0):
    """ComfyUI's rule in other words: a text is split where its depth leaves or comes back to zero, part by part."""
    parts, part, depth = [], [], 0
    for token in text:
        if token == "(" and depth == 0 and part:
            parts.append(part)
            part = []
        part = [*part, token]
        depth += (token == "(") - (token == ")")
        if token == ")" and depth == 0:
            parts.append(part)
            part = []
    found = []
    parts += [part] if part else []
    for part in parts:
        if part[0] != "(" or part[-1] != ")" or len(part) < 2:
            found.append(("".join(token[-1] for token in part), weight))
            continue
        inside, own = part[1:-1], weight * 1.1
        colon = max((i for i, token in enumerate(inside) if token == ":"), default=0)
        if colon:
            try:
                own = float("".join(inside[colon + 1 :]))
                inside = inside[:colon]
            except ValueError:
                pass
        found += weights_of(inside, own)
    return found


def test_random_texts_are_read_as_comfyui_reads_them():
    chance = random.Random(0)
    tokens = ["(", ")", "(", ")", ":", "1", ".", "5", "a", " ", r"\(", r"\)", "-", "e", "_", "猫"]
    for _ in range(1500):
        text = [chance.choice(tokens) for _ in range(chance.randrange(24))]
        assert parse_emphasis("".join(text)) == weights_of(text), text


@pytest.mark.parametrize(
    "prompt, last",
    [
        ("(" * 1200 + "cat" + ")" * 1200, ("cat", 1.1**1200)),
        ("(a:" + "1" * 20_000 + "x)", ("a:" + "1" * 20_000 + "x", 1.1)),
        ("(a)" * 10_000, ("a", 1.1)),
        ("(" * 60_000 + "cat" + ")" * 5_000, None),
        (")" * 50_000 + "(" * 50_000, (")" * 50_000 + "(" * 50_000, 1.0)),
        ("(" * 5_000 + ":a)" * 5_000, None),
    ],
    ids=["nested", "digits", "many", "open", "closed", "colons"],
)
def test_long_prompts_take_linear_time(prompt, last):
    start = time.process_time()
    parts = parse_emphasis(prompt)
    assert time.process_time() - start < 1
    assert last is None or parts[-1] == (last[0], pytest.approx(last[1]))


@pytest.mark.parametrize("weight", ["inf", "-inf", "nan", "9" * 400, "1e999"])
def test_a_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(WuerstchenError, match="^the weight of 'a:.* in the prompt is"):
        parse_emphasis(f"(a:{weight})")


def test_a_weight_beyond_all_use_is_refused_before_anything_is_encoded(tiny):
    with pytest.raises(WuerstchenError, match="weight of 'cat' in the prompt is 1e.44: it must be from -1000 to 1000"):
        tiny.text_encoder_c(["(cat:" + "9" * 44 + ")"])


def test_private_characters_are_characters():
    assert parse_emphasis("\ue000x\ue001 (a)") == [("\ue000x\ue001 ", 1.0), ("a", 1.1)]


@pytest.mark.parametrize("typed", ["<end_of_text>", "<START_OF_TEXT>", "&lt;end_of_text&gt;"])
def test_the_names_of_special_tokens_are_words(tiny, typed):
    tokens, _ = tiny.text_encoder_c.tokenize([f"a {typed} cat"])
    tokens = tokens.flatten().tolist()
    assert tokens.count(49406) == 1 and tokens.index(49407) == 10
    assert tokens[9] == tiny.text_encoder_c.tokenizer.encode("cat")[0]


def test_a_word_of_any_length_is_read_in_time(tiny):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=20_000)
    start = time.process_time()
    tiny.text_encoder_c.tokenize(["".join(letters)])
    assert time.process_time() - start < 5


@pytest.mark.parametrize("prompts", ["a cat", b"a cat", None, [], (), [None], ["a cat", 3], [["a cat"]], {"a cat": 1}])
def test_prompts_are_a_list_of_texts(tiny, prompts):
    with pytest.raises(WuerstchenError, match="^(a prompt is|prompts are) .* must be"):
        tiny.text_encoder_c(prompts)
