import pytest
from PIL import Image

from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.plots import plotted


def test_a_panel_for_each_axes_at_the_size_asked_for(tmp_path):
    path = tmp_path / "plot.png"
    with plotted(path, panels=2, width=3, height=2) as (left, right):
        left.plot([0, 1], [0, 1])
        right.plot([0, 1], [1, 0])
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (720, 240))


def test_nothing_is_left_of_a_plot_that_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), plotted(tmp_path / "plot.png"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WuerstchenError, match="missing/plot.png"), plotted(tmp_path / "missing" / "plot.png"):
        pass
