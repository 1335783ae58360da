"""The nodes that do without a network."""

import pytest


@pytest.fixture
def empty(run):
    return lambda width=128, height=128, batch_size=1: run(
        "WuerstchenEmptyLatent", width=width, height=height, batch_size=batch_size
    )
