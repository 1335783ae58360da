"""Progress, Cancel, and previews while Stage C samples."""

import numpy as np
import pytest
import torch

import wuerstchen_core as w
from wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.pipeline import preview, sample_stage_c

# Progress and Cancel


@pytest.mark.parametrize("stage", ["c", "b"])
def test_the_bar_moves_after_every_step(stage, empty, stage_c, stage_b, monkeypatch):
    import comfy.utils

    moves = []

    class Bar:
        def __init__(self, total):
            moves.append(("of", total))

        def update_absolute(self, value, total=None, preview=None):
            moves.append((value, total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    {"c": stage_c, "b": stage_b}[stage](empty(), steps=4)
    assert moves == [("of", 4), (1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("stage", ["c", "b"])
def test_cancel_stops_within_one_step(stage, loaded, empty, stage_c, stage_b, monkeypatch):
    import comfy.model_management as management

    model = loaded[f"stage_{stage}"]
    calls = []

    def denoise(*args):
        calls.append(args)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return type(model.network).denoise(model.network, *args)

    monkeypatch.setattr(model.network, "denoise", denoise)
    with pytest.raises(management.InterruptProcessingException):
        {"c": stage_c, "b": stage_b}[stage](empty(), steps=8)
    assert len(calls) == 2


# Previews while Stage C samples


@pytest.fixture
def previews(monkeypatch):
    """(step, what is shown then) of every step, once the user wants previews."""
    import comfy.cli_args as cli
    import comfy.utils

    monkeypatch.setattr(cli.args, "preview_method", cli.LatentPreviewMethod.Auto)
    monkeypatch.setattr(cli.args, "preview_size", 300)
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, shown, node_id=None: seen.append((value, shown))
    )
    return seen


@pytest.mark.parametrize("given", [True, False])
def test_each_steps_clean_latent_is_shown(given, tiny, text, empty, stage_c, previewer, previewer_file, previews):
    """The first of the batch, as the core predicts it at that step and the previewer draws it."""
    clean = []
    sample_stage_c(
        tiny.stage_c,
        empty(batch_size=2)["samples"],
        text("a cat")[0][0],
        text("")[0][0],
        steps=4,
        cfg=3.0,
        seed=3,
        progress=lambda step, steps, latent: clean.append(latent[:1]),
    )
    stage_c(empty(batch_size=2), steps=4, cfg=3.0, **({"previewer": previewer} if given else {}))
    network = w.load_previewer(previewer_file if given else LINEAR_PREVIEW)
    assert [step for step, _ in previews] == [1, 2, 3, 4]
    for (_, (kind, shown, longest)), predicted in zip(previews, clean, strict=True):
        assert kind == "JPEG" and shown.mode == "RGB" and shown.size == (24, 24) and longest == 300
        expected = (preview(network, predicted)[0] * 255).numpy()
        assert np.abs(np.array(shown) - expected).max() <= 1
    assert not np.array_equal(np.array(previews[0][1][1]), np.array(previews[-1][1][1]))


def test_previews_change_nothing_in_the_latent(empty, stage_c, previewer, previews):
    shown = stage_c(empty(), previewer=previewer)["samples"]
    previews.clear()
    plain = stage_c(empty())["samples"]
    assert previews and shown.equal(plain)


def test_nobody_who_chose_no_previews_gets_any(empty, stage_c, previewer, previews, monkeypatch):
    import comfy.cli_args as cli
    import comfy.model_management as management

    monkeypatch.setattr(cli.args, "preview_method", cli.LatentPreviewMethod.NoPreviews)
    moved = []
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **_: moved.extend(models))
    hook = previewer.network.register_forward_pre_hook(lambda *_: pytest.fail("it was drawn all the same"))
    stage_c(empty(), previewer=previewer)
    hook.remove()
    assert previews and all(shown is None for _, shown in previews)
    assert previewer.patcher not in moved


def test_the_previewer_is_loaded_before_stage_c(loaded, empty, stage_c, text, previewer, previews, monkeypatch):
    """What is loaded last stays, should there be room for one only."""
    import comfy.model_management as management

    positive, negative = text("a cat"), text("")
    moved = []
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **_: moved.extend(models))
    stage_c(empty(), previewer=previewer, positive=positive, negative=negative)
    assert moved[-2:] == [previewer.patcher, loaded["stage_c"].patcher]


def test_a_latent_that_is_not_finite_is_stage_cs_error(loaded, empty, stage_c, previews, monkeypatch):
    network = loaded["stage_c"].network
    monkeypatch.setattr(network, "denoise", lambda x, *_: torch.full_like(x, float("nan")))
    with pytest.raises(ValueError, match="Stage C gave values that are not finite"):
        stage_c(empty(), steps=2)
    assert [shown for _, shown in previews] == [None, None]


def test_a_previewer_for_other_latents_is_refused(run, module, empty, stage_c, tmp_path, previews):
    w.save(Previewer(PreviewerConfig(12, widths=())), tmp_path / "other.safetensors")
    other = module("nodes.host").LOADERS["previewer"](tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="this previewer is for latents of 12 channels, not of 16"):
        run("WuerstchenSemanticPreview", latent=empty(), previewer=other)
    with pytest.raises(ValueError, match="this previewer is for latents of 12 channels, not of 16"):
        stage_c(empty(), previewer=other)
