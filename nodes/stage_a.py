import math

import torch
from comfy_api.latest import io

from ..wuerstchen_core import Geometry
from ..wuerstchen_core.pipeline import decode, encode
from . import host, images, latents, sockets

# Peak memory of the released Stage A in bytes per position of its latent.
WORKING_MEMORY = 64 * 1024


class WuerstchenVQGANDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenVQGANDecode",
            display_name="Würstchen VQGAN Decode",
            category=sockets.CATEGORY,
            description="Stage A: turns a latent into a picture.",
            inputs=[
                sockets.StageA.Input("stage_a", tooltip="From Würstchen Load Stage A or Würstchen Load Model."),
                io.Latent.Input("latent", tooltip="From Würstchen Stage B Sampler or Würstchen VQGAN Encode."),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, stage_a: host.Model, latent) -> io.NodeOutput:
        stage_a = sockets.network(stage_a, "stage_a")
        samples = latents.samples_of(
            latent,
            stage_a.network.config.latent_channels,
            "Würstchen VQGAN Decode",
            "Würstchen Stage B Sampler or Würstchen VQGAN Encode",
        )
        latents.refuse_mask(latent, "Würstchen VQGAN Decode")
        geometry = latents.geometry_of_stage_a(latent)
        device = stage_a.load(WORKING_MEMORY * samples[0, 0].numel())
        pictures = [
            latents.cut(decode(stage_a.network, one.to(device), dtype=stage_a.dtype), geometry)
            for one in samples.split(1)
        ]
        return io.NodeOutput(host.to_intermediate(torch.cat(pictures)))


class WuerstchenVQGANEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenVQGANEncode",
            display_name="Würstchen VQGAN Encode",
            category=sockets.CATEGORY,
            description="Stage A: turns a picture into a latent, 4 times smaller a side.",
            inputs=[
                sockets.StageA.Input("stage_a", tooltip="From Würstchen Load Stage A or Würstchen Load Model."),
                io.Image.Input(
                    "image", tooltip="Its sides are cropped to multiples of 8; transparency is put on white."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="A latent of Stage A, for Würstchen VQGAN Decode.")],
        )

    @classmethod
    def execute(cls, stage_a: host.Model, image: torch.Tensor) -> io.NodeOutput:
        node = "Würstchen VQGAN Encode"
        stage_a = sockets.network(stage_a, "stage_a")
        image = images.whole_steps(images.rgb(image, node), node)
        geometry = Geometry(width=image.shape[2], height=image.shape[1])
        device = stage_a.load(WORKING_MEMORY * math.prod(geometry.stage_a))
        samples = [encode(stage_a.network, one.to(device), stage_a.dtype) for one in image.split(1)]
        return io.NodeOutput(latents.pack(torch.cat(samples), geometry))
