import torch
from comfy_api.latest import io

from ..wuerstchen_core import Geometry
from ..wuerstchen_core.pipeline import fit
from . import host, latents, sockets


class WuerstchenSemanticCompress(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenSemanticCompress",
            display_name="Würstchen Semantic Compress",
            category=sockets.CATEGORY,
            description="Picture to the small latent that Stage C makes from text, 42.67 : 1 a side. Stage B draws the "
            "picture anew from it, Stage C changes it.",
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip="The semantic VAE, from Würstchen Load Semantic Compressor or Würstchen Load Model.",
                ),
                io.Image.Input(
                    "image", tooltip="Of any size: it is scaled to cover width x height, and its middle is used."
                ),
                *sockets.size_inputs("the picture to draw from the latent"),
            ],
            outputs=[io.Latent.Output(tooltip="In Stage C's space.")],
        )

    @classmethod
    def execute(cls, vae, image: torch.Tensor, width: int, height: int) -> io.NodeOutput:
        host.loading.require_semantic(vae, "Würstchen Semantic Compress")
        geometry = Geometry(width, height)
        return io.NodeOutput(latents.pack(vae.encode(fit(image[..., :3], geometry)), geometry))
