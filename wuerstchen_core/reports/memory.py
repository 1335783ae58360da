"""How much memory work takes: of the process on a CPU, which Linux alone can tell, or of a GPU."""

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..util.errors import WuerstchenError


def peak_growth(work: Callable, device="cpu"):
    """Bytes by which the memory in use grew at most while `work` ran, on its device, and what it returned.

    Raises:
        WuerstchenError: the work is on the CPU and this is not Linux, which alone lets a process follow its peak.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return torch.cuda.max_memory_allocated(device) - before, result
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    except (AttributeError, OSError, TypeError) as error:
        raise WuerstchenError("the peak of memory can be measured on Linux only") from error
    before = _resident("VmRSS")
    result = work()
    return _resident("VmHWM") - before, result


def peak() -> int | None:
    """Bytes of resident memory that the process has had at most; None on Windows, which does not tell Python."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident(field: str) -> int:
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
