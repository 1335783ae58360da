"""Runs of a small task, for tests that need processes of their own: this module is imported once, and forked."""

import os
import signal
import socket
import time
from collections import defaultdict
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util
from torch import nn

import wuerstchen_core as w
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.loop import processes, run
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.run import train
from wuerstchen_core.training.loop.task import Task

PLAN = {"steps": 40, "learning_rate": 0.01, "warm_up": 5, "ema_every": 2, "save_every": 6, "log_every": 1}


class Toy(Task):
    """Learns to turn its input round, with all that a resumed run could get wrong: a dropout, BatchNorm, draws."""

    def __init__(self, plain=False, spoil=None, pause=0.0):
        super().__init__()
        torch.manual_seed(0)
        odd = [] if plain else [nn.BatchNorm1d(8), nn.Dropout(0.2)]
        self.network = nn.Sequential(nn.Linear(4, 8), *odd, nn.Linear(8, 4))
        self.spoil, self.pause = spoil or {}, pause

    def forward(self, batch, draws):
        time.sleep(self.pause)
        x = batch["image"] + 0.1 * draws.normal((4,)) + draws.uniform(1)
        factor = self.spoil.get(draws.step, 1.0)
        return {
            "turned": F.mse_loss(self.network(x), batch["image"].flip(1)) * factor,
            "common": 0.1 * self.network(x).square().mean() * draws.common.random(),
        }

    def exported(self):
        return {}


def toy_batches(batch=4, end=None):
    """Pictures of four numbers that follow from the sample's number."""

    def opened(seen, rank, world):
        micro = sum(count for count, _ in seen)
        while micro != end:
            numbers = torch.arange(batch) + (micro * world + rank) * batch
            yield {"image": torch.sin(numbers[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])), "key": [""] * batch}
            micro += 1

    return opened


def run_toy(folder, pause=0.0, **changes):
    train(Toy(pause=pause), Plan(**{**PLAN, **changes}), folder, toy_batches())


def hang_while_saving(folder, nth):
    """The toy's run, which stops for good half-way through writing its `nth` checkpoint, and tells by a file."""
    save, count = torch.save, 0

    def half(state, path):
        nonlocal count
        count += 1
        save(state, path)
        if count == nth:
            os.truncate(path, os.path.getsize(path) // 2)
            (Path(folder) / "hangs").touch()
            time.sleep(1000)

    torch.save = half
    run_toy(folder)


def hang_in_a_step(folder):
    """The toy's run, which stops for good in its first step, and tells by a file."""

    class Hanging(Toy):
        def forward(self, batch, draws):
            (Path(folder) / "hangs").touch()
            time.sleep(1000)

    train(Hanging(), Plan(**PLAN), folder, toy_batches())


def fill_disk(folder):
    """The toy's run, on a disk that is full once a checkpoint is there; what it says goes to the file `told`."""
    import resource

    run_toy(folder, steps=6)
    limit = (Path(folder) / "checkpoint.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run_toy(folder)
    except Exception as error:
        Path(folder, "told").write_text(f"{type(error).__name__}: {error}")


def join_two(rank, port):
    """This process becomes one of two on the CPU, as `accelerate launch` would make it."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}


def run_one_of_two(folder, rank, port):
    """The toy's run as one of two processes; how it ended goes to the file `told0` or `told1`."""
    join_two(rank, port)
    try:
        run_toy(folder, pause=0.02, steps=1000, save_every=5, log_every=20)
    except BaseException as error:
        Path(folder, f"telling{rank}").write_text(f"{type(error).__name__}: {error}")
        os.rename(Path(folder, f"telling{rank}"), Path(folder, f"told{rank}"))
    os._exit(0)  # without waiting for the other


class Counting(Toy):
    """Notes the names of the pictures that each step learns from."""

    def __init__(self, notes):
        super().__init__(plain=True, pause=0.05)
        self.notes = (notes,)

    def forward(self, batch, draws):
        with self.notes[0].open("a") as file:
            file.write(f"{draws.step} {' '.join(batch['key'])}\n")
        colours = F.pad(batch["image"].mean(dim=(2, 3)), (0, 1))
        return super().forward({**batch, "image": colours}, draws)


def count_pictures(folder, shards, notes, steps, rank=0, port=None):
    """A run over indexed shards, two pictures a batch, alone or as one of two processes."""
    if port is not None:
        join_two(rank, port)

    def batches(seen, rank, world):
        index = Path(folder) / "shards"
        return open_batches(shards, 64, 2, buckets=False, first=seen, rank=rank, world=world, index=index)

    train(Counting(Path(notes)), Plan(**{**PLAN, "steps": steps, "save_every": 2}), folder, batches)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_stages(rank, port, stages, sharded=False):
    """Some stages' runs, one after the other, as one of two processes; `stages` are stage -> options."""
    join_two(rank, port)
    if sharded:
        shard()
    for stage, options in stages.items():
        w.train(stage, **options)
    torch.distributed.destroy_process_group()


def shard():
    """From now on runs share their weights, on the CPU too, where accelerate shards nothing by itself."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    made = run.accelerator_for

    def sharding(plan, task):
        accelerator = made(plan, task)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        processes._set_up_sharding(plugin)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator

    run.accelerator_for = sharding


def run_sharded(folder, rank, port, steps):
    """The toy's run as one of two processes that share its weights."""
    join_two(rank, port)
    shard()
    task = Toy(plain=True)
    run.train(task, Plan(**{**PLAN, "steps": steps}), folder, toy_batches(batch=2))
    assert all(hasattr(parameter, "full_tensor") for parameter in task.parameters())
    torch.distributed.destroy_process_group()


def launcher(folder):
    """Starts the toy's run as a launcher does, and waits for it; the run tells how it ended in the file `told`."""
    pid = os.fork()
    if pid:
        Path(folder, "pid").write_text(str(pid))
        os.waitpid(pid, 0)
        return
    made = run.Interrupts
    run.Interrupts = lambda launched: made(launched=True)
    try:
        run_toy(folder, pause=0.02, steps=1000, save_every=1)
    except BaseException as error:
        Path(folder, "telling").write_text(f"{type(error).__name__}: {error}")
        os.rename(Path(folder, "telling"), Path(folder, "told"))
    os._exit(0)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def process(target, *arguments):
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = context.Process(target=target, args=arguments, daemon=True)
    started.start()
    return started


def logged(folder):
    """tag -> step -> all values that tensorboard's logs have for it, in the order of writing; without the speed."""
    values = defaultdict(lambda: defaultdict(list))
    for path in sorted((Path(folder) / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name != "images" and not value.tag.startswith("speed/"):
                    values[value.tag][event.step].append(tensor_util.make_ndarray(value.tensor).item())
    return {tag: dict(steps) for tag, steps in values.items()}
