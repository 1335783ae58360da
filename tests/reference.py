"""What the comparisons with independent implementations share."""

import json
import math
import tempfile
from functools import cache
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from transformers import CLIPTokenizer


def distance(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def randomise(network):
    """Weights at which every part of the network matters (several start at zero)."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data.normal_(std=fan**-0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.data.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


def fill_zeros(network):
    """As initialised, but for what starts at zero, which would hide what depends on it."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return network.eval()


@cache
def clip_tokenizer():
    """transformers' tokenizer of CLIP, from the vocabulary that open_clip carries."""
    vocabulary = SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = {marks.get(token, token): number for token, number in vocabulary.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.bpe_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


def signal(t):
    """The share of the signal at a time, by the formula (DDPM's cosine schedule, clamped as in training)."""
    s = 0.008
    value = math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
    return min(max(value, 1e-4), 0.9999)


def predictor(x, t):
    """Some noise that depends on both arguments, in any precision."""
    return torch.tanh(x * (1 + t)) + 0.3 * t


def steps_of_diffusers(times):
    """(t, u, signal at t, signal at u) of a run's steps, for samplers that are to end as diffusers' do: at time 0,
    where alpha_bar is 0.9999, and not at the clean latent."""
    signals = [signal(t) for t in times]
    return zip(times, times[1:], signals, signals[1:], strict=False)
