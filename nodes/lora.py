from comfy_api.latest import io

from . import host, sockets


class WuerstchenLoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "lora loader, style",
            node_id="WuerstchenLoadLoRA",
            display_name="Würstchen Load LoRA",
            description="Applies a LoRA to Stage C or Stage B. Several of these nodes in a row add up. ComfyUI's own "
            "LoRA loaders work too, but do not read an alpha that is in a file's metadata.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stage C or Stage B: from its loader, from Würstchen Load Model or from another LoRA.",
                ),
                io.Combo.Input(
                    "file",
                    options=list(host.folders.weight_files("lora")),
                    tooltip=f"A file in {host.folders.places('lora')}: a LoRA for Würstchen's Stage C, which diffusers "
                    "calls the prior, or for Stage B. A distilled network's (few steps) needs sampler lcm and cfg 1.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.01,
                    tooltip="0 has no effect, 1 applies the LoRA as trained, a negative value does the opposite.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="Stage C", tooltip="The stage with the LoRA; the one that came in is unchanged."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **others):
        return host.fingerprints.of_files(lora=file)

    @classmethod
    def validate_inputs(cls, file=None):
        return host.folders.what_is_missing(lora=file)

    @classmethod
    def execute(cls, model, file: str, strength: float) -> io.NodeOutput:
        host.models.require(model, None, "Würstchen Load LoRA")
        return io.NodeOutput(host.lora.with_lora(model, file, strength))
