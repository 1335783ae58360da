"""Progress bar, tensorboard logs and samples of a run."""

import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil  # accelerate needs it as well
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ...util.atomic import replacing
from ...util.errors import WuerstchenError, readable
from .task import Task

log = logging.getLogger(__name__)


class Monitor:
    """Shows and writes on the main process, and does nothing on the others.

    What an earlier run has logged after step `first` no longer counts. While it is entered, warnings are printed above
    the progress bar.
    """

    def __init__(self, folder: Path, first: int, steps: int, is_main: bool):
        self.folder, self.first, self.steps, self.is_main = folder, first, steps, is_main
        self._smooth: float | None = None
        self._counted = 0
        self._since = time.perf_counter()

    def __enter__(self) -> "Monitor":
        self._bar = tqdm(
            initial=self.first, total=self.steps, desc=self.folder.name, smoothing=0.05, disable=not self.is_main
        )
        self._entered = ExitStack()
        self._writer = self._opened() if self.is_main else None
        if self.is_main:
            self._entered.enter_context(logging_redirect_tqdm())
            self._entered.callback(setattr, threading, "excepthook", threading.excepthook)
            threading.excepthook = _without_tensorboard(threading.excepthook)
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError:  # a full disk: what ended the run tells of it
                pass
        self._entered.close()

    def _opened(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise WuerstchenError(
                f"training needs tensorboard, which can't be imported ({readable(error)}): pip install -e '.[train]'"
            ) from error
        return SummaryWriter(str(self.folder / "logs"), purge_step=self.first + 1 if self.first else None)

    def advance(self) -> None:
        """One more step is under way."""
        self._counted += 1
        self._bar.update()

    def report(self, losses: Sequence[float], pictures: int, device: torch.device) -> dict[str, float]:
        """Shows the sums of the losses of the last steps, with `pictures` in each, all of which the device has done.

        Returns the speed since the last report, or since `restart`, and the memory in use.
        """
        for loss in losses:
            self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        steps = self._counted / max(time.perf_counter() - self._since, 1e-9)
        seen = {"steps_per_second": steps, "pictures_per_second": steps * pictures, "memory_gib": _memory(device)}
        self._bar.set_postfix_str(
            f"loss={self._smooth:.4f}, {seen['pictures_per_second']:.3g} pictures/s, {seen['memory_gib']:.1f} GiB",
            refresh=False,
        )
        self.restart()
        return {f"speed/{name}": value for name, value in seen.items()}

    def restart(self) -> None:
        """From now on the time counts for the speed: what came since the last report was no training."""
        self._counted, self._since = 0, time.perf_counter()

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes out what was logged: a checkpoint's steps are to be in the logs."""
        if self._writer is not None:
            self._writer.flush()

    def samples(self, step: int, shown: Task | None) -> None:
        """The task's samples as a grid. If the network can't draw yet, that is logged and the run goes on.

        Raises WuerstchenError if the picture can't be written.
        """
        if shown is None or self._writer is None:
            return
        try:
            with torch.no_grad():
                pictures = shown.samples()
        except WuerstchenError as error:
            log.warning("there are no samples of step %d: %s", step, error)
            return
        if pictures is None:
            return
        grid = _grid(pictures)
        path = self.folder / "samples" / f"{step:07}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as partial:
                Image.fromarray(grid.numpy()).save(partial, format="PNG")
        except OSError as error:
            raise WuerstchenError(f"{path}: could not be written ({error.strerror or error})") from error
        self._writer.add_image("samples", grid.numpy(), step, dataformats="HWC")


def _memory(device: torch.device) -> float:
    """GiB: the most that was in use on a GPU, or what this process has of the computer's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / (1 << 30)
    return psutil.Process().memory_info().rss / (1 << 30)


def _without_tensorboard(hook):
    """Not the traceback of a tensorboard thread that could not write: its error is raised in ours as well."""
    return lambda failed: None if type(failed.thread).__module__.startswith("tensorboard") else hook(failed)


def _grid(pictures: Tensor) -> Tensor:
    """(N, H, W, 3) in [0, 1] -> (rows, columns, 3) bytes, about square; an even number a row keeps pairs together"""
    planes = rearrange(pictures.cpu().float(), "n h w c -> n c h w")
    grid = make_grid(planes, nrow=2 * math.ceil(len(planes) ** 0.5 / 2), padding=4, pad_value=1.0)
    return (rearrange(grid, "c h w -> h w c").clamp(0, 1) * 255).round().byte()
