import math

import torch
from comfy_api.latest import io

from ..wuerstchen_core.pipeline import compress, fit
from . import host, images, latents, sockets

# Peak memory of the released compressor in bytes per position of its latent.
WORKING_MEMORY = 172 * 1024


class WuerstchenSemanticCompress(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WuerstchenSemanticCompress",
            display_name="Würstchen Semantic Compress",
            category=sockets.CATEGORY,
            description="Turns a picture into the kind of small latent that Stage C makes from text, 42.67 times "
            "smaller a side. Stage B redraws the picture from it; Stage C can change it.",
            inputs=[
                sockets.SemanticCompressor.Input(
                    "semantic_compressor", tooltip="From Würstchen Load Semantic Compressor or Würstchen Load Model."
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
    def execute(cls, semantic_compressor: host.Model, image: torch.Tensor, width: int, height: int) -> io.NodeOutput:
        semantic_compressor = sockets.network(semantic_compressor, "semantic_compressor")
        geometry = latents.picture_size(width, height)
        image = images.rgb(image, "Würstchen Semantic Compress")
        positions = math.prod(geometry.stage_c) * len(image)
        device = semantic_compressor.load(WORKING_MEMORY * positions + 2 * image.numel() * image.element_size())
        image = fit(image.to(device), geometry)
        return io.NodeOutput(latents.pack(compress(semantic_compressor.network, image), geometry))
