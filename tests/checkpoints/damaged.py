"""Damaged files of weights, of the twenty-one kinds that harmed a loader once; made from a seed."""

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

import wuerstchen_core as w
from tests.checkpoints.small import LORA, networks

NUMBERS = (0, -1, 1, 3, 2**20, 10**9, 2**31, 2**63, 2**64, 10**400, -(2**63), 1.5, float("nan"), float("inf"), 1e308)
VALUES = (*NUMBERS, None, True, "16", "", [], {}, [1], [[]], {"a": 1}, "x" * 10**5, [32] * 10**5)


class Damage:
    """`make(category)` writes a damaged file and gives its path and whose loader is to read it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw, self.count = folder, random.Random(seed), 0
        self.whole = folder / "whole"
        if not self.whole.exists():
            self.whole.mkdir()
            for kind, network in networks().items():
                w.save(network, self.whole / f"{kind}.safetensors")
            save_file(self._lora(), self.whole / "lora.safetensors", {"lora_adapter_metadata": '{"lora_alpha": 3}'})

    def make(self, category: str) -> tuple[Path, str]:
        self.count += 1
        self.kind = self.draw.choice(["stage_a", "stage_b", "stage_c", "semantic_compressor", "previewer"] * 3 +
                                     ["text_encoder"])  # fmt: skip
        self.path = self.folder / f"{self.count}.safetensors"
        CATEGORIES[category](self)
        return self.path, self.kind

    def one_of(self, *values):
        return self.draw.choice(values)

    def content(self) -> bytearray:
        return bytearray((self.whole / f"{self.kind}.safetensors").read_bytes())

    def parts(self) -> tuple[dict, bytes]:
        content = self.content()
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end]), bytes(content[end:])

    def tensors(self) -> dict:
        return load_file(self.whole / f"{self.kind}.safetensors")

    def metadata(self) -> dict:
        return self.parts()[0]["__metadata__"]

    def write(self, header: dict | bytes, body: bytes, length: int | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)

    def write_pt(self, content) -> None:
        self.path = self.path.with_suffix(".pt")
        torch.save(content, self.path)

    def flip(self, content: bytearray, start: int, end: int) -> None:
        for _ in range(self.one_of(1, 1, 2, 20)):
            content[self.draw.randrange(start, end)] ^= 1 << self.draw.randrange(8)
        self.path.write_bytes(content)

    def published(self) -> dict:
        """Stage C under the names of diffusers, without a configuration."""
        self.kind = "stage_c"
        return self.tensors()

    def _lora(self) -> dict:
        generator = torch.Generator().manual_seed(1)
        return {
            f"prior.blocks.{block}.attention.to_{name}.lora_{half}.weight": torch.randn(shape, generator=generator)
            for block in (2, 5) for name in "qkv" for half, shape in (("A", (2, 64)), ("B", (64, 2)))
        }  # fmt: skip


def header_length(it: Damage) -> None:
    content = it.content()
    true = int.from_bytes(content[:8], "little")
    lie = it.one_of(0, 1, 2, true - 1, true + 1, true * 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, len(content))
    it.path.write_bytes(lie.to_bytes(8, "little") + content[8:])


def truncated_or_appended(it: Damage) -> None:
    content = it.content()
    if it.one_of(True, False):
        it.path.write_bytes(content[: it.draw.randrange(len(content))])
    else:
        it.path.write_bytes(content + bytes(it.draw.randrange(1, 5000)))


def flips_in_header(it: Damage) -> None:
    content = it.content()
    it.flip(content, 0, 8 + int.from_bytes(content[:8], "little"))


def flips_in_body(it: Damage) -> None:
    content = it.content()
    it.flip(content, 8 + int.from_bytes(content[:8], "little"), len(content))


def flips_in_pt(it: Damage) -> None:
    it.write_pt({"state_dict": it.published()})
    content = bytearray(it.path.read_bytes())
    it.flip(content, 0, it.one_of(len(content), 20_000))


def offsets(it: Damage) -> None:
    header, body = it.parts()
    name = it.draw.choice([name for name in header if name != "__metadata__"])
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = it.one_of(
        [end, start], [start, start], [start, end + 4], [0, len(body)], [-1, end], [start, 2**63], [2**64, 2**65],
        [start], [], None, "0", [start, end, end], [float(start), end], [start + 4, end + 4], [True, end],
    )  # fmt: skip
    it.write(header, body)


def dtype_names(it: Damage) -> None:
    header, body = it.parts()
    names = [name for name in header if name != "__metadata__"]
    for name in names if it.one_of(True, False) else [it.draw.choice(names)]:
        header[name]["dtype"] = it.one_of(
            "F16", "BF16", "I32", "U32", "F64", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", "f32", "", None, 3, ["F32"],
            "\x1b]52;c;eA==\x07", "F32\n" * 1000, "F" * 10**6,
        )  # fmt: skip
    it.write(header, body)


def header_json(it: Damage) -> None:
    header, body = it.parts()
    text = json.dumps(header)
    it.write(
        it.one_of(
            text[:-1], text + "}", "[]", "{}", "null", '"x"', text.replace(":", ";", 1), "[" * 10**5, '{"a":' * 10**5,
            text.replace("{", '{"x": NaN, ', 1), text.replace("{", '{"x": {}, ', 1), text[:50] + "\x00" + text[50:],
            text.replace("{", '{"__metadata__": {"a": 1}, ', 1), text.replace('"shape": [', '"shape": [1e400, ', 1),
            text.replace('"shape": [', '"shape": [' + "9" * 5000 + ", ", 1), "{" + " " * 10**5 + text[1:],
        ).encode() + it.one_of(b"", b"", b"\xff", b"\xed\xa0\x80"),
        body,
    )  # fmt: skip


def duplicate_keys(it: Damage) -> None:
    header, body = it.parts()
    name = it.draw.choice(list(header))
    it.write(f"{{{json.dumps(name)}: {json.dumps(header[name])}, {json.dumps(header)[1:]}".encode(), body)


def names(it: Damage) -> None:
    tensors = it.published()
    name = it.one_of(
        "blocks.999999999.kv_mapper.1.weight", "blocks.99.kv_mapper.1.weight", f"blocks.{'9' * 5000}.mapper.weight",
        "down_blocks.999999999.0.depthwise.weight", "up_blocks.0.99999999.gammas", "backbone.100000.0.block.0.0.weight",
        "encoder.layers.999999999.layer_norm1.weight", "effnet_mappers.88888888.weight", "a" * 10**5, "", ".", "..",
        "\x1b[2J\x1b]0;x\x07", "line\nline", "blocks.0.\u202egpj.exe", "p." * 1000 + "blocks.0.kv_mapper.1.weight",
        "blocks.-1.kv_mapper.1.weight", "blocks.٣.kv_mapper.1.weight", "\ud800"[:0] + "blocks.0.\x00",
    )  # fmt: skip
    many = it.one_of(0, 0, 0, 3000)
    tensors |= {f"p{i}.blocks.0.kv_mapper.1.weight": torch.zeros(1) for i in range(many)}
    tensors |= {f"down_blocks.{i}.0.gammas": torch.zeros(1) for i in range(many)}
    it.kind = it.one_of("stage_a", "stage_b", "stage_c", "semantic_compressor", "text_encoder")
    it.path.write_bytes(save(tensors | {name: torch.zeros(1)}))


def tensors_wrong(it: Damage) -> None:
    tensors, metadata = it.tensors(), it.metadata()
    name = it.draw.choice(list(tensors))
    tensor = tensors[name]
    change = it.one_of("missing", "renamed", "misshaped", "surplus", "last blocks", "empty", "transposed")
    if change != "surplus":
        del tensors[name]
    if change == "last blocks":
        tensors = {key: value for key, value in tensors.items() if key.split(".")[:2] != name.split(".")[:2]}
    more = {
        "renamed": {name + "x": tensor},
        "misshaped": {name: torch.zeros(3, *tensor.shape)},
        "surplus": {name + ".more": tensor.clone()},
        "empty": {name: torch.zeros(0, *tensor.shape[1:])},
        "transposed": {name: tensor.movedim(0, -1).contiguous() if tensor.dim() else tensor[None]},
    }
    save_file(tensors | more.get(change, {}), it.path, it.one_of(metadata, metadata, {}))


def pt_structures(it: Damage) -> None:
    weights = it.published()
    name = it.draw.choice(list(weights))
    tensor = weights[name]
    itself: dict = {}
    itself["itself"] = itself
    laughs: object = {"x": torch.zeros(1)}
    for _ in range(40):
        laughs = {"a": laughs, "b": laughs}
    deep: object = torch.zeros(1)
    for _ in range(150):
        deep = {"d": deep}
    odd = it.one_of(
        tensor.to_sparse() if tensor.dim() else tensor, torch.empty(tensor.shape, device="meta"), tensor.int(),
        torch.zeros(1).expand(tensor.shape), torch.zeros(10**6).as_strided(tensor.shape, [1] * tensor.dim()),
        torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), tensor.bool(), tensor.to(torch.complex64), None,
        "text", [tensor], tensor.numpy().tolist(), torch.nn.Parameter(tensor),
    )  # fmt: skip
    it.write_pt(
        it.one_of(
            itself,
            laughs,
            deep,
            [weights],
            {1: weights},
            {("a", "b"): weights},
            {"a" * 10**5: weights},
            *[weights | {name: odd}] * 12,
        )  # fmt: skip
    )


def zips(it: Damage) -> None:
    it.write_pt(it.published())
    with zipfile.ZipFile(it.path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = it.draw.choice(list(records))
    change = it.one_of("deflated", "bomb", "missing", "renamed", "other size", "twice", "no crc", "empty", "big-endian")
    deflate = change in ("deflated", "bomb")
    if change == "missing":
        del records[name]
    elif change == "renamed":
        records["../" + name] = records.pop(name)
    elif change == "bomb":
        records[it.one_of(name, next(iter(records)))] = bytes(50 << 20)
    elif change == "other size":
        records[name] += it.one_of(b"x", bytes(1000))
    elif change == "empty":
        records[name] = b""
    elif change == "big-endian":
        records[next(iter(records)).split("/")[0] + "/byteorder"] = b"big"
    with zipfile.ZipFile(it.path, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for key, value in records.items():
            archive.writestr(key, value)
        if change == "twice":
            archive.writestr(zipfile.ZipInfo(name.upper()), records[name])


def raw_pickles(it: Damage) -> None:
    content = pickle.dumps(it.one_of({"a": 1}, [1] * 10**4, "x" * 10**5, {"state_dict": {}}), it.one_of(2, 4, 5))
    far = b"\xff\xff\xff\x7f"  # 2**31 - 1
    hostile = (
        *(b"\x80\x02\x8b" + far + b".", b"\x80\x02r" + far + b".", b"\x80\x02Nr" + far + b"."),
        *(b"\x80\x02X" + far + b"x.", b"\x80\x04\x95" + b"\xff" * 8 + b".", b"\x80\x02" + b"(" * 10**5 + b"."),
    )
    it.path = it.path.with_suffix(".pt")
    it.path.write_bytes(it.one_of(content, content[:-1], *hostile))


def file_system(it: Damage) -> None:
    content = it.content()
    what = it.one_of("pipe", "folder", "folder in it", "device", "long", "zero", "loop", "gone", "sparse", "slash")
    if what == "pipe":
        os.mkfifo(it.path)
    elif what == "folder":
        it.path.mkdir()
    elif what == "folder in it":
        (it.path / "model.safetensors").mkdir(parents=True)
    elif what == "device":
        it.path = Path(it.one_of("/dev/zero", "/dev/null"))
    elif what == "long":
        it.path = it.folder / ("n" * 300)
    elif what == "zero":
        it.path = it.folder / "a\0b"
    elif what == "loop":
        it.path.symlink_to(it.path)
    elif what == "sparse":
        it.path.write_bytes(content)
        os.truncate(it.path, 4 << 30)
    elif what == "slash":
        it.path.write_bytes(content)
        it.path = it.path / "model.safetensors"


class Code:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def code(it: Damage) -> None:
    content = {"state_dict": it.published(), "extra": Code(it.folder / "ran")}
    it.path = it.path.with_suffix(".pt")
    if it.one_of(True, False):
        torch.save(content, it.path, _use_new_zipfile_serialization=it.one_of(True, False))
    else:
        it.path.write_bytes(pickle.dumps(content))


def loras(it: Damage) -> None:
    it.kind, whole = LORA, it._lora()
    pattern = it.one_of(r"([\w.]+)+!", r"(a+)+$", "(" * 500, "x" * 10**5, ".*" * 100, "to_q", None, 3)
    config = it.one_of(
        {"lora_alpha": it.one_of(*VALUES)}, {"alpha_pattern": {pattern: 4}}, {"alpha_pattern": it.one_of(*VALUES)},
        {"alpha_pattern": {f"{i}.*.*x": 1 for i in range(5000)}}, {"use_rslora": it.one_of(*VALUES)},
    )  # fmt: skip
    text = it.one_of(*[json.dumps(config)] * 6, "[" * 10**5, '{"a":' * 10**5, "{", "\x00", "")
    name = it.draw.choice(list(whole))
    tensor = it.one_of(
        torch.zeros(0), torch.zeros(()), torch.zeros(2, 64, dtype=torch.int8), torch.full((2, 64), torch.inf),
        torch.zeros(3, 7), torch.zeros(2, 64, dtype=torch.complex64), torch.full((2, 64), 1e38),
    )  # fmt: skip
    if it.one_of(True, False, False):
        save_file(whole | {name: tensor}, it.path)
    elif it.one_of(True, False):
        save_file(whole, it.path, {"lora_adapter_metadata": text})
    else:
        it.path = it.path.with_suffix("")
        it.path.mkdir()
        save_file(whole, it.path / "adapter_model.safetensors")
        beside = it.path / "adapter_config.json"
        it.one_of(lambda: beside.write_text(text), lambda: os.mkfifo(beside), lambda: beside.mkdir(),
                  lambda: beside.symlink_to("/dev/zero"), lambda: beside.write_bytes(b"\xff\xfe\x00"))()  # fmt: skip


def pickle_numbers(it: Damage) -> None:
    """The numbers of a .pt's pickle, which are shapes, strides and sizes of storages."""
    it.write_pt(it.published())
    with zipfile.ZipFile(it.path) as archive:
        records = {entry.filename: bytearray(archive.read(entry)) for entry in archive.infolist()}
    pickled = next(value for key, value in records.items() if key.endswith("data.pkl"))
    places = [i for i, byte in enumerate(pickled[:-2]) if byte in b"KM"]
    for place in it.draw.sample(places, it.one_of(1, 3)):
        pickled[place + 1] = it.one_of(0, 1, 255, 7)
    with zipfile.ZipFile(it.path, "w") as archive:
        for key, value in records.items():
            archive.writestr(key, bytes(value))


def metadata_lies(it: Damage) -> None:
    header, body = it.parts()
    told = json.loads(header["__metadata__"]["wuerstchen"])
    field = it.draw.choice([*told["config"], "colour"])
    value = told["config"].get(field)
    if isinstance(value, list) and it.one_of(True, False):
        value = it.one_of(value[:-1], value * 2, value * 10**5, [*value[:-1], it.one_of(*VALUES)], value[::-1])
    elif isinstance(value, dict) and it.one_of(True, False):
        value = value | {it.draw.choice([*value, "x"]): it.one_of(*VALUES)}
    else:
        value = it.one_of(*VALUES)
    text = json.dumps(told | {"config": told["config"] | {field: value}})
    headers = (
        {"network": it.one_of(*VALUES), "config": {}},
        {"network": "text_encoder"},
        {"config": it.one_of(*VALUES)},
    )
    others = ["[" * 10**5, "{", "[]", "3", *(json.dumps(told | header) for header in headers)]
    header["__metadata__"]["wuerstchen"] = it.one_of(*[text] * 12, *others)
    it.write(header, body)


def not_finite(it: Damage) -> None:
    tensors = it.tensors()
    name = it.draw.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
    tensors[name].view(-1)[it.draw.randrange(tensors[name].numel())] = it.one_of(torch.nan, torch.inf, -torch.inf)
    save_file(tensors, it.path, it.metadata())


def other_numbers(it: Damage) -> None:
    tensors = it.tensors()
    dtype = it.one_of(torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn,
                      torch.float64, torch.float16)  # fmt: skip
    floating = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    for name in it.one_of(floating, [it.draw.choice(floating)]):
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, it.path, it.metadata())


CATEGORIES: dict[str, Callable[[Damage], None]] = {
    make.__name__: make
    for make in (
        *(header_length, truncated_or_appended, flips_in_header, flips_in_body, flips_in_pt, offsets, dtype_names),
        *(header_json, duplicate_keys, names, tensors_wrong, pt_structures, zips, raw_pickles, file_system, code),
        *(loras, pickle_numbers, metadata_lies, not_finite, other_numbers),
    )
}
