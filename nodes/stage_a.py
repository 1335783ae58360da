import torch
import torch.nn.functional as F
from comfy_api.latest import io
from einops import rearrange

from ..wuerstchen_core import Geometry
from . import host, images, latents, sockets


class WuerstchenVQGANDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "vae decode, stage a, latent to image",
            node_id="WuerstchenVQGANDecode",
            display_name="Würstchen VQGAN Decode",
            description="Stage A: turns a latent into a picture of exactly the size that was asked for. VAE Decode "
            "gives multiples of 64.",
            inputs=[
                io.Vae.Input("vae", tooltip="Stage A: from Würstchen Load Stage A, Würstchen Load Model or Load VAE."),
                io.Latent.Input("latent", tooltip="From a sampler with Stage B or Würstchen VQGAN Encode."),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, vae, latent) -> io.NodeOutput:
        node = "Würstchen VQGAN Decode"
        host.loading.require_stage_a(vae, node)
        sources = "Würstchen Stage B Sampler or Würstchen VQGAN Encode"
        samples = latents.samples_of(latent, vae.latent_channels, node, sources)
        return io.NodeOutput(latents.cut(vae.decode(samples).clamp(0, 1), latents.geometry_of_stage_a(latent)))


class WuerstchenVQGANEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "vae encode, stage a, image to latent, inpaint",
            node_id="WuerstchenVQGANEncode",
            display_name="Würstchen VQGAN Encode",
            description="Stage A: turns a picture into a latent, 4 times smaller a side.",
            inputs=[
                io.Vae.Input("vae", tooltip="Stage A: from Würstchen Load Stage A, Würstchen Load Model or Load VAE."),
                io.Image.Input(
                    "image", tooltip="Its sides are cropped to multiples of 8; transparency is put on white."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="A latent of Stage A, for Würstchen VQGAN Decode.")],
        )

    @classmethod
    def execute(cls, vae, image: torch.Tensor) -> io.NodeOutput:
        node = "Würstchen VQGAN Encode"
        host.loading.require_stage_a(vae, node)
        image = images.whole_steps(images.rgb(image, node), node)
        geometry = Geometry(width=image.shape[2], height=image.shape[1])
        planes = F.pad(rearrange(image, "b h w c -> b c h w"), geometry.margins, mode="replicate")
        return io.NodeOutput(latents.pack(vae.encode(rearrange(planes, "b c h w -> b h w c")), geometry))
