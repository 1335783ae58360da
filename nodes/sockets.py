"""The pack's own socket types, each carrying a `host.Model`; everything else uses ComfyUI's."""

from comfy_api.latest import io

from ..wuerstchen_core import WuerstchenError
from ..wuerstchen_core.checkpoints.load import NETWORKS
from ..wuerstchen_core.diffusion.samplers import SAMPLERS
from . import host
from .latents import LARGEST_SIDE, SMALLEST_SIDE

CATEGORY = "Würstchen"

StageA = io.Custom("WUERSTCHEN_STAGE_A")
StageB = io.Custom("WUERSTCHEN_STAGE_B")
StageC = io.Custom("WUERSTCHEN_STAGE_C")
TextEncoder = io.Custom("WUERSTCHEN_TEXT_ENCODER")
SemanticCompressor = io.Custom("WUERSTCHEN_SEMANTIC_COMPRESSOR")
Previewer = io.Custom("WUERSTCHEN_PREVIEWER")

LOADERS = {
    "stage_a": "Würstchen Load Stage A",
    "stage_b": "Würstchen Load Stage B",
    "stage_c": "Würstchen Load Stage C",
    "text_encoder": "Würstchen Load Text Encoder",
    "semantic_compressor": "Würstchen Load Semantic Compressor",
    "previewer": "Würstchen Load Previewer",
}


def network(given: host.Model, kind: str) -> host.Model:
    """Returns what a network socket was given, which in a workflow from a script may be anything.

    Raises WuerstchenError if it is not a network of that kind.
    """
    found = type(given.network if isinstance(given, host.Model) else given).__name__
    if isinstance(given, host.Model) and found == NETWORKS[kind][0].__name__:
        return given
    raise WuerstchenError(f"{kind}: expected the output of {LOADERS[kind]} or Würstchen Load Model, got {found}")


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def sampling_inputs(steps: int, cfg: float, cfg_tooltip: str) -> list[io.Input]:
    """The inputs that both samplers share, with each stage's defaults."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=1000, tooltip="More steps take longer and help up to a point."),
        io.Float.Input("cfg", default=cfg, min=0.0, max=30.0, step=0.1, round=0.01, tooltip=cfg_tooltip),
        io.Combo.Input(
            "sampler", options=list(SAMPLERS), default="ddpm", tooltip="ddpm adds fresh noise at every step."
        ),
    ]


def previewer_input() -> io.Input:
    return Previewer.Input(
        "previewer",
        optional=True,
        tooltip="From Würstchen Load Previewer, or Würstchen Load Model if its set has one. Without one, each "
        "position of the latent is shown as one colour, which fits the mini.",
    )


def size_inputs(what: str) -> list[io.Int.Input]:
    return [
        io.Int.Input(
            side,
            default=256,
            min=SMALLEST_SIDE,
            max=LARGEST_SIDE,
            step=8,
            tooltip=f"{side.capitalize()} of {what} in pixels, a multiple of 8. The mini was trained at 256 x 256.",
        )
        for side in ("width", "height")
    ]
