"""A picture's record -> what to ask of `wuerstchen generate`, so that it draws the same picture.

The record comes from a file of anybody's: every value is checked for its type, and files go by their names alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.sets import distilled_name
from ..diffusion.samplers import SAMPLERS
from ..util.checks import shown
from ..util.errors import WuerstchenError
from .drawing import ROLES, SLOTS

TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "sampler", "sampler_b", "schedule", "schedule_b"), str),
    **dict.fromkeys(("device", "dtype", "model", "image", *ROLES), str),
    **dict.fromkeys(
        ("width", "height", "batch_size", "seed", "seed_b", "steps_c", "steps_b", "batch_number", "tile"), int
    ),
    **dict.fromkeys(("cfg_c", "cfg_b", "cfg_rescale", "denoise"), (int, float)),
    "cfg_interval": list,
    "loras": list,
    "distilled": list,
}
FILES = ("model", "image", *ROLES)
OTHERS = {"euler": "ddim"}  # ComfyUI's names -> those of the same samplers here
DEEPEST = 200  # nodes in a row


@dataclass
class Asked:
    """Settings by the names of `Wuerstchen.generate`, the files by their names, and what cannot be the same."""

    settings: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


def settings_of_record(record: Mapping, where: str) -> Asked:
    """The record that `generate` writes. Raises WuerstchenError, which begins with `where`."""
    asked = Asked({})
    for name, value in record.items():
        if name not in TYPES:
            asked.remarks.append(f"it was drawn with {shown(name)}, which this version does not know")
            continue
        asked.settings[name] = _checked(name, value, where)
    if "prompt" not in asked.settings:
        raise WuerstchenError(f"{where}: its record has no prompt")
    return asked


def _checked(name: str, value: object, where: str):
    if not isinstance(value, TYPES[name]) or isinstance(value, bool):
        raise WuerstchenError(f"{where}: its {name} is {shown(value)}, which is of the wrong type")
    if isinstance(value, list) and name != "cfg_interval" and not all(isinstance(one, str) for one in value):
        raise WuerstchenError(f"{where}: its {name} are not texts")
    if name == "loras":
        return [_file_name(lora) for lora in value]  # type: ignore[attr-defined]
    return _file_name(value) if name in FILES else value


def _file_name(text) -> str:
    """The last part of a path of any system; ComfyUI adds the folder in brackets to some."""
    name = Path(re.split(r"[\\/]", re.sub(r" \[[\w ]+\]$", "", text))[-1]).name
    return "" if name == ".." else name


class Source(NamedTuple):
    node_id: str
    kind: str
    inputs: Mapping
    slot: int


def settings_of_graph(graph: Mapping, where: str) -> Asked:
    """A graph in ComfyUI's API format. Raises WuerstchenError, which begins with `where`."""
    found: list[Asked] = []
    refused: list[WuerstchenError] = []
    for node_id, node in graph.items():
        if isinstance(node, dict) and node.get("class_type") == "SaveImage":
            try:
                found.append(_Reader(graph, where).picture(str(node_id)))
            except WuerstchenError as error:
                refused.append(error)
    others = [asked for asked in found if asked.settings != found[0].settings]
    if others:
        raise WuerstchenError(f"{where}: its graph saves several pictures, and nothing says which of them this is")
    if found:
        return found[0]
    raise refused[0] if refused else WuerstchenError(f"{where}: there is no SaveImage in its graph")


class _Reader:
    """Goes from the picture back to what it was made of."""

    def __init__(self, graph: Mapping, where: str):
        self.graph, self.where = graph, where
        self.asked = Asked({})
        self.settings = self.asked.settings
        self.followed = 0

    def picture(self, node_id: str) -> Asked:
        decode = self._source(node_id, "images")
        self._expect(decode, "WuerstchenVQGANDecode", "VAEDecode")
        self._network("stage_a", self._source(decode.node_id, "vae"), ("WuerstchenLoadStageA", "VAELoader"))
        latent = "samples" if decode.kind == "VAEDecode" else "latent"
        semantic = self._stage_b(self._source(decode.node_id, latent))
        self._stage_c(semantic)
        self.settings.setdefault("prompt", "")
        return self.asked

    # Stage B

    def _stage_b(self, sampler: Source) -> Source:
        self._expect(sampler, "WuerstchenStageBSampler", "KSampler")
        self._sampler("b", sampler)
        if sampler.kind == "WuerstchenStageBSampler":
            conditioning = sampler
        else:
            conditioning = self._source(sampler.node_id, "positive")
            self._expect(conditioning, "WuerstchenStageBConditioning")
            for name in ("negative", "latent_image"):
                if self._source(sampler.node_id, name).node_id != conditioning.node_id:
                    raise self._refuse(f"{name} of node {sampler.node_id} is not from its Stage B Conditioning")
            if self._number(sampler, "denoise") != 1:
                raise self._refuse("its Stage B starts from a latent (denoise below 1)")
        self.prompts_b = {
            name: self._text(conditioning, name, "text_encoder_b") if name in conditioning.inputs else None
            for name in ("positive", "negative")
        }
        if self.prompts_b["positive"] is None:
            self.asked.remarks.append("Stage B was given no prompt; generate gives it Stage C's, so details may differ")
        return self._source(conditioning.node_id, "latent")

    # Stage C

    def _stage_c(self, semantic: Source) -> None:
        if semantic.kind in ("WuerstchenStageCSampler", "KSampler"):
            self._sampler("c", semantic)
            denoise = self._number(semantic, "denoise")
            self.settings["prompt"] = self._text(semantic, "positive", "text_encoder_c")
            self.settings["negative_prompt"] = self._text(semantic, "negative", "text_encoder_c")
            start = self._source(semantic.node_id, "latent" if semantic.kind != "KSampler" else "latent_image")
        else:
            denoise, start = 0.0, semantic
            self.settings["sampler"] = self.settings.pop("sampler_b")
            self.settings["prompt"] = self.prompts_b["positive"] or ""
        for name, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
            text = self.prompts_b[name]
            used = name == "positive" or self.settings.get("cfg_b", 1) != 1
            if used and text is not None and text != self.settings.get(ours, ""):
                raise self._refuse(f"its Stage B has another {name} prompt than Stage C")
        repeated = 1
        if start.kind == "RepeatLatentBatch":
            repeated = self._number(start, "amount", int)
            start = self._source(start.node_id, "samples")
        if start.kind == "WuerstchenEmptyLatent":
            if denoise != 1:
                raise self._refuse("it starts from an empty latent at a denoise below 1")
            self.settings["batch_size"] = self._number(start, "batch_size", int) * repeated
        else:
            self._expect(start, "WuerstchenSemanticCompress")
            self._network(
                "semantic_compressor", self._source(start.node_id, "vae"), ("WuerstchenLoadSemanticCompressor",)
            )
            self.settings |= {"image": self._image(self._source(start.node_id, "image")), "denoise": denoise}
            if repeated > 1:
                self.settings["batch_size"] = repeated
        for side in ("width", "height"):
            if pixels := self._number(start, side, int):
                self.settings[side] = pixels

    def _image(self, source: Source) -> str:
        if source.kind == "JoinImageWithAlpha":
            source = self._source(source.node_id, "image")
        self._expect(source, "LoadImage")
        return _file_name(self._value(source, "image", str))

    def _sampler(self, stage: str, node: Source) -> None:
        ours = node.kind != "KSampler"
        name = self._value(node, "sampler" if ours else "sampler_name", str)
        sampler = name if ours else OTHERS.get(name, name)
        if sampler not in SAMPLERS:
            raise self._refuse(f"Stage {stage.upper()} was drawn by {name}, which generate does not have")
        self.settings["sampler_b" if stage == "b" else "sampler"] = sampler
        if stage == "c" and self.settings["sampler_b"] == sampler:
            del self.settings["sampler_b"]
        if not ours:
            scheduler = self._value(node, "scheduler", str)
            if scheduler != "simple":
                raise self._refuse(f"its KSampler spaces the steps by {scheduler}; generate has those of simple only")
            self.settings["schedule" if stage == "c" else "schedule_b"] = "even"
            self.asked.remarks.append(
                f"Stage {stage.upper()} was drawn by KSampler, whose last step and later noise are its own: this will "
                "be near it or, where the sampler adds noise, another picture of the same prompt"
            )
        elif stage == "c":
            self.settings["schedule"] = self._value(node, "schedule", str)
            if "cfg_interval_low" in node.inputs:
                self.settings["cfg_interval"] = [self._number(node, f"cfg_interval_{end}") for end in ("low", "high")]
                self.settings["cfg_rescale"] = self._number(node, "cfg_rescale")
        elif "schedule" in node.inputs:
            self.settings["schedule_b"] = self._value(node, "schedule", str)
        seed, cfg = self._number(node, "seed", int), self._number(node, "cfg")
        self.settings["seed_b" if stage == "b" else "seed"] = seed
        if stage == "c" and self.settings["seed_b"] == seed:
            del self.settings["seed_b"]
        self.settings[f"steps_{stage}"] = self._number(node, "steps", int)
        if cfg or not ours or stage == "b":
            self.settings[f"cfg_{stage}"] = cfg
        self._model(f"stage_{stage}", self._source(node.node_id, "model"))

    # Networks

    def _model(self, role: str, source: Source) -> None:
        loras: list[tuple[str, float]] = []
        while source.kind in ("WuerstchenLoadLoRA", "LoraLoaderModelOnly"):
            ours = source.kind == "WuerstchenLoadLoRA"
            file = _file_name(self._value(source, "file" if ours else "lora_name", str))
            loras.append((file, self._number(source, "strength" if ours else "strength_model")))
            source = self._source(source.node_id, "model")
        self._network(role, source, ("WuerstchenLoadStageC" if role == "stage_c" else "WuerstchenLoadStageB",))
        distilled = (distilled_name(self.settings.get("model", ""), role), 1.0)
        if distilled in loras:
            self.settings.setdefault("distilled", []).append(role)
        if others := [f"{file}:{strength!r}" for file, strength in reversed(loras) if (file, strength) != distilled]:
            self.settings["loras"] = others + self.settings.get("loras", [])

    def _network(self, role: str, source: Source, loaders: tuple[str, ...]) -> None:
        self._expect(source, "WuerstchenLoadModel", *loaders)
        if source.kind == "WuerstchenLoadModel":
            name = _file_name(self._value(source, "model", str))
            either = name == "mini" and role.startswith("text_encoder")  # it has one for both stages
            if source.slot != SLOTS[role] and not (either and source.slot in (1, 3)):
                raise self._refuse(f"node {source.node_id}'s output {source.slot} is not what the graph takes it for")
            if self.settings.setdefault("model", name) != name:
                raise self._refuse(f"its networks are from two sets, {self.settings['model']} and {name}")
        else:
            name = _file_name(self._value(source, "vae_name" if source.kind == "VAELoader" else "file", str))
            if self.settings.setdefault(role, name) != name:
                raise self._refuse(f"two files are in the place of one network, {self.settings[role]} and {name}")
        dtype = source.inputs.get("weight_dtype", "default")
        if dtype != "default":
            self.asked.remarks.append(f"its weights were kept as {shown(dtype)}, which changes the picture a little")

    def _text(self, node: Source, name: str, role: str) -> str:
        encode = self._source(node.node_id, name)
        self._expect(encode, "WuerstchenTextEncode", "CLIPTextEncode")
        clip = self._source(encode.node_id, "clip")
        self._network(role, clip, ("WuerstchenLoadTextEncoder",))
        if not isinstance(encode.inputs.get("text"), list):
            return self._value(encode, "text", str)
        source = self._source(encode.node_id, "text")
        self._expect(source, "PrimitiveStringMultiline", "PrimitiveString")
        return self._value(source, "value", str)

    # The graph

    def _source(self, node_id: str, name: str) -> Source:
        """What a link to a node's input comes from."""
        self.followed += 1
        if self.followed > DEEPEST:
            raise self._refuse("its graph goes round in circles, or is too long")
        value = self._inputs(node_id).get(name)
        if not isinstance(value, list) or len(value) != 2 or type(value[1]) is not int:
            raise self._refuse(f"{name} of node {shown(node_id)} is not linked")
        source_id = str(value[0]) if isinstance(value[0], (str, int)) else ""
        inputs = self._inputs(source_id)
        return Source(source_id, self.graph[source_id]["class_type"], inputs, value[1])

    def _inputs(self, node_id: str) -> Mapping:
        node = self.graph.get(node_id)
        if (
            not isinstance(node, dict)
            or not isinstance(node.get("class_type"), str)
            or not isinstance(node.get("inputs"), dict)
        ):
            raise self._refuse(f"there is no node {shown(node_id)} in its graph")
        return node["inputs"]

    def _value(self, node: Source, name: str, kind: type | tuple[type, ...]):
        value = node.inputs.get(name)
        if isinstance(value, list):
            raise self._refuse(f"{name} of node {shown(node.node_id)} comes from another node")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._refuse(f"{name} of node {shown(node.node_id)} is {shown(value)}")
        return value

    def _number(self, node: Source, name: str, kind: type | tuple[type, ...] = (int, float)):
        return self._value(node, name, kind)

    def _expect(self, source: Source, *kinds: str) -> None:
        if source.kind not in kinds:
            raise self._refuse(
                f"node {shown(source.node_id)} is {shown(source.kind)}, which generate does not have (there it needs "
                f"{' or '.join(kinds)})"
            )

    def _refuse(self, why: str) -> WuerstchenError:
        return WuerstchenError(f"{self.where}: {why}")
