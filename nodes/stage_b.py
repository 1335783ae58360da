import torch
from comfy_api.latest import io

from ..wuerstchen_core import Geometry
from ..wuerstchen_core.diffusion.options import STAGE_B, SamplingOptions
from ..wuerstchen_core.models.stage_b import StageBConfig
from . import host, latents, sockets
from .stage_c import CHANNELS

SOURCES = "Würstchen Stage C Sampler or Würstchen Semantic Compress"
NO_TEXT = torch.zeros(1, 77, 0)  # a text encoder of no width: there is none


def conditioned(latent: dict, positive: list | None, negative: list | None, node: str) -> tuple[list, list, dict]:
    """Stage C's LATENT and the prompts for Stage B, if any -> both prompts and the LATENT that Stage B starts from.

    The positive carries the semantic latent; to the negative Stage B gives a zero one. Of two prompts one alone is
    zeros.
    """
    samples = latents.samples_of(latent, CHANNELS, node, SOURCES)
    geometry, work = latents.geometry_of_stage_c(latent), Geometry.of_stage_c(*samples.shape[-2:])
    latents.refuse_unfollowed_mask(latent, geometry, node)
    if positive is None:
        positive = [[NO_TEXT if negative is None else torch.zeros_like(negative[0][0]), {}]]
    if negative is None:
        negative = [[torch.zeros_like(positive[0][0]), {}]]
    positive = [[text, {**more, latents.SEMANTIC: samples}] for text, more in positive]
    start = torch.zeros(len(samples), StageBConfig().latent_channels, *work.stage_a)
    empty = latents.pack(latents.numbered(start), geometry)
    if "batch_index" in latent:
        empty["batch_index"] = latent["batch_index"]
    return positive, negative, empty


class WuerstchenStageBConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "cascade, stage b, decoder, stablecascade",
            node_id="WuerstchenStageBConditioning",
            display_name="Würstchen Stage B Conditioning",
            description="What any of ComfyUI's samplers needs for Stage B: Stage C's latent joins the prompt, and the "
            "latent to start from has the right size.",
            inputs=[
                io.Latent.Input("latent", tooltip="Stage C's: from its sampler, or from Würstchen Semantic Compress."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="The prompt again, by the CLIP of Stage B. It may be left out."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="By the CLIP of Stage B; read where cfg is not 1."
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive_b", display_name="positive", tooltip="For the sampler with Stage B."),
                io.Conditioning.Output("negative_b", display_name="negative", tooltip="For the sampler with Stage B."),
                io.Latent.Output("latent_b", display_name="latent", tooltip="What Stage B starts from, empty."),
            ],
        )

    @classmethod
    def execute(cls, latent, positive=None, negative=None) -> io.NodeOutput:
        return io.NodeOutput(*conditioned(latent, positive, negative, "Würstchen Stage B Conditioning"))


class WuerstchenStageBSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "ksampler, cascade, decoder, upscale",
            node_id="WuerstchenStageBSampler",
            display_name="Würstchen Stage B Sampler",
            description="Adds the detail: from Stage C's small latent to one of Stage A, the size of the picture / 4.",
            inputs=[
                io.Model.Input("model", tooltip="Stage B: from Würstchen Load Stage B or Würstchen Load Model."),
                io.Latent.Input(
                    "latent",
                    tooltip="Stage C's: from its sampler, or from Würstchen Semantic Compress to vary a picture.",
                ),
                sockets.seed_input("The same seed gives the same picture; another one, other details."),
                *sockets.sampling_inputs(
                    STAGE_B, "How closely the latent and the prompt are followed. 1 is off, and twice as fast."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt again, by the CLIP of Stage B. It may be left out.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="By the CLIP of Stage B; read where cfg is not 1."
                ),
                sockets.schedule_input(STAGE_B.schedule, optional=True),
                sockets.preview_input(),
            ],
            outputs=[io.Latent.Output(tooltip="For Würstchen VQGAN Decode or VAE Decode with Stage A.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        seed,
        steps,
        cfg,
        sampler,
        positive=None,
        negative=None,
        schedule=STAGE_B.schedule,
        preview=False,
    ) -> io.NodeOutput:
        node = "Würstchen Stage B Sampler"
        host.models.require(model, "stage_b", node)
        positive, negative, empty = conditioned(latent, positive, negative, node)
        sampled = host.sampling.sample(
            model,
            positive,
            negative,
            empty["samples"],
            SamplingOptions(steps, cfg, sampler, schedule, seed=seed),
            batch_index=empty.get("batch_index"),
            preview=preview,
        )
        return io.NodeOutput(latents.pack(sampled, empty[latents.KEY].geometry))
