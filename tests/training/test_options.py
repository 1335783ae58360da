"""Options of training: files, the command line, and what the shipped configurations say."""

from dataclasses import dataclass, replace

import pytest

import wuerstchen_core as w
from wuerstchen_core import cli
from wuerstchen_core.checkpoints.sets import MINI
from wuerstchen_core.models.semantic_compressor import BackboneStage, SemanticCompressorConfig
from wuerstchen_core.models.stage_b import StageBConfig
from wuerstchen_core.models.stage_c import StageCConfig
from wuerstchen_core.training import command
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop.run import Plan
from wuerstchen_core.training.options import listed, load, option, override, read, read_all


@dataclass(frozen=True)
class Options:
    data: str = option(help="the folder")
    rate: float = option(1e-4, "50 % of it")
    prompts: tuple[str, ...] = option(("a",), "texts")
    loud: bool = option(False, "or not")
    network: StageBConfig = option(StageBConfig(widths=(8, 8)), "the sizes")
    compressor: SemanticCompressorConfig = option(SemanticCompressorConfig())


def test_a_table_becomes_options_and_what_it_lacks_stays_as_it_is():
    stages = [[True, 4, 2, 32, 1], [False, 6, 1, 64, 2]]
    table = {"data": "x", "rate": 1, "network": {"heads": [0, 2], "latent_space": {"scale": 2.5}}}
    options = read(Options, table | {"compressor": {"stages": stages}}, "c.toml")
    assert options.rate == 1.0 and isinstance(options.rate, float)
    assert options.network.heads == (0, 2) and options.network.widths == (8, 8)
    assert options.network.latent_space.scale == 2.5 and options.network.latent_space.shift == 1.0
    assert options.compressor.stages == (BackboneStage(True, 4, 2, 32, 1), BackboneStage(False, 6, 1, 64, 2))


@pytest.mark.parametrize(
    "table, told",
    [
        ({}, r"c.toml: data is missing \(the folder\)"),
        ({"data": 3}, "c.toml: data is 3: a text is needed"),
        ({"data": "x", "rate": "fast"}, "rate is 'fast': a number is needed"),
        ({"data": "x", "loud": 1}, "loud is 1: true or false is needed"),
        ({"data": "x", "prompts": "a"}, "prompts is 'a': a list is needed"),
        ({"data": "x", "prompts": [1]}, "prompts is 1: a text is needed"),
        ({"data": "x", "speed": 1}, "there is no option 'speed'; there are data, rate, prompts"),
        ({"data": "x", "network": {"depth": 1}}, "network: there is no option 'depth'; there are latent_channels"),
        ({"data": "x", "network": {"widths": [1.5]}}, "network: widths is 1.5: a whole number is needed"),
        ({"data": "x", "network": 4}, "network is 4: a table is needed"),
        ({"data": "x", "compressor": {"stages": [[True]]}}, "a list of fused, expansion, stride, channels, layers"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(table, told):
    with pytest.raises(w.WuerstchenError, match=told):
        read(Options, table, "c.toml")


def test_the_command_line_goes_before_the_file():
    given = {"data": "2024", "rate": "1e-3", "prompts": '["b, c"]', "network.latent_space.scale": "3", "loud": "true"}
    table = {"data": "x", "network": {"widths": [4, 4], "latent_space": {"shift": 0.5}}}
    merged = override((Options,), table, given)
    options = read(Options, merged, "c.toml")
    assert (options.data, options.rate, options.prompts, options.loud) == ("2024", 1e-3, ("b, c",), True)
    assert options.network.widths == (4, 4)
    assert (options.network.latent_space.shift, options.network.latent_space.scale) == (0.5, 3.0)
    assert table["network"] == {"widths": [4, 4], "latent_space": {"shift": 0.5}}
    for text, read_as in (('"quoted"', "quoted"), ("", ""), ("a cat = 1", "a cat = 1"), ("true", "true")):
        assert read(Options, override((Options,), {}, {"data": text}), "c.toml").data == read_as


def test_files_that_are_none(tmp_path):
    with pytest.raises(w.WuerstchenError, match="nowhere.toml: the configuration can't be read"):
        load(str(tmp_path / "nowhere.toml"))
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(w.WuerstchenError, match="bad.toml: this is no TOML"):
        load(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5: it must be from 0 to 1"),
        ({"mixed_precision": "half"}, "mixed_precision is 'half': take one of no, fp16, bf16"),
        ({"dtype": "int8"}, "dtype is 'int8': take one of float32"),
        ({"warm_up": -1}, "warm_up is -1"),
    ],
)
def test_a_plan_out_of_range_is_refused(changes, told):
    with pytest.raises(w.WuerstchenError, match=told):
        Plan(**{"steps": 3, **changes})


def classes(stage):
    module = pytest.importorskip(f"wuerstchen_core.training.stages.{command.STAGES[stage][0]}")
    return command.RunOptions, DataOptions, Plan, module.Options


@pytest.mark.parametrize("size", ["mini", "v2"])
@pytest.mark.parametrize("stage", command.STAGES)
def test_shipped_configurations_name_and_explain_every_option(stage, size):
    """Each option stands in the file, with a comment; those of networks under their table's."""
    path = command.CONFIGS / size / f"{command.STAGES[stage][0]}.toml"
    table, lines = load(str(path)), path.read_text("utf-8").splitlines()
    read_all(classes(stage), table, str(path))
    for name, *_ in listed(*classes(stage)):
        at = table
        for part in name.split("."):
            assert part in at, f"{path}: {name}"
            at = at[part]
        if "." not in name:
            number = next(n for n, line in enumerate(lines) if line.startswith(f"{name} = "))
            assert lines[number - 1].startswith("# ") or " # " in lines[number], name


def test_shipped_networks_are_the_minis_and_the_released_ones():
    for name, load_network, released in (
        ("stage_b", w.load_stage_b, StageBConfig()),
        ("stage_c", w.load_stage_c, StageCConfig()),
    ):
        for size, expected in (("mini", load_network(MINI / f"{name}.safetensors").config), ("v2", released)):
            path = str(command.CONFIGS / size / f"{name}.toml")
            network = read(type(expected), load(path)["network"], path)
            if name == "stage_b":  # the latent space is the compressor's
                network = replace(network, latent_space=expected.latent_space)
            assert network == expected
    path = str(command.CONFIGS / "mini" / "stage_b.toml")
    compressor = read(SemanticCompressorConfig, load(path)["compressor"], path)
    assert compressor == w.load_semantic_compressor(MINI / "semantic_compressor.safetensors").config


@pytest.mark.parametrize("stage", command.STAGES)
def test_help_lists_every_option_with_its_default(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", stage, "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for name, _, _, help in listed(*classes(stage)):
        assert f"--{name.replace('_', '-')} " in told
        assert help
    assert "(default: 0.0001)" in told and "(must be given)" in told


def test_options_that_do_not_exist_are_refused(capsys):
    for arguments in (["train", "stage-c", "--config", "mini", "--stepps", "3"], ["generate", "a", "--stepps", "3"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert "unrecognized arguments: --stepps 3" in capsys.readouterr().err


def test_a_stage_that_lacks_its_files_says_which(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "stage-c", "--config", "v2", "--network.depth", "1", "--network.width", "64"]) == 2
    told = capsys.readouterr().err
    assert "text_encoder: there is no clip_g.safetensors" in told and "released weights" in told
    assert cli.main(["train", "stage-b", "--config", "nothing.toml"]) == 2
    assert "nothing.toml: the configuration can't be read" in capsys.readouterr().err
