from comfy_api.latest import io

from ..wuerstchen_core import WuerstchenError
from . import sockets


class WuerstchenTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "clip text encode, prompt, negative",
            node_id="WuerstchenTextEncode",
            display_name="Würstchen Text Encode",
            description="Encodes a prompt for Stage C or Stage B; each has its own text encoder. ComfyUI's CLIP Text "
            "Encode does the same.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the stage that the prompt is for."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the picture shows or, as a negative prompt, what to avoid. (word:1.2) stresses a "
                    "word, embedding:name reads an embedding. The text may be of any length.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive or the negative input of the sampler.")],
        )

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        if not isinstance(text, str):
            raise WuerstchenError(f"text: expected a text, got {type(text).__name__}")
        if clip is None:
            raise WuerstchenError(
                "Würstchen Text Encode: this set has no text encoder for Stage B, which draws without a "
                "prompt: leave its positive and negative inputs open"
            )
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
