"""Configurations of networks that there are not: told when the network is built, and as one line of its file."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests.checkpoints.small import networks
from wuerstchen_core.checkpoints.load import METADATA_KEY, load_network
from wuerstchen_core.models import text_encoder
from wuerstchen_core.models.config import check_config, config_from
from wuerstchen_core.models.latent_space import LatentSpace
from wuerstchen_core.models.semantic_compressor import BackboneStage
from wuerstchen_core.models.stage_b import StageBConfig

NO_NUMBERS = (None, True, "16", "", [], {}, float("nan"), float("inf"), 10**400, 1 << 64)
SMALL = networks()


def wrong():
    """(kind, field, value) of everything that a field cannot be: of another type, or out of its range."""
    for kind, network in SMALL.items():
        for field in dataclasses.fields(network.config):
            values = {
                int: (*NO_NUMBERS, -1, 1.0, 10**9),
                float: (*NO_NUMBERS, -1e300),
                LatentSpace: (
                    None,
                    1,
                    "a",
                    LatentSpace(0.0, 0.0),
                    LatentSpace("a", 1.0),
                    LatentSpace(1.0, float("nan")),
                ),
            }.get(field.type)
            values = values or (None, 4, "abcd", {0: 1}, (None,), ("1",), (2**64,), (float("nan"),), [4, 4])
            yield from ((kind, field.name, value) for value in values)


IMPOSSIBLE = [
    ("stage_a", "widths", ()), ("stage_a", "widths", (0,)), ("stage_a", "scale_factor", 0.0),
    ("stage_a", "scale_factor", -1.0),
    ("stage_a", "latent_channels", 0), ("stage_b", "heads", (0, 3)), ("stage_b", "heads", (0,)),
    ("stage_b", "blocks", (0, 1)),
    ("stage_b", "blocks", (1, 1, 1)), ("stage_b", "semantic", (0, 1)), ("stage_b", "semantic", (True,)),
    ("stage_b", "patch", 0), ("stage_b", "stage_a_scale", 0.0), ("stage_b", "stage_a_scale", -1.0),
    ("stage_b", "dropout", 1.0), ("stage_b", "dropout", -0.1), ("stage_b", "time_width", 3), ("stage_c", "heads", 0),
    ("stage_c", "heads", 5), ("stage_c", "heads", -1), ("stage_c", "time_width", 2), ("stage_c", "depth", 0),
    ("stage_c", "dropout", 10**9), ("semantic_compressor", "stages", ()),
    ("semantic_compressor", "stages", (BackboneStage(True, 0, 2, 8, 1),)),
    ("semantic_compressor", "stages", (BackboneStage(True, 1, 0, 8, 1),)),
    ("semantic_compressor", "stages", (BackboneStage(1, 1, 2, 8, 1),)),
    ("semantic_compressor", "stages", (BackboneStage(True, 1, 2, 8, 0),)), ("semantic_compressor", "stages", (1, 2)),
    ("text_encoder", "heads", 3), ("text_encoder", "context_length", 2), ("text_encoder", "vocabulary", 100),
    ("text_encoder", "layers", 0), ("previewer", "widths", (8, 8)), ("previewer", "widths", (8, 8, 8, 0)),
]  # fmt: skip


def test_a_network_that_cannot_be_says_which_field_is_wrong():
    cases = [*wrong(), *IMPOSSIBLE]
    assert len(cases) > 250
    for kind, field, value in cases:
        config = dataclasses.replace(SMALL[kind].config, **{field: value})
        with pytest.raises(w.WuerstchenError) as caught:
            type(SMALL[kind])(config)
        text = str(caught.value)
        names = {field} | ({"scale", "shift", "expansion", "stride", "layers", "channels", "fused"}
                           if field in ("latent_space", "stages") else set())  # fmt: skip
        assert any(name in text for name in names) and len(text) < 500 and text.isprintable(), (
            kind,
            field,
            value,
            text,
        )


def test_a_file_whose_configuration_cannot_be_is_one_line(tmp_path):
    for kind, network in SMALL.items():
        if kind == "text_encoder":  # of 6 MB
            continue
        path = tmp_path / f"{kind}.safetensors"
        w.save(network, path)
        tensors, told = load_file(path), dataclasses.asdict(network.config)
        cases = [(field, value) for field in told for value in (*NO_NUMBERS, -1, [[[]]], {"a": {"b": []}}, "x" * 10**4)]
        cases += [
            ("colour", 3),
            ("latent_space", {"shift": 1, "scale": 0}),
            ("stages", [[True, 1]]),
            ("stages", [[1] * 9]),
        ]
        for field, value in cases:
            if (field, value) == ("latent_space", {}) or type(told.get(field)) is type(value) is bool:  # these can be
                continue
            header = {"network": kind, "config": told | {field: value}}
            save_file(tensors, path, {METADATA_KEY: json.dumps(header)})
            with pytest.raises(w.WuerstchenError) as caught:
                load_network(kind, path)
            text = str(caught.value)
            assert text.startswith(f"{path}: ") and len(text) < 500 and text.isprintable(), (kind, field, text)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, '{"a":' * 100_000, "{", "[]", "3", '{"network": []}', '{"network": "x"}'),
        *('{"network": "stage_c"}', '{"network": "stage_c", "config": 3}', '{"a": 1, "a": 2}'),
    ],
)
def test_metadata_that_is_no_configuration_is_one_line(tmp_path, text):
    save_file(SMALL["stage_c"].state_dict(), tmp_path / "c.safetensors", {METADATA_KEY: text})
    with pytest.raises(w.WuerstchenError, match="c.safetensors: "):
        w.load_stage_c(tmp_path / "c.safetensors")


def test_a_new_field_with_a_default_needs_no_word_here():
    @dataclasses.dataclass(frozen=True)
    class Later(StageBConfig):
        text_absent: bool = False
        shares: tuple[float, ...] = (0.5,)

    assert config_from(Later, {"text_absent": True, "widths": [8], "shares": [1, 0.5]}) == Later(
        widths=(8,), text_absent=True, shares=(1, 0.5)
    )
    check_config(Later(), heads=0)
    for values in ({"text_absent": 1}, {"shares": [float("nan")]}, {"shares": 0.5}):
        with pytest.raises(w.WuerstchenError, match=next(iter(values))):
            config_from(Later, values)


def test_an_old_open_clip_is_told_and_not_blamed_on_the_file(tmp_path, monkeypatch):
    import open_clip

    w.save(SMALL["text_encoder"], tmp_path / "t.safetensors")
    monkeypatch.setattr(open_clip, "__version__", "2.26.1")
    with pytest.raises(w.WuerstchenError, match=r"open_clip_torch 2.26.1 is too old .*open_clip_torch>=2.27"):
        w.load_text_encoder(tmp_path / "t.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(w.WuerstchenError, match=r"needs open_clip_torch, and importing it failed \(.*open_clip"):
        text_encoder.TextEncoder()


def test_an_error_of_a_library_is_not_blamed_on_the_file(tmp_path):
    class Odd:
        def __getattr__(self, name):
            raise TypeError("a library's own")

    w.save(SMALL["stage_c"], tmp_path / "c.safetensors")
    with pytest.raises(TypeError, match="a library's own"):
        w.load_stage_c(tmp_path / "c.safetensors", operations=Odd())
