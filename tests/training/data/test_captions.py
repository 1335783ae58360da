"""Captions as other trainers and data sets write them, and pictures that have none."""

import json
import os

import pytest

from tests.pictures import encoded, picture
from tests.training.data.samples import take, write_shard
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data import shards as shards_module
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.options import DataOptions

PNG = encoded(picture(0))

FILES = {
    "a.txt": "a cat\n",
    "a.TXT": "a cat",
    "a.caption": " a cat",
    "a.Caption": "\ufeffa cat",
    "a.png.txt": "a cat",
    "a.png.CAPTION": "a cat",
    "a.json": '{"caption": "a cat", "width": 3}',
    "a.JSON": '{"text": "a cat"}',
    "a.png.json": '{"prompt": "a cat"}',
    "metadata.jsonl": '{"file_name": "b.png", "text": "a dog"}\n\n{"file_name": "a.png", "text": "a cat"}\n',
    "Metadata.JSONL": '\ufeff{"file_name": "./a.png", "prompt": "a cat"}',
    "metadata.csv": 'file_name,text\r\nb.png,a dog\r\na.png,"a cat"\r\n',
}


def write_one(folder, name="a.png", **files):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(PNG)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    return folder


def captions_of(data, count=1, **options):
    batches = take(count, data, 64, 1, **options)
    assert not any(batch["skipped"] for batch in batches)
    return {batch["key"][0].rpartition("/")[2]: batch["caption"][0] for batch in batches}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("inside", ["", "sub/deep/"])
def test_a_folders_captions_are_found_whatever_their_files_names(tmp_path, name, inside, caplog):
    write_one(tmp_path / "d", f"{inside}a.png", **{inside + name: FILES[name]})
    assert captions_of(tmp_path / "d", captions="required") == {"a.png": "a cat"}
    assert not caplog.records


@pytest.mark.parametrize("path", ["train/a.png", "./train/a.png", "train\\\\a.png", "train/../train/a.png"])
def test_a_metadata_file_names_pictures_from_its_own_folder(tmp_path, path):
    write_one(tmp_path, "train/a.png", **{"metadata.jsonl": f'{{"file_name": "{path}", "text": "a cat"}}'})
    assert captions_of(tmp_path) == {"a.png": "a cat"}
    absolute = write_one(tmp_path / "x", **{"metadata.jsonl": json.dumps({"image_path": str(tmp_path / "x/a.png"),
                                                                          "caption": "a dog"})})  # fmt: skip
    assert captions_of(absolute) == {"a.png": "a dog"}


def test_of_several_captions_the_nearest_file_counts_and_with_a_key_the_json(tmp_path):
    below = {"metadata.jsonl": '{"file_name": "s/a.png", "text": "far", "long": "key"}',
             "s/metadata.csv": "file_name,text,long\na.png,near,long"}  # fmt: skip
    folder = write_one(tmp_path, "s/a.png", **below)
    assert captions_of(folder) == {"a.png": "near"} and captions_of(folder, caption_key="long") == {"a.png": "long"}
    write_one(folder, "s/a.png", **{"s/a.json": '{"long": "of its own", "text": "json"}'})
    assert captions_of(folder) == {"a.png": "json"} and captions_of(folder, caption_key="text") == {"a.png": "near"}
    write_one(folder, "s/a.png", **{"s/a.txt": "plain"})
    assert captions_of(folder) == {"a.png": "plain"} and captions_of(folder, caption_key="long") == {"a.png": "long"}
    write_one(folder, "s/a.png", **{"s/a.png.txt": "its own"})
    assert captions_of(folder) == {"a.png": "its own"}


def test_bad_rows_of_a_metadata_file_are_counted_and_the_others_used(tmp_path, caplog):
    rows = ['{"file_name": "a.png", "text": "a cat"}', "{", '{"text": "no name"}', '["a.png"]', "[" * 100_000,
            '{"file_name": "b.png", "text": 3}', '{"file_name": "c.png", "text": "\\ud800"}', "\udcff"]  # fmt: skip
    folder = write_one(tmp_path / "d")
    (folder / "metadata.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    assert captions_of(folder) == {"a.png": "a cat"}
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == [
        f"{folder / 'metadata.jsonl'}: 7 rows can't be used"
    ]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,a cat\nb.png,caf\xe9\n")
    captions_of(folder)
    assert "metadata.csv: 1 row can't be used" in caplog.text
    long = "x" * 200_000
    (folder / "metadata.csv").write_text(f"file_name,text\nb.png,{long}\na.png,a cat\n")
    assert captions_of(folder) == {"a.png": "a cat"}
    assert "1 row can't be used; row 1: it can't be read as CSV" in caplog.text


@pytest.mark.parametrize("content", [b'{"caption": 3}', b"{", b"[" * 100_000, b'{"text": "\\ud800"}', b"\xff{}"])
def test_a_caption_that_is_not_text_makes_a_bad_sample(tmp_path, content, caplog):
    write_one(tmp_path, "b.png", **{"b.txt": "good"})
    write_one(tmp_path)
    (tmp_path / "a.json").write_bytes(content)
    for data in (tmp_path, write_shard(tmp_path / "x.tar", [("a.png", PNG), ("a.json", content), ("b.png", PNG),
                                                            ("b.txt", b"good")])):  # fmt: skip
        assert {caption for batch in take(4, data, 64, 1) for caption in batch["caption"]} == {"good"}
    assert sum("skipped a.png: " in message for message in caplog.messages) == 1
    assert all(len(message) < 500 and "\n" not in message for message in caplog.messages)


def test_a_caption_file_without_end_is_not_read(tmp_path, caplog):
    write_one(tmp_path, "b.png", **{"b.txt": "good"})
    write_one(tmp_path)
    with open(tmp_path / "a.txt", "wb") as file:
        os.truncate(file.fileno(), 1 << 33)
    assert {batch["caption"][0] for batch in take(4, tmp_path, 64, 1)} == {"good"}
    assert "skipped a.png: a.txt has more than 1048576 bytes" in caplog.text


# Pictures without a caption


def test_missing_captions_are_counted_before_the_first_batch(tmp_path, caplog):
    for number in range(7):
        write_one(tmp_path, f"{number}.png", **({f"{number}.txt": "a cat"} if number % 3 == 0 else {}))
    (tmp_path / "4.json").write_text('{"likes": 3}')
    for captions in ("optional", "required"):
        open_batches(tmp_path, 64, 1, captions=captions)
        assert caplog.messages == ["4 of 7 pictures have no caption and are learned with an empty one, such as 1.png"]
        caplog.clear()
    open_batches(tmp_path, 64, 1, captions="unused")
    assert not caplog.messages


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_folder_without_any_caption_is_refused_where_they_are_needed(tmp_path, content, caplog):
    for number in range(3):
        write_one(tmp_path, f"{number}.png", **({} if content is None else {f"{number}.txt": content}))
    with pytest.raises(WuerstchenError, match="none of its 3 pictures has a caption .*--allow-empty-captions true"):
        open_batches(tmp_path, 64, 1, captions="required")
    assert captions_of(tmp_path, count=3, captions="optional") == {f"{number}.png": "" for number in range(3)}
    options = DataOptions(data=str(tmp_path), size=64, batch=1, workers=0)
    with pytest.raises(WuerstchenError, match="none of its 3"):
        options.open(0, reads_captions=True)
    next(options.open(0))
    next(DataOptions(data=str(tmp_path), size=64, workers=0, allow_empty_captions=True).open(0, reads_captions=True))


# Shards


@pytest.mark.parametrize("name", [name for name in FILES if not name.lower().startswith("metadata")])
def test_a_shards_captions_are_found_whatever_their_files_names(tmp_path, name, caplog):
    caption = (name, FILES[name].encode())
    for files in ([("a.png", PNG), caption], [caption, ("a.png", PNG)]):
        assert captions_of(write_shard(tmp_path / "x.tar", files), captions="required") == {"a": "a cat"}
    assert not caplog.records


@pytest.mark.parametrize("order", ["pictures first", "captions first", "reversed"])
def test_captions_that_do_not_follow_their_pictures_find_them(tmp_path, order):
    pictures = [(f"{number}.png", encoded(picture(number))) for number in range(9)]
    texts = [(f"{number}.txt", f"picture {number}".encode()) for number in range(9)]
    files = {"pictures first": pictures + texts, "captions first": texts + pictures,
             "reversed": pictures + texts[::-1]}[order]  # fmt: skip
    expected = {str(number): f"picture {number}" for number in range(9)}
    assert captions_of(write_shard(tmp_path / "x.tar", files), count=9, captions="required") == expected


def test_pictures_wait_for_captions_in_bounded_memory(tmp_path, monkeypatch, caplog):
    pictures = [(f"{number}.png", encoded(picture(number))) for number in range(9)]
    monkeypatch.setattr(shards_module, "PENDING_BYTES", sum(len(content) + 512 for _, content in pictures[:4]))
    path = write_shard(tmp_path / "x.tar", [*pictures, ("8.txt", b"the last"), ("0.txt", b"too late")])
    seen = {batch["key"][0][-1]: batch["caption"][0] for batch in take(9, path, 64, 1)}
    assert seen == {**{str(number): "" for number in range(8)}, "8": "the last"}


def test_with_a_key_a_shards_json_counts(tmp_path):
    record = json.dumps({"caption": "short", "recaption": "long"}).encode()
    path = write_shard(tmp_path / "x.tar", [("a.jpg", encoded(picture(1), "JPEG")), ("a.txt", b"plain"),
                                            ("a.json", record)])  # fmt: skip
    assert captions_of(path) == {"a": "plain"}
    assert captions_of(path, caption_key="recaption") == {"a": "long"}
    assert captions_of(path, caption_key="other") == {"a": "plain"}


def test_missing_captions_of_shards_are_counted_as_they_come_and_none_at_all_is_refused(tmp_path, caplog):
    bare = [(f"{number}.png", encoded(picture(number))) for number in range(12)]
    write_shard(tmp_path / "0.tar", bare)
    write_shard(tmp_path / "1.tar", [("a.png", PNG), ("a.txt", b"a cat")])
    for workers in (0, 1):
        with pytest.raises(WuerstchenError, match="none of the first 12 pictures in the shards has a caption"):
            open_batches(tmp_path / "0.tar", 64, 1, captions="required", workers=workers)
    take(13, str(tmp_path / "{0..1}.tar"), 64, 1, captions="required")
    told = [message for message in caplog.messages if "so far have no caption" in message]
    assert len(told) == 2 and told[1].startswith("10 of 1") and told[0].startswith("1 of ")
    caplog.clear()
    take(13, tmp_path / "0.tar", 64, 1, captions="unused")
    assert not caplog.messages
    write_shard(tmp_path / "2.tar", [("a.png", PNG), ("a.txt", b" \n")])
    with pytest.raises(WuerstchenError, match="none of the first 1 pictures"):
        open_batches(tmp_path / "2.tar", 64, 1, captions="required")


def test_a_samples_other_files_are_not_read_and_names_are_cut_at_their_first_dot(tmp_path, caplog):
    other = [(f"\u0130.{number}.txt", b"x" * 1000) for number in range(50)]
    files = [("\u0130.png", PNG), *other, ("\u0130.seg.png", b"mask"), ("\u0130.Txt", b"a cat"), ("b_1.5.png", PNG)]
    path = write_shard(tmp_path / "x.tar", files)
    (sample, broken) = shards_module._tar_samples(str(path))
    assert sample.keys() == {"__key__", "__url__", "png", "txt"} and sample["__key__"] == "\u0130"
    assert {batch["caption"][0] for batch in take(3, path, 64, 1)} == {"a cat"}
    assert "x.tar/b_1: there is no picture in it" in caplog.text
