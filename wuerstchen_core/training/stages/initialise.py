"""The first weights of Stages B and C, those of the authors' released code."""

import math

import torch
from torch import Tensor, nn

from ...models.blocks import Attention, ResBlock, TimestepBlock
from ...models.stage_b import DiffNeXt
from ...models.stage_c import Prior

CONDITION_STD = 0.02  # of what maps text, semantic latents and Stage C's input
INPUT_GAIN = 0.02  # of Stage B's input


@torch.no_grad()
def initialise(network: Prior | DiffNeXt) -> None:
    """Sets the weights that the released code begins with.

    Linears and convolutions get Xavier's uniform distribution and no bias, matrices that are one in the released code
    (queries, keys and values; a ResBlock's first Linear) as one. The maps of the inputs are smaller, the last Linear of
    each ResBlock is divided by the square root of the number of blocks, and times and output start at zero. Transposed
    convolutions and GRN are left as their constructors made them.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    depth = network.config.depth if isinstance(network, Prior) else sum(network.config.blocks)
    for module in network.modules():
        if isinstance(module, Attention):
            _xavier_together(module.to_q.weight, module.to_k.weight, module.to_v.weight, dim=0)
        elif isinstance(module, ResBlock):
            if module.semantic is not None:
                _xavier_together(module.channelwise[0].weight, module.semantic.weight, dim=1)
            module.channelwise[-1].weight.mul_(depth**-0.5)
        elif isinstance(module, TimestepBlock):
            nn.init.zeros_(module.mapper.weight)
    if isinstance(network, Prior):
        conditions, last = [network.projection, network.cond_mapper[0], network.cond_mapper[2]], network.out[1]
    else:
        nn.init.xavier_uniform_(network.embedding[1].weight, gain=INPUT_GAIN)
        conditions = [network.clip_mapper, *(mapper for mapper in network.effnet_mappers if mapper is not None)]
        last = network.clf[1]
    for module in conditions:
        nn.init.normal_(module.weight, std=CONDITION_STD)
    nn.init.zeros_(last.weight)


def _xavier_together(*parts: Tensor, dim: int) -> None:
    """Xavier's uniform distribution for the matrix of which these are the parts along a dimension."""
    outputs, inputs = torch.cat(parts, dim=dim).shape
    bound = math.sqrt(6 / (inputs + outputs))
    for part in parts:
        nn.init.uniform_(part, -bound, bound)
