"""Sizes out of range: one clear error."""

import pytest


@pytest.mark.parametrize("side", [120, 130, 0, -8, 4104, 8192])
@pytest.mark.parametrize("name", ["width", "height"])
def test_a_size_out_of_the_nodes_range_is_told_with_that_range(empty, name, side):
    sizes = {"width": 256, "height": 256, name: side}
    message = f"{name} is {side}: it must be a multiple of 8 from 128 to 4096"
    with pytest.raises(ValueError, match=message):
        empty(**sizes)


def test_an_empty_batch_is_refused(empty):
    with pytest.raises(ValueError, match="batch_size is 0"):
        empty(batch_size=0)
