"""What `wuerstchen generate` was asked for -> the graph of nodes that draws the same picture in ComfyUI."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.sets import distilled_name
from .graph import Graph, Node, Output

LARGEST_EXACT = 2**53  # a larger whole number is rounded by the page
SMALLEST_SIDE = 128  # of the nodes' pictures
ROLES = {
    "stage_a": ("WuerstchenLoadStageA", "models/vae"),
    "stage_b": ("WuerstchenLoadStageB", "models/diffusion_models"),
    "stage_c": ("WuerstchenLoadStageC", "models/diffusion_models"),
    "semantic_compressor": ("WuerstchenLoadSemanticCompressor", "models/clip_vision"),
    "text_encoder_c": ("WuerstchenLoadTextEncoder", "models/text_encoders"),
    "text_encoder_b": ("WuerstchenLoadTextEncoder", "models/text_encoders"),
}
SLOTS = {"stage_c": 0, "text_encoder_c": 1, "stage_b": 2, "text_encoder_b": 3, "stage_a": 4, "semantic_compressor": 5}
MADE_OF = {  # all that a graph can be made of; what else was asked for is told in the note
    "prompt", "negative_prompt", "width", "height", "batch_size", "seed", "seed_b", "steps_c", "cfg_c", "steps_b",
    "cfg_b", "sampler", "sampler_b",
    "schedule", "schedule_b", "distilled", "cfg_interval", "cfg_rescale", "denoise", "tile", "dtype", "device",
    "model", "image", "loras", "batch_number", *ROLES,
}  # fmt: skip


@dataclass(frozen=True)
class Circumstances:
    """What settings alone do not say."""

    one_text_encoder: bool = True  # Stage B reads its text with Stage C's
    text_for_stage_b: bool = True
    pictures: int = 1  # to start from
    transparent: bool = False  # the picture to start from
    has_profile: bool = False  # of its colours
    loras_of_stage_b: frozenset[str] = frozenset()  # by the names of their files


def graph_of(told: Mapping, around: Circumstances = Circumstances()) -> Graph:
    """`told`: the settings, by the names that `Wuerstchen.generate` has for them; `model`, `image` and the networks in
    the place of the set's own by the names of their files, `loras` as FILE:STRENGTH.

    What the nodes cannot do is told in the graph's notes.
    """
    graph = Graph()
    networks = _networks(graph, told, around)
    for lora in told.get("loras", ()):
        name, _, strength = lora.rpartition(":")
        stage = "stage_b" if name in around.loras_of_stage_b else "stage_c"
        loaded = graph.add("WuerstchenLoadLoRA", model=networks[stage], file=name, strength=float(strength))
        networks[stage] = loaded[0]
        graph.notes.append(f"Put the LoRA `{name}` into `models/loras`.")

    for stage in told.get("distilled", ()):
        few_steps = distilled_name(told["model"], stage)
        networks[stage] = graph.add("WuerstchenLoadLoRA", model=networks[stage], file=few_steps, strength=1.0)[0]

    prompt = graph.add("PrimitiveStringMultiline", "Prompt", value=_cleaned(told["prompt"]))
    negative = graph.add("PrimitiveStringMultiline", "Negative prompt", value=_cleaned(told["negative_prompt"]))

    def read(stage: str, text: Node, title: str) -> Output:
        return graph.add("WuerstchenTextEncode", title, clip=networks[f"text_encoder_{stage}"], text=text[0])[0]

    positive_c = read("c", prompt, "Prompt for Stage C")
    negative_c = read("c", negative, "Negative prompt for Stage C")
    positive_b = read("b", prompt, "Prompt for Stage B") if around.text_for_stage_b else None
    guided_b = around.text_for_stage_b and told["cfg_b"] != 1
    negative_b = read("b", negative, "Negative prompt for Stage B") if guided_b else None

    semantic = graph.add(
        "WuerstchenStageCSampler",
        model=networks["stage_c"],
        positive=positive_c,
        negative=negative_c,
        latent=_start(graph, told, networks, around),
        seed=_seed(graph, "Stage C", told["seed"]),
        steps=told["steps_c"],
        cfg=told["cfg_c"],
        sampler=told["sampler"],
        schedule=told["schedule"],
        denoise=told.get("denoise", 1.0),
        cfg_interval_low=told["cfg_interval"][0],
        cfg_interval_high=told["cfg_interval"][1],
        cfg_rescale=told["cfg_rescale"],
    )
    if told["cfg_c"] == 0:
        graph.notes.append("Stage C was drawn with cfg 0, which means the model's own to *Würstchen Stage C Sampler*.")
    latent = graph.add(
        "WuerstchenStageBSampler",
        model=networks["stage_b"],
        latent=semantic[0],
        seed=_seed(graph, "Stage B", told.get("seed_b", told["seed"])),
        steps=told["steps_b"],
        cfg=told["cfg_b"],
        sampler=told.get("sampler_b", told["sampler"]),
        positive=positive_b,
        negative=negative_b,
        schedule=told["schedule_b"],
    )
    picture = graph.add("WuerstchenVQGANDecode", vae=networks["stage_a"], latent=latent[0])
    graph.add("SaveImage", images=picture[0], filename_prefix="Wuerstchen")

    if "batch_number" in told:
        graph.notes.append(f"This picture is number {told['batch_number']} of the {told['batch_size']} that are drawn.")
    for text in (told["prompt"], told["negative_prompt"]):
        if "embedding:" in text:
            graph.notes.append("*Würstchen Text Encode* reads `embedding:` as a name of an embedding.")
    for name in told.keys() - MADE_OF:
        graph.notes.append(f"The picture was drawn with {name} {told[name]}, which these nodes do not have.")
    return graph


def _networks(graph: Graph, told: Mapping, around: Circumstances) -> dict[str, Output]:
    """Role -> output of a loader."""
    found: dict[str, Output] = {}
    for role, (loader, folder) in ROLES.items():
        unread = role == "semantic_compressor" and "image" not in told
        if role in told and not unread and not (role == "text_encoder_b" and not around.text_for_stage_b):
            found[role] = graph.add(loader, file=told[role])[0]
            graph.notes.append(f"Put `{told[role]}` into `{folder}`.")
    if around.one_text_encoder and "text_encoder_c" in found:
        found["text_encoder_b"] = found["text_encoder_c"]
    needed = set(SLOTS)
    if "image" not in told:
        needed.discard("semantic_compressor")
    if not around.text_for_stage_b:
        needed.discard("text_encoder_b")
    if missing := needed - found.keys():
        whole = graph.add("WuerstchenLoadModel", model=told["model"])
        found |= {role: whole[SLOTS[role]] for role in missing}
        if told["model"] != "mini":
            graph.notes.append(f"Put the folder `{told['model']}` into `models/wuerstchen`.")
    return found


def _start(graph: Graph, told: Mapping, networks: dict[str, Output], around: Circumstances) -> Output:
    """What Stage C starts from."""
    size = {side: max(told[side], SMALLEST_SIDE) for side in ("width", "height")}
    if size != {side: told[side] for side in size}:
        graph.notes.append(
            f"The picture was {told['width']}x{told['height']}: nodes take no side below {SMALLEST_SIDE}."
        )
    if "image" not in told:
        return graph.add("WuerstchenEmptyLatent", **size, batch_size=told["batch_size"])[0]
    graph.notes.append(f"Choose `{told['image']}` in *Load Image*: it lies where the picture was drawn.")
    loaded = graph.add("LoadImage", image=told["image"])
    image = loaded[0]
    if around.transparent:
        image = graph.add("JoinImageWithAlpha", image=loaded[0], alpha=loaded[1])[0]
    if around.has_profile:
        graph.notes.append(
            f"`{told['image']}` has a colour profile, which *Load Image* does not read: make it sRGB first."
        )
    latent = graph.add("WuerstchenSemanticCompress", vae=networks["semantic_compressor"], image=image, **size)
    repeated = told["batch_size"] // around.pictures
    return graph.add("RepeatLatentBatch", samples=latent[0], amount=repeated)[0] if repeated > 1 else latent[0]


def _cleaned(prompt: str) -> str:
    """As the core's tokenizer reads it: HTML entities and curly quotes are replaced, which ComfyUI's leaves alone."""
    from open_clip.tokenizer import basic_clean

    return basic_clean(prompt)


def _seed(graph: Graph, stage: str, seed: int) -> int:
    if seed > LARGEST_EXACT:
        graph.notes.append(
            f"{stage}'s seed is {seed}. The page rounds seeds above 2⁵³: run this graph through the API instead."
        )
    return seed
