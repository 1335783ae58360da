from torch import nn

from ...models.blocks import ResBlock, TimestepBlock
from ...models.stage_b import DiffNeXt
from ...models.stage_c import Prior


def initialise(network: Prior | DiffNeXt) -> None:
    """Xavier weights; residual branches scaled down by depth, times and output start at zero (the released init)."""
    residual = [module for module in network.modules() if isinstance(module, ResBlock)]
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in residual:
        block.channelwise[-1].weight.data.mul_(len(residual) ** -0.5)
    for module in network.modules():
        if isinstance(module, TimestepBlock):
            nn.init.zeros_(module.mapper.weight)
    last = network.out[1] if isinstance(network, Prior) else network.clf[1]
    nn.init.zeros_(last.weight)
