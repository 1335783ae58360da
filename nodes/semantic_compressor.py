import torch
from comfy_api.latest import io

from ..wuerstchen_core.pipeline import fit
from . import host, images, latents, sockets


class WuerstchenSemanticCompress(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "img2img, vae encode, image to latent, variation, cascade",
            node_id="WuerstchenSemanticCompress",
            display_name="Würstchen Semantic Compress",
            description="Turns a picture into the kind of small latent that Stage C makes from text, 42.67 times "
            "smaller a side. Stage B redraws the picture from it; Stage C can change it.",
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip="The semantic VAE, from Würstchen Load Semantic Compressor or Würstchen Load Model.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="Any size: it is scaled to cover width x height, and the middle is used. Transparency is "
                    "put on white.",
                ),
                *sockets.size_inputs("the picture to draw from the latent"),
            ],
            outputs=[io.Latent.Output(tooltip="A latent of Stage C.")],
        )

    @classmethod
    def execute(cls, vae, image: torch.Tensor, width: int, height: int) -> io.NodeOutput:
        node = "Würstchen Semantic Compress"
        host.loading.require_semantic(vae, node)
        geometry = latents.picture_size_or(width, height, vae.defaults.side)
        return io.NodeOutput(latents.pack(vae.encode(fit(images.rgb(image, node), geometry)), geometry))
