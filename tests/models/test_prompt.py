"""Emphasis and long prompts."""

import pytest
import torch

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
        ("a :( face", [("a :( face", 1)]),
        ("a :) (red) face", [("a :) ", 1), ("red", 1.1), (" face", 1)]),
        ("( (red) cat", [("( ", 1), ("red", 1.1), (" cat", 1)]),
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
