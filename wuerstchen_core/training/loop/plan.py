"""The plan of a run: its length, learning rate and averaging, and how often it is saved."""

from dataclasses import dataclass

import torch

from ...util.errors import WuerstchenError
from ..options import check_above_zero, check_at_least, check_shares, option
from .optimizer import MOMENTS

PRECISIONS = ("", "no", "fp16", "bf16")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """Length of a run, learning rate, averaging, and how often it is saved."""

    steps: int = option(help="number of updates of the weights")
    learning_rate: float = option(1e-4, "AdamW's learning rate after the warm-up")
    warm_up: int = option(10_000, "steps in which the learning rate rises from 0 to its value")
    cool_down: float = option(0.0, "fraction of the steps, at the end, in which the learning rate falls to 0")
    optimizer: str = option(
        "adamw", "adamw, or adamw8bit: its state takes a quarter of the memory (needs bitsandbytes)"
    )
    beta1: float = option(0.9, "AdamW's decay of the mean of the gradients")
    beta2: float = option(0.999, "AdamW's decay of the mean of their squares")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    decay_all: bool = option(False, "let biases and gains decay as well, as the authors did")
    gradient_norm: float = option(1.0, "maximum gradient norm (clipping)")
    accumulate: int = option(1, "batches per step (gradient accumulation)")
    ema_every: int = option(100, "steps between two updates of the average of the weights (EMA)")
    ema_decay: float = option(0.9, "EMA decay; at update n at most n / (10 + n)")
    save_every: int = option(1000, "steps between two checkpoints, each with the averaged weights as loadable files")
    keep_checkpoints: int = option(2, "checkpoints that are kept, 2 at least; older ones are checkpoint-STEP.pt")
    sample_every: int = option(1000, "steps between two grids of samples; 0: none")
    log_every: int = option(10, "steps between two entries in tensorboard's logs")
    mixed_precision: str = option("", "no, fp16 or bf16; empty: as `accelerate launch` says, otherwise no")
    tf32: bool = option(True, "compute float32 products on a GPU in TF32: several times as fast, and 10 bits precise")
    compile: bool = option(False, "compile the networks' blocks (torch.compile): slow at first, faster from then on")
    gradient_checkpointing: bool = option(False, "recompute activations for the gradient: less memory, a third slower")
    dtype: str = option("float32", "precision of the weights in the loadable files: float32, float16 or bfloat16")
    seed: int = option(0, "seed of the initial weights, the order of the data and everything else that is random")

    def __post_init__(self):
        check_at_least(1, self, "steps", "accumulate", "ema_every", "save_every", "log_every")
        check_at_least(0, self, "warm_up", "sample_every", "seed", "weight_decay")
        check_above_zero(self, "learning_rate", "gradient_norm")
        check_at_least(2, self, "keep_checkpoints")
        check_shares(self, "cool_down", "ema_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise WuerstchenError(f"{name} is {getattr(self, name)}: it must be from 0 to below 1")
        known_of = {"mixed_precision": PRECISIONS, "dtype": tuple(DTYPES), "optimizer": tuple(MOMENTS)}
        for name, known in known_of.items():
            if getattr(self, name) not in known:
                raise WuerstchenError(f"{name} is {getattr(self, name)!r}: take one of {', '.join(known).lstrip(', ')}")

    @property
    def exported_dtype(self) -> torch.dtype:
        """The precision of the weights in the loadable files."""
        return DTYPES[self.dtype]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, constant, cool-down to 0."""
        warming = (step + 1) / self.warm_up if self.warm_up else 1.0
        cooling = (self.steps - step) / (self.cool_down * self.steps) if self.cool_down else 1.0
        return self.learning_rate * min(1.0, warming, cooling)

    def decay(self, averaged: int) -> float:
        """The EMA decay at the average's `averaged`-th update, counted from 1: lower at first."""
        return min(self.ema_decay, averaged / (10 + averaged))
