"""Every test in a folder of its own; the LoRAs."""

import pytest

from tests.loras import config, stage_c, style, theirs  # noqa: F401, fixtures


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
