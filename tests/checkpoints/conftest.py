"""Published layouts one by one, and the LoRAs."""

import pytest

from tests.checkpoints.published import LAYOUTS, PublishedCompressor
from tests.loras import config, stage_c, theirs  # noqa: F401, fixtures
from tests.reference import randomise


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    kind, build, wrap = LAYOUTS[request.param]
    network = randomise(build()) if build is PublishedCompressor else build()
    return kind, network, wrap
