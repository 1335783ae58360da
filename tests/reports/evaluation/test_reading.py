"""Sets are read once and whole, from folders and shards; what can't be read is told."""

import tarfile

import pytest
import torch
from PIL import Image

from tests.pictures import encoded, picture
from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.reading import (
    Scored,
    check_captions,
    hash_of_set,
    read_captions,
    read_prompts,
    score,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(picture(number, (30 + number, 40))).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


def read(data, **options):
    """The mean of each picture and what was asked with it."""
    asked = []

    def scorer(images, captions):
        asked.append((len(images), captions))
        return torch.stack([image.mean() for image in images])

    return score(data, {"mean": scorer}, batch=2, **options), asked


MEANS = [picture(number, (30 + number, 40)).mean() / 255 for number in range(5)]


def test_a_folder_is_read_in_order(folder):
    found, asked = read(folder)
    assert found.keys == list("01234") and [size for size, _ in asked] == [2, 2, 1]
    assert found.values["mean"].numpy() == pytest.approx(MEANS, abs=1e-6)
    assert found.captions == [f"caption {number}" for number in range(5)] == sum((texts for _, texts in asked), [])


def test_shards_are_read_once(folder, tmp_path):
    for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in numbers:
                archive.add(folder / f"{number}.png", f"{number}.png")
                archive.add(folder / f"{number}.txt", f"{number}.txt")
    found, _ = read(str(tmp_path / "{0..1}.tar"))
    assert sorted(zip(found.keys, found.captions, strict=True)) == [(str(i), f"caption {i}") for i in range(5)]
    assert dict(zip(found.keys, found.values["mean"].tolist(), strict=True)) == pytest.approx(
        {str(i): mean for i, mean in enumerate(MEANS)}, abs=1e-6
    )


def test_a_damaged_picture_is_skipped_and_told(folder, caplog):
    (folder / "1.png").write_bytes(encoded(picture(1))[:200])
    found, _ = read(folder)
    assert found.keys == list("0234") and len(found.skipped) == 1 and "1.png" in found.skipped[0]
    assert "1 skipped" in caplog.text


def test_prompts_take_the_place_of_captions(folder):
    found, asked = read(folder, prompts=list("abcde"))
    assert found.captions == list("abcde") and [texts for _, texts in asked] == [["a", "b"], ["c", "d"], ["e"]]
    assert read(folder, prompts=list("abcde"), limit=3)[0].captions == list("abc")


@pytest.mark.parametrize("count", [2, 4, 6])
def test_another_number_of_prompts_is_refused(folder, count):
    with pytest.raises(WuerstchenError, match=f"{count} prompts need as many pictures"):
        read(folder, prompts=["a"] * count)


def test_prompts_do_not_slip_past_a_damaged_picture(folder):
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(WuerstchenError, match="prompts need as many pictures.*1.png"):
        read(folder, prompts=list("abcde"))


def test_what_holds_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for data, says in ((tmp_path, "no picture can be read"), (tmp_path / "none", "no such folder")):
        with pytest.raises(WuerstchenError, match=says):
            read(data)


def test_missing_captions_and_prompts_are_named(tmp_path):
    with pytest.raises(WuerstchenError, match="1 of 2 pictures have no caption, such as b: add b.txt"):
        check_captions("set", Scored(["a", "b"], ["a cat", ""], {}))
    for content in (b"", b"\n \n", b"\xff\xfe\x00"):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(WuerstchenError, match="prompts.txt"):
            read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a\n\n b \n\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a", "", "b"]


def test_the_hash_of_a_set_changes_with_pictures_and_names(folder):
    hashes = {hash_of_set(folder)}
    assert hash_of_set(folder) in hashes
    (folder / "5.png").write_bytes((folder / "4.png").read_bytes())
    hashes.add(hash_of_set(folder))
    (folder / "5.png").rename(folder / "6.png")
    hashes.add(hash_of_set(folder))
    (folder / "6.png").write_bytes(b"damaged")
    hashes.add(hash_of_set(folder))
    assert len(hashes) == 4


def test_captions_are_read_in_the_order_of_the_pictures(folder):
    assert read_captions(folder) == [f"caption {number}" for number in range(5)]
    (folder / "2.txt").unlink()
    with pytest.raises(WuerstchenError, match="2.png: has no caption"):
        read_captions(folder)
