"""ComfyUI's own latent nodes, by what they do to the dictionary and to the order of the samples in memory."""

import torch
import torch.nn.functional as F


def rotate(latent, turns):
    """LatentRotate: 1 is 90 degrees."""
    return {**latent, "samples": torch.rot90(latent["samples"], k=turns, dims=[3, 2])}


def flip(latent, dim):
    """LatentFlip"""
    return {**latent, "samples": torch.flip(latent["samples"], dims=[dim])}


def upscale_by(latent, factor, method="nearest-exact"):
    """LatentUpscaleBy, and LatentUpscale to the same size."""
    rows, columns = (round(side * factor) for side in latent["samples"].shape[-2:])
    return {**latent, "samples": F.interpolate(latent["samples"], size=(rows, columns), mode=method)}


def upscale(latent, width, height):
    """LatentUpscale: 8 pixels a position."""
    return {**latent, "samples": F.interpolate(latent["samples"], size=(height // 8, width // 8), mode="nearest-exact")}


def bislerp(latent, factor):
    """LatentUpscaleBy with the method whose result lies in memory channels last."""
    upscaled = upscale_by(latent, factor)["samples"]
    return {**latent, "samples": upscaled.movedim(1, -1).contiguous().movedim(-1, 1)}


def crop(latent, rows, columns):
    """LatentCrop: a view."""
    return {**latent, "samples": latent["samples"][:, :, rows, columns]}


def concat(latent, other, dim):
    """LatentConcat"""
    return {**latent, "samples": torch.cat((latent["samples"], other["samples"]), dim=dim)}


def blend(latent, other, factor):
    """LatentBlend: the first one's keys, the samples mixed."""
    return {**latent, "samples": latent["samples"] * factor + other["samples"] * (1 - factor)}


def from_batch(latent, index):
    """LatentFromBatch"""
    taken = {**latent, "samples": latent["samples"][index : index + 1].clone(), "batch_index": [index]}
    if "noise_mask" in latent:
        mask = latent["noise_mask"]
        taken["noise_mask"] = mask.clone() if len(mask) == 1 else mask[index : index + 1].clone()
    return taken


def repeat(latent, amount):
    """RepeatLatentBatch"""
    return {**latent, "samples": latent["samples"].repeat(amount, 1, 1, 1)}


def rebatch(latent):
    """RebatchLatents with batches of one: the dictionary is a new one, with a mask of ones if there was none."""
    samples = latent["samples"]
    count, _, rows, columns = samples.shape
    mask = latent.get("noise_mask", torch.ones(count, 1, rows * 8, columns * 8))
    return [{"samples": samples[i : i + 1], "noise_mask": mask[i : i + 1], "batch_index": [i]} for i in range(count)]


def save_and_load(latent):
    """SaveLatent, then LoadLatent: the samples alone."""
    return {"samples": latent["samples"].contiguous().clone()}


def set_noise_mask(latent, mask):
    """SetLatentNoiseMask"""
    return {**latent, "noise_mask": mask.reshape((-1, 1, mask.shape[-2], mask.shape[-1]))}
