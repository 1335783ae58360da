"""ComfyUI's entry point."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES

WEB_DIRECTORY = "./web"


class WuerstchenExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint() -> WuerstchenExtension:
    return WuerstchenExtension()
