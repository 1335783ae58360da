"""Recognition counts the pictures that show what their prompts ask for."""

import pytest

from wuerstchen_core import WuerstchenError
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.mini.recognition import check_prompts, plain_prompts, recognition


def test_the_right_picture_counts_and_another_of_its_style_does_not(emoji):
    data = EmojiSet(emoji)
    prompts = plain_prompts(data, 6)
    assert len(set(prompts)) == 6 and plain_prompts(data, 3) == prompts[:3]
    names = [f"{entry['name']}, {entry['style']} style" for entry in data.entries]
    pictures = [data.plain(names.index(prompt)) for prompt in prompts]
    score = recognition(data)
    assert score(pictures, prompts).tolist() == [1] * 6
    red, green = (next(i for i, one in enumerate(prompts) if one.startswith(name)) for name in ("red", "green"))
    assert score([pictures[red], pictures[green]], [prompts[green], prompts[red]]).tolist() == [0, 0]


def test_what_names_no_emoji_is_refused(emoji):
    data = EmojiSet(emoji)
    check_prompts(data, plain_prompts(data, 6))
    with pytest.raises(WuerstchenError, match="'a cat' names no emoji"):
        check_prompts(data, ["a cat"])
    with pytest.raises(WuerstchenError, match="--limit is 7"):
        plain_prompts(data, 7)
