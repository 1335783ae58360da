"""What is done to the blocks of a task's networks, one by one: gradient checkpointing, compilation, sharding."""

import warnings
from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ...models.blocks import AttnBlock, ResBlock
from ...models.previewer import ConvBlock
from ...models.stage_a import MixingBlock
from ...models.text_encoder import TextEncoder

# None has a BatchNorm, whose statistics would see each batch twice.
BLOCKS = (ResBlock, AttnBlock, MixingBlock, ConvBlock)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all networks in `network`, those of text encoders included."""
    for module in network.modules():
        if isinstance(module, BLOCKS):
            yield module
        elif isinstance(module, TextEncoder):
            yield from module.tower.transformer.resblocks


def checkpoint_blocks(network: nn.Module) -> None:
    """From now on the blocks in `network` keep only their inputs, and are computed again on the way back
    (arXiv 1604.06174). Gradients stay the same; memory falls, time grows by about a third."""
    for block in blocks(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(network: nn.Module) -> None:
    """From now on the blocks in `network` are compiled when they are first called; equal ones share their code."""
    for block in blocks(network):
        block.compile()


def shard_blocks(network: nn.Module, plugin) -> None:
    """Each block in `network` becomes a unit of FSDP2: its weights are whole only while it is at work.

    What is called outside of a block's forward pass gathers the weights as well. `plugin` is accelerate's.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shard = partial(
        fully_shard,
        reshard_after_forward=plugin.reshard_after_forward,
        offload_policy=plugin.cpu_offload,
        mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # keys and values are views, and not worked on in place
    for block in list(blocks(network)):
        if isinstance(block, ResBlock) and block.semantic is not None:
            shard(block.semantic)
        shard(block)
        if isinstance(block, AttnBlock):
            register_fsdp_forward_method(block, "condition")
