"""One of two processes that measure a set; this module is imported in both."""

import torch

from tests.training.runs import join_two
from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.processes import joined
from wuerstchen_core.reports.evaluation.reading import score


def spectra(seen):
    """A scorer whose last bits depend on the batch, which notes how many pictures it got."""

    def scorer(images, captions):
        seen.append(len(images))
        return torch.stack([image.mean(dim=0) for image in images]).flatten(1) @ torch.arange(64.0 * 64).sin()

    return scorer


def measure(rank, port, folder, prompts):
    """Saves what both processes found, how many pictures this one measured, and the error that `prompts` lead to."""
    join_two(rank, port)
    seen, told = [], ""
    with joined("cpu") as share:
        found = score(folder, {"spectra": spectra(seen)}, 3, share=share)
        try:
            score(folder, {"spectra": spectra([])}, 3, prompts=prompts, share=share)
        except WuerstchenError as error:
            told = str(error)
    torch.save((vars(found), sum(seen), told), f"{folder}-{rank}.pt")
