"""A folder and shards of pictures."""

import pytest

from tests.training.data.samples import samples_of, write_folder, write_shard


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures", 23)


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 6 and 7 samples."""
    for number, numbers in enumerate((range(5), range(5, 11), range(11, 18))):
        write_shard(tmp_path / f"{number}.tar", samples_of(numbers))
    return str(tmp_path / "{0..2}.tar")
