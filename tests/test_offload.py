"""One network at a time on a device: the same pictures, and never more there than is said."""

import contextlib
from dataclasses import replace

import pytest
import torch

from wuerstchen_core import Wuerstchen, WuerstchenError, offload
from wuerstchen_core.checkpoints.sets import find_set
from wuerstchen_core.offload import Offload, bytes_of, must_offload

FEW = {"steps_c": 2, "steps_b": 2, "seed": 3}


def networks(model):
    """By name; both stages share one text encoder."""
    assert model.text_encoder_b is model.text_encoder_c
    roles = ("text_encoder_c", "semantic_compressor", "stage_c", "stage_b", "stage_a")
    return {role: getattr(model, role) for role in roles}


def pointers(network):
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]


@pytest.fixture
def offloaded(tiny):
    """The same networks, whose device is the CPU as well: what works there works on copies."""
    return replace(tiny, offload=Offload("cpu"))


@pytest.mark.parametrize("room", [0, 1 << 50], ids=["no room", "room"])
def test_pictures_are_the_same_and_networks_take_turns(tiny, offloaded, monkeypatch, room):
    monkeypatch.setattr(offload, "free_memory", lambda device: room)
    waiting = {name: pointers(network) for name, network in networks(tiny).items()}
    image = torch.rand(1, 256, 256, 3)
    expected = [tiny.generate("a cat", **FEW), tiny.generate("a cat", image=image, denoise=0.5, cfg_b=2.0, **FEW)]
    order = []

    def at_work(name):
        def hook(*_):
            if order[-1:] != [name]:
                order.append(name)
                there = [other for other, network in networks(tiny).items() if pointers(network) != waiting[other]]
                assert there == [name], "another one is in its place, too"
                assert len(offloaded.offload._coming) == (room > 0 and name != "stage_a")

        return hook

    hooks = [
        module.register_forward_pre_hook(at_work(name))
        for name, network in networks(tiny).items()
        for module in network.modules()
    ]
    try:
        found = [offloaded.generate("a cat", **FEW)]
        assert order == ["text_encoder_c", "stage_c", "stage_b", "stage_a"]
        found.append(offloaded.generate("a cat", image=image, denoise=0.5, cfg_b=2.0, **FEW))
    finally:
        for hook in hooks:
            hook.remove()
    assert order[4:] == ["text_encoder_c", "semantic_compressor", "stage_c", "stage_b", "stage_a"]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {name: pointers(network) for name, network in networks(tiny).items()} == waiting


def test_a_network_goes_to_another_device_and_returns(tiny):
    """torch's meta device is one that a CPU has."""
    network = tiny.stage_a
    weights, before = [weight.clone() for weight in network.parameters()], pointers(network)
    with Offload("meta")(network):
        tensors = [*network.parameters(), *network.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert network.decode(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 3, 32, 32)
    assert pointers(network) == before
    assert all(torch.equal(now, then) for now, then in zip(network.parameters(), weights, strict=True))


def test_after_an_error_all_networks_wait_again(tiny, offloaded, monkeypatch):
    monkeypatch.setattr(offload, "free_memory", lambda device: 1 << 50)
    waiting = {name: pointers(network) for name, network in networks(tiny).items()}

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offloaded.generate("a cat", **FEW, progress=stop)
    assert {name: pointers(network) for name, network in networks(tiny).items()} == waiting
    assert not offloaded.offload._coming


def test_it_is_done_where_memory_is_short(tiny_folder, tiny, monkeypatch):
    whole = bytes_of(*networks(tiny).values())
    assert whole == sum(t.nbytes for n in networks(tiny).values() for t in (*n.parameters(), *n.buffers()))
    assert bytes_of(tiny.stage_a, tiny.stage_a) == bytes_of(tiny.stage_a)
    for free, short in ((whole + offload.RESERVE - 1, True), (whole + offload.RESERVE, False), (None, False)):
        monkeypatch.setattr(offload, "free_memory", lambda device, free=free: free)
        assert must_offload(list(networks(tiny).values()), "cuda") is short
        assert must_offload(list(networks(tiny).values()), "cpu") is False
        model = Wuerstchen.from_folder(tiny_folder, device="meta", offload=None)
        assert (model.offload is not None) is short and model.device.type == "meta"
        assert {weight.device.type for weight in model.stage_c.parameters()} == {"cpu" if short else "meta"}
    paths = find_set(tiny_folder)
    assert Wuerstchen.from_files(**paths).offload is Wuerstchen.from_files(**paths, offload=None).offload is None
    assert Wuerstchen.from_files(**paths, device="meta", offload=True).offload.device.type == "meta"
    with pytest.raises(WuerstchenError, match="offload is set, but the device is the CPU"):
        Wuerstchen.from_files(**paths, offload=True)


class Stream:
    """What a GPU's streams are told."""

    def __init__(self, told, name):
        self.told, self.name = told, name

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")


def test_on_a_gpu_copies_run_beside_the_work(tiny, offloaded, monkeypatch):
    """Without a GPU only the order can be seen: pinned, copied on a stream of its own, waited for, kept."""
    told, pinned = [], set()
    main = Stream(told, "main")

    @contextlib.contextmanager
    def on(stream):
        told.append(f"on {stream.name}")
        yield
        told.append("back")

    def pin(tensor):
        copy = tensor.detach().clone()
        pinned.add(copy.data_ptr())
        return copy

    def record(tensor, stream):
        if told[-1] != f"kept for {stream.name}":
            told.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    monkeypatch.setattr(offload, "free_memory", lambda device: 1 << 50)
    offloaded.offload._stream = Stream(told, "side")
    model = replace(offloaded, stage_a=tiny.stage_a)
    expected = tiny.generate("a cat", **FEW)
    steps = lambda stage, step, count: told.append(f"{stage} {step}")  # noqa: E731
    assert torch.equal(model.generate("a cat", **FEW, progress=steps), expected)
    copied, ready = ["on side", "back"], ["main waits for side", "kept for main"]
    assert told == [
        *copied, *ready, *copied,  # the text encoder, and Stage C while it reads
        *ready, *copied, "Stage C 1", "Stage C 2",
        *ready, *copied, "Stage B 1", "Stage B 2",
        *ready,
    ]  # fmt: skip
    assert all(pointer in pinned for pointer in pointers(tiny.stage_c))
    count = len(pinned)
    model.generate("a cat", **FEW)
    assert len(pinned) == count  # once is enough
