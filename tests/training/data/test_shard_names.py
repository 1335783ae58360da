"""Names of shards, what may run a command, and the bounds of what a shard keeps in memory."""

import random

import pytest

from tests.pictures import encoded, picture
from tests.training.data.samples import samples_of, take, write_folder, write_shard
from wuerstchen_core import WuerstchenError, cli
from wuerstchen_core.training.data import batches as batches_module
from wuerstchen_core.training.data import shards as shards_module
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.options import DataOptions, check_no_commands
from wuerstchen_core.training.data.shards import Shards, expand, is_shard


@pytest.mark.parametrize(
    "pattern, urls",
    [
        ("shards\\000.tar", ["shards\\000.tar"]),
        ("C:\\data\\{000..001}.tar", ["C:\\data\\000.tar", "C:\\data\\001.tar"]),
        ("C:/data/{0..1}.tar", ["C:/data/0.tar", "C:/data/1.tar"]),
        ("d:x.tgz", ["d:x.tgz"]),
        ("\\\\server\\share\\{a,b}.TAR", ["\\\\server\\share\\a.TAR", "\\\\server\\share\\b.TAR"]),
        ("C:\\a.tar::D:\\b.tar", ["C:\\a.tar", "D:\\b.tar"]),
        ("file:C:\\data\\0.tar", ["file:C:\\data\\0.tar"]),
        ("a/{0..1}.tar.gz", ["a/0.tar.gz", "a/1.tar.gz"]),
    ],
)
def test_windows_paths_of_shards_stay_what_they_are(pattern, urls):
    assert expand(pattern) == urls


@pytest.mark.parametrize("data", ["C:\\pictures", "c:/pictures", "C:", "pictures", "\\\\server\\pictures"])
def test_a_missing_folder_is_told_as_one(data):
    assert not is_shard(data)
    with pytest.raises(WuerstchenError, match="there is no such folder"):
        open_batches(data, 64, 1)


def test_local_shards_are_opened_by_path_or_file_url(tmp_path, monkeypatch):
    """On this system `C:` is a folder's name like any other, so that the opening of Windows paths can be tried."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:").mkdir()
    write_shard(tmp_path / "C:" / "0.tar", samples_of([3]))
    write_shard(tmp_path / "c\\0.tar", samples_of([3]))
    urls = ["C:/0.tar", "c\\0.tar", f"file:{tmp_path}/C:/0.tar", f"file://{tmp_path}/C:/0.tar", "file:C:/0.tar"]
    for url in [*urls, f"file://localhost{tmp_path}/C:/0.tar", "file:///C:/0.tar", "FILE:C:/0.tar"]:
        assert take(1, url, 64, 1)[0]["caption"] == ["picture 3"]


@pytest.mark.parametrize("pattern", ["{0..999999999}.tar", "{0..9999}{0..999}.tar", "{a,b}" * 40 + ".tar",
                                     "{0.." + "9" * 5000 + "}.tar"])  # fmt: skip
def test_far_too_many_shards_are_refused_before_they_are_listed(pattern):
    with pytest.raises(WuerstchenError, match="not the names of shards") as error:
        expand(pattern)
    assert len(str(error.value)) < 500


# Commands


@pytest.mark.parametrize("data", ["pipe:touch ran; cat x.tar", "x.tar::pipe:touch ran", "{pipe,x.tar}:touch ran;x.tar",
                                  "PIPE:touch ran", "${COMMAND}:touch ran;x.tar"])  # fmt: skip
def test_a_configuration_file_runs_no_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_COMMAND", "pipe")
    write_shard(tmp_path / "x.tar", samples_of([1, 2]))
    common = 'folder = "run"\nsize = 64\nbatch = 1\nworkers = 0\nsteps = 1\nbuckets = false\nsample_every = 0\n'
    (tmp_path / "c.toml").write_text(f'data = "{data}"\n' + common)
    assert cli.main(["train", "previewer", "--config", "c.toml"]) == 2
    told = capsys.readouterr().err
    assert "runs a command (pipe:)" in told and "--data" in told and not (tmp_path / "ran").exists()
    assert cli.main(["train", "previewer", "--config", "c.toml", "--data", "pipe:touch ran; cat x.tar"]) == 0
    assert (tmp_path / "ran").exists()


def test_names_that_only_look_like_commands_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pipe:x", 1)
    for data in ("pipe:x", "pipelines/0.tar", "x.tar::pipes/{0..1}.tar", "https://host/pipe:x.tar"):
        check_no_commands({"data": data}, "c.toml")
    check_no_commands({}, "c.toml")


def test_an_empty_name_of_data_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_folder(tmp_path / "pictures", 1))
    for data in ("", "  "):
        assert cli.main(["train", "previewer", "--config", "mini", "--data", data]) == 2
        assert "data is empty" in capsys.readouterr().err
    with pytest.raises(WuerstchenError, match="batch is 0: it must be at least 1"):
        DataOptions(data="x", batch=0)


# Memory


def raw_samples(sizes):
    for number, size in enumerate(sizes):
        yield {"__key__": str(number), "__url__": "x.tar", "png": bytes(size)}


def test_a_stream_is_shuffled_as_webdataset_does():
    from webdataset import shuffle

    raw = list(raw_samples([10] * 2000))
    expected = shuffle(512, initial=512, rng=random.Random(7))(iter(raw))
    assert [s["__key__"] for s in shards_module._shuffled(iter(raw), random.Random(7))] == [
        s["__key__"] for s in expected
    ]


def test_the_buffer_is_bounded_by_bytes(monkeypatch):
    monkeypatch.setattr(shards_module, "SHUFFLED_BYTES", 10_000)
    sizes = [random.Random(1).randrange(1, 6000) for _ in range(200)] + [50_000, 1]
    held = largest = 0

    def watched():
        nonlocal held, largest
        for sample in raw_samples(sizes):
            held += len(sample["png"])
            largest = max(largest, held - len(sample["png"]))
            yield sample

    seen = []
    for sample in shards_module._shuffled(watched(), random.Random(0)):
        held -= len(sample["png"])
        seen.append(sample["__key__"])
    assert sorted(seen, key=int) == [str(number) for number in range(202)] and 5_000 < largest <= 10_000


def test_pictures_waiting_for_their_batch_are_bounded_by_bytes(tmp_path, monkeypatch):
    write_shard(tmp_path / "x.tar", samples_of(range(6), [(64, 64)]))
    monkeypatch.setattr(shards_module, "WAITING_BYTES", 40_000)  # three pictures
    monkeypatch.setattr(shards_module, "WAITING_EACH", 0)
    shards = Shards([str(tmp_path / "x.tar")], [(64, 64)], 3, 0)
    batches = shards.batches(0, 1)
    assert [len(next(batches)) for _ in range(20)] == [3] * 20
    with pytest.raises(WuerstchenError, match="wait for others of their aspect ratio: choose a smaller --batch"):
        next(Shards(shards.urls, shards.buckets, 5, 0).batches(0, 1))


def test_what_is_tried_after_a_bad_batch_is_bounded_by_bytes(tmp_path, monkeypatch):
    bad = [file for number in range(30) for file in ((f"{number}.png", encoded(picture(number))[:7000]),
                                                     (f"{number}.txt", b"bad"))]  # fmt: skip
    write_shard(tmp_path / "x.tar", [*bad, *samples_of([99], [(64, 64)])])
    decoded = []
    decode = batches_module.ShardBatch.load
    monkeypatch.setattr(batches_module.ShardBatch, "load", lambda *arguments: decoded.append(1) or decode(*arguments))
    monkeypatch.setattr(batches_module, "LOOK_AHEAD_BYTES", 3 * 7000)
    monkeypatch.setattr(shards_module, "SHUFFLED", 1)
    with pytest.raises(WuerstchenError, match="not one sample can be read"):
        take(1, tmp_path / "x.tar", 64, 1)
    assert len(decoded) == 5
    monkeypatch.setattr(batches_module, "LOOK_AHEAD_BYTES", 1 << 30)
    assert take(1, tmp_path / "x.tar", 64, 1)[0]["caption"] == ["picture 99"]
