"""How much memory is free, on a device or in the machine."""

from pathlib import Path

import torch


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be taken on a device; None where that cannot be known.

    On a GPU what torch holds without using it counts as free. On the CPU it is the least of what the machine has
    available and what a container's limit leaves; only Linux tells.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_in_machine() if device.type == "cpu" else None


def _free_in_machine(root: Path = Path("/")) -> int | None:
    try:
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        free = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    except (OSError, StopIteration, ValueError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        files = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = next(int(value) for name, value in files if name == "inactive_file")  # given back when it is needed
    except (OSError, StopIteration, ValueError):  # no container, or one without a limit ("max")
        return free
    return max(0, min(free, limit - used + cached))
