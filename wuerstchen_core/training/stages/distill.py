"""The distillation of Stage C or Stage B into a few steps without guidance (LCM, arXiv 2310.04378).

The student learns as a whole or, as in LCM-LoRA (arXiv 2311.05556), through a LoRA; the sampler for it is `lcm`.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...diffusion.options import MAX_CFG
from ...diffusion.schedule import add_noise
from ...util.checks import one_of, real_number
from ...util.errors import WuerstchenError
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_at_least, check_shares, option
from . import stage_b, stage_c
from .distill_losses import Predict, consistency, pseudo_huber, teacher_step
from .lora import add_lora, save_lora
from .losses import times_of

STAGES = ("stage-c", "stage-b")


@dataclass(frozen=True)
class Options:
    network: str = option("stage-c", f"what is distilled: {' or '.join(STAGES)}")
    init: str = option("mini", "the network to distill, in any layout; mini: the embedded one")
    text_encoder: str = option("mini", "its text encoder's file; mini: the embedded one; empty: Stage B reads no text")
    semantic_compressor: str = option("mini", "the semantic compressor's file; mini: the embedded one")
    stage_a: str = option("mini", "Stage A's file, for Stage C's samples or Stage B's latents; mini: the embedded one")
    frozen_precision: str = option(
        "float32", "precision in which the frozen networks compute features: float32, bfloat16 or float16"
    )
    rank: int = option(64, "rank of the LoRA that learns; 0: the whole network learns")
    targets: tuple[str, ...] = option((), "modules that the LoRA changes, by the ends of their names; empty: all")
    cfg_c: float = option(4.0, "guidance of Stage C's teacher, which the student learns; Stage B has none")
    intervals: int = option(50, "the student at a time learns from itself at a time 1 / intervals earlier")
    teacher_steps: int = option(1, "steps of DDIM in which the teacher goes from the one to the other")
    target_decay: float = option(
        0.95, "decay of the averaged student that it learns from, at each step; 0: it learns from itself"
    )
    p2_k: float = option(0.03, "weight sqrt(snr / (k + snr)): a larger k gives the noisiest times less weight")
    high_noise: float = option(
        0.0, "share of the noise levels drawn from the noisiest alone, where the condition decides"
    )
    noise_levels: int = option(1, "noise levels at which each picture of a batch is learned")
    text_absent: float = option(0.0, "Stage B: share of steps without any text")
    noised: float = option(0.3, "Stage B: share of semantic latents with added noise, as Stage C's are not perfect")
    noised_until: float = option(0.5, "Stage B: latest time of the noise added to them")
    sample_steps: int = option(4, "for samples: steps of the student")
    prompts: tuple[str, ...] = option((), "prompts of Stage C's samples; without prompts there are none")
    stage_b: str = option("mini", "for Stage C's samples: Stage B's file; mini: the embedded one")
    text_encoder_b: str = option("", "for Stage C's samples: Stage B's text encoder; empty: Stage C's")
    sample_count: int = option(4, "how many pictures Stage B's samples show, each beside its reconstruction")

    def __post_init__(self):
        one_of("network", self.network, STAGES)
        check_at_least(0, self, "rank", "p2_k")
        check_at_least(1, self, "intervals", "teacher_steps", "noise_levels", "sample_steps")
        real_number("cfg_c", self.cfg_c, -MAX_CFG, MAX_CFG)
        check_shares(self, "high_noise", "target_decay")
        if self.targets and not self.rank:
            raise WuerstchenError(
                "targets are of a LoRA, and with rank 0 the whole network learns: leave one of them out"
            )
        if not self.init:
            raise WuerstchenError("init is missing: name the network to distill")


def build(options: Options, data: DataOptions) -> "DistillTask":
    """Raises WuerstchenError as the stage's own `build` and `add_lora` do."""
    if options.network == "stage-c":
        return DistillStageC(
            stage_c.build(_as(stage_c.Options, options, caption_drop=0.0, sample_cfg=1.0), data), options
        )
    return DistillStageB(stage_b.build(_as(stage_b.Options, options, caption_drop=0.0, zeroed=0.0), data), options)


def _as(cls: type, options: Options, **changed):
    """The options of a stage's own training that are called as here, which checks them."""
    shared = {field.name for field in dataclasses.fields(cls)} & {field.name for field in dataclasses.fields(options)}
    return cls(**{name: getattr(options, name) for name in shared - {"network"}}, **changed)


class Frozen(NamedTuple):
    """The networks that a student learns from; what it shares with them is in memory once."""

    teacher: Any
    target: Any  # its average; None: itself


class DistillTask(Task):
    """The network of a stage's training as a student of itself: of the guided teacher that it is at the beginning.

    It has no dropout: of its two halves one would not be the other's function.
    """

    def __init__(self, base: stage_c.StageCTask | stage_b.StageBTask, options: Options):
        super().__init__()
        network = base.network
        if options.rank:
            network.requires_grad_(False)
            teacher = _sharing_copy(network, network.parameters())
            add_lora(network, options.rank, options.rank, options.targets or None)
        else:
            teacher = _sharing_copy(network, ())
        teacher.requires_grad_(False)
        self.base, self.options = base, options
        base.sampler = "lcm"
        target = None
        if options.target_decay:
            target = _sharing_copy(network, (one for one in network.parameters() if not one.requires_grad))
            target.requires_grad_(False)
        self.networks = Frozen(teacher, target)
        self.frozen = (*base.frozen, *(one for one in self.networks if one is not None))
        self.feature_files, self.feature_key = base.feature_files, base.feature_key
        self.reads_captions, self.leaves_out = base.reads_captions, base.leaves_out
        self.target_step = -1

    def features(self, batch: dict) -> dict[str, Tensor]:
        return self.base.features(batch)

    def train(self, mode: bool = True) -> "DistillTask":
        return super().train(False)

    def learned(self) -> dict[str, Tensor]:
        return super().learned() | {f"target.{name}": ours for name, ours, _ in self._averaged()}

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        options, target = self.options, self.networks.target
        if draws.step != self.target_step:
            self._move_target()
            self.target_step = draws.step
        clean, predictor = self.conditioned(batch["features"], draws)
        levels = options.noise_levels
        t = times_of(draws.uniform(levels), options.high_noise).flatten()
        s = (t - 1 / options.intervals).clamp(min=0)
        x = add_noise(clean, draws.normal((levels, *clean.shape[1:])).flatten(0, 1), t)
        with torch.no_grad():
            further = teacher_step(self.guided(predictor), x, t, s, options.teacher_steps)
            goal = consistency(predictor(self.base.network if target is None else target), further, s)
        found = consistency(predictor(self.base.network), x, t)
        return {"consistency": pseudo_huber(found, goal, t, options.p2_k)}

    def conditioned(self, found: dict[str, Tensor], draws: Draws) -> tuple[Tensor, Callable[[nn.Module], Predict]]:
        """Features -> clean latents, each at all its noise levels, and what makes a noise predictor of a network."""
        raise NotImplementedError

    def guided(self, predictor: Callable[[nn.Module], Predict]) -> Predict:
        """The teacher's noise predictor."""
        return predictor(self.networks.teacher)

    def export(self, folder: Path, dtype: torch.dtype) -> list[Path]:
        if not self.options.rank:
            return self.base.export(folder, dtype)
        path = folder / f"{self.options.network.replace('-', '_')}_lora.safetensors"
        save_lora(self.base.network, path, dtype, {"steps": self.options.sample_steps, "cfg": 1.0, "sampler": "lcm"})
        return [path]

    def samples(self) -> Tensor | None:
        return self.base.samples()

    @torch.no_grad()
    def _move_target(self) -> None:
        for _, ours, student in self._averaged():
            ours.lerp_(student.to(ours), 1 - self.options.target_decay)

    def _averaged(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, the target's parameter and the student's, of all that is learned."""
        if self.networks.target is None:
            return []
        ours = dict(self.networks.target.named_parameters())
        return [(name, ours[name], one) for name, one in self.base.network.named_parameters() if one.requires_grad]


class DistillStageC(DistillTask):
    base: stage_c.StageCTask

    def conditioned(self, found, draws):
        levels = self.options.noise_levels
        clean = found["semantic"].repeat_interleave(levels, dim=0)
        return clean, lambda network: stage_c.predictor(network, found["text"], levels)

    def guided(self, predictor):
        conditional, cfg = predictor(self.networks.teacher), self.options.cfg_c
        if cfg == 1:
            return conditional
        nothing = self.base.nothing[0]

        def guided(x: Tensor, t: Tensor) -> Tensor:
            unconditional = stage_c.predictor(self.networks.teacher, nothing.to(x), len(x))
            return torch.lerp(unconditional(x, t), conditional(x, t), cfg)

        return guided


class DistillStageB(DistillTask):
    base: stage_b.StageBTask

    def conditioned(self, found, draws):
        levels = self.options.noise_levels
        semantic = self.base.spoiled(found["semantic"], draws).repeat_interleave(levels, dim=0)
        text = None
        if "text" in found and draws.common.random() >= self.options.text_absent:
            text = found["text"].repeat_interleave(levels, dim=0)
        clean = found["latent"].repeat_interleave(levels, dim=0)
        return clean, lambda network: lambda x, t: network(x, t, semantic, text)


def _sharing_copy(network: nn.Module, shared: Iterable[nn.Parameter]) -> nn.Module:
    """A copy in eval mode that has these parameters in common with the network."""
    return copy.deepcopy(network, {id(parameter): parameter for parameter in shared}).eval()
