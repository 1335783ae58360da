import dataclasses

import torch
from comfy_api.latest import io

from ..wuerstchen_core import WuerstchenError
from ..wuerstchen_core.diffusion.options import STAGE_C, SamplingOptions
from ..wuerstchen_core.models.defaults import RELEASED, SMALL
from ..wuerstchen_core.models.stage_c import StageCConfig
from . import host, latents, sockets

CHANNELS = StageCConfig().latent_channels


class WuerstchenEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "empty latent image, size, width, height, cascade",
            node_id="WuerstchenEmptyLatent",
            display_name="Würstchen Empty Latent",
            description="Sets the size and the number of pictures when Stage C starts from text alone.",
            inputs=[
                *sockets.size_inputs("the pictures"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures are drawn at once."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Stage C. Needed only where width and height are 0 and another sampler than Würstchen "
                    "Stage C Sampler, such as KSampler, takes the latent.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="A latent of Stage C.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int, model=None) -> io.NodeOutput:
        if batch_size < 1:
            raise WuerstchenError(f"batch_size is {batch_size}: at least 1 is needed")
        side = None if model is None else host.models.defaults(model, "Würstchen Empty Latent").side
        geometry = latents.picture_size_or(width, height, side)
        if geometry is None:
            return io.NodeOutput(latents.open_latent(batch_size, CHANNELS))
        return io.NodeOutput(latents.pack(torch.zeros(batch_size, CHANNELS, *geometry.stage_c), geometry))


class WuerstchenStageCSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "ksampler, cascade, prior, txt2img, img2img",
            node_id="WuerstchenStageCSampler",
            display_name="Würstchen Stage C Sampler",
            description="Draws the content: text to a small latent, from noise or from a picture's latent. A seed "
            "gives the same picture here and on the command line; ComfyUI's KSampler works as well.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Stage C: from Würstchen Load Stage C, Würstchen Load Model or a LoRA loader."
                ),
                io.Conditioning.Input("positive", tooltip="What the picture shows, by the CLIP of Stage C."),
                io.Conditioning.Input("negative", tooltip="What to avoid; an empty text will do."),
                io.Latent.Input(
                    "latent",
                    tooltip="From Würstchen Empty Latent, or from Würstchen Semantic Compress to start from a picture. "
                    "With a noise mask only the masked part is drawn.",
                ),
                sockets.seed_input("The same seed gives the same picture."),
                *sockets.sampling_inputs(
                    dataclasses.replace(STAGE_C, cfg=0.0),
                    f"How closely the prompt is followed. 0: what suits the model, {SMALL.cfg:g} for the mini and "
                    f"{RELEASED.cfg:g} for the released weights. 1 turns guidance off: faster, and without "
                    "the negative.",
                ),
                sockets.schedule_input(STAGE_C.schedule),
                sockets.denoise_input(),
                *sockets.guidance_inputs(),
                sockets.preview_input(),
            ],
            outputs=[io.Latent.Output(tooltip="For Würstchen Stage B Sampler or Würstchen Stage B Conditioning.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        cfg,
        sampler,
        schedule,
        denoise,
        cfg_interval_low=STAGE_C.cfg_interval[0],
        cfg_interval_high=STAGE_C.cfg_interval[1],
        cfg_rescale=STAGE_C.cfg_rescale,
        preview=False,
    ) -> io.NodeOutput:
        node = "Würstchen Stage C Sampler"
        own = host.models.defaults(model, node)
        latents.samples_of(latent, CHANNELS, node, "Würstchen Empty Latent or Würstchen Semantic Compress")
        latent = latents.sized(latent, own.side)
        geometry = latents.geometry_of_stage_c(latent)
        sampled = host.sampling.sample(
            model,
            positive,
            negative,
            latent["samples"],
            SamplingOptions(
                steps,
                cfg or own.cfg,
                sampler,
                schedule,
                denoise,
                seed,
                (cfg_interval_low, cfg_interval_high),
                cfg_rescale,
            ),
            mask=latents.mask_of(latent, geometry),
            batch_index=latent.get("batch_index"),
            preview=preview,
        )
        return io.NodeOutput(latents.pack(sampled, geometry, like=latent))
