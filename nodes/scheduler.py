from comfy_api.latest import io

from ..wuerstchen_core.diffusion.options import STAGE_C
from ..wuerstchen_core.diffusion.schedule import sampling_times
from . import host, sockets


class WuerstchenScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return sockets.schema(
            "sigmas, ksampler scheduler, basic scheduler, custom sampler",
            node_id="WuerstchenScheduler",
            display_name="Würstchen Scheduler",
            description="The times of Würstchen's own samplers as SIGMAS, for ComfyUI's SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="Stage C or Stage B."),
                sockets.schedule_input(STAGE_C.schedule),
                sockets.steps_input(STAGE_C.steps),
                sockets.denoise_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="One more than the steps, the last one 0.")],
        )

    @classmethod
    def execute(cls, model, schedule: str, steps: int, denoise: float) -> io.NodeOutput:
        host.models.require(model, None, "Würstchen Scheduler")
        return io.NodeOutput(host.sampling.sigmas(model, sampling_times(steps, schedule, denoise)))
