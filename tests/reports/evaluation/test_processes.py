"""Several processes share the pictures and find what one finds; an error of one is told by all."""

import torch
from PIL import Image

from tests.pictures import picture
from tests.reports.evaluation.ranks import measure, spectra
from tests.training.runs import free_port, process
from wuerstchen_core.reports.evaluation.reading import score


def test_two_processes_find_what_one_finds(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(11):
        Image.fromarray(picture(number)).save(folder / f"{number:02}.png")
    (folder / "04.png").write_bytes(b"damaged")
    port = free_port()
    ranks = [process(measure, rank, port, str(folder), ["a"] * 11) for rank in range(2)]
    for rank in ranks:
        rank.join(timeout=120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    one = score(folder, {"spectra": spectra([])}, 3)
    results = [torch.load(tmp_path / f"set-{rank}.pt", weights_only=True) for rank in range(2)]
    for found, _, told in results:
        assert torch.equal(found["values"].pop("spectra"), one.values["spectra"])
        assert found == {**vars(one), "values": {}} and len(one.keys) == 10 and "04.png" in one.skipped[0]
        assert "04.png" in told and "prompts need as many pictures" in told  # only the second one meets it
    assert [count for _, count, _ in results] == [6, 4]  # batches 0 and 2, 1 and 3
