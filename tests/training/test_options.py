"""Options of training: files, the command line, and what the shipped configurations say."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import wuerstchen_core as w
from wuerstchen_core import cli
from wuerstchen_core.checkpoints.sets import MINI
from wuerstchen_core.models.semantic_compressor import BackboneStage, SemanticCompressorConfig
from wuerstchen_core.models.stage_b import StageBConfig
from wuerstchen_core.models.stage_c import StageCConfig
from wuerstchen_core.training import command
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.options import listed, literal, load, merge, option, override, read, read_all


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
        ({"data": "x", "prompts": ["a\0b"]}, r"prompts is 'a.x00b': it contains a NUL character"),
        ({"data": "x", "rate": float("nan")}, "c.toml: rate is nan: a finite number is needed"),
        ({"data": "x", "rate": float("inf")}, "c.toml: rate is inf: a finite number is needed"),
        ({"data": "x", "rate": 10**400}, "rate is of 1329 bits: numbers have at most 64 bits"),
        ({"data": "x", "network": {"widths": [-(1 << 63) - 1]}}, "widths is of 64 bits: numbers have at most 64"),
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
    with pytest.raises(w.WuerstchenError, match="bad.toml: not a TOML file"):
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


@pytest.mark.parametrize("folder", ["", " ", "\n"])
def test_a_run_without_a_folder_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(w.WuerstchenError, match="folder is empty: name the folder"):
        w.train("stage-c", config="mini", folder=folder)
    assert cli.main(["train", "lora", "--config", "mini", "--folder", folder]) == 2
    assert "folder is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["stage-b", "stage-c", "lora"])
def test_the_minis_diffusion_losses_are_limited_as_when_it_was_trained(stage):
    path = command.CONFIGS / "mini" / f"{command.STAGES[stage][0]}.toml"
    assert values(stage, load(str(path)))["largest_error"] == 20.0


def classes(stage):
    module = pytest.importorskip(f"wuerstchen_core.training.stages.{command.STAGES[stage][0]}")
    return command.RunOptions, DataOptions, Plan, module.Options


def values(stage, table):
    """Name -> value of all options of a stage."""
    found = {}
    for options in read_all(classes(stage), table, "c.toml"):
        for name, *_ in listed(type(options)):
            found[name] = options
            for part in name.split("."):
                found[name] = getattr(found[name], part)
    return found


def flat(table, prefix=""):
    for name, value in table.items():
        yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


@pytest.mark.parametrize("size", ["mini", "v2"])
@pytest.mark.parametrize("stage", command.STAGES)
def test_shipped_configurations_hold_what_differs_from_the_defaults(stage, size):
    path = command.CONFIGS / size / f"{command.STAGES[stage][0]}.toml"
    table = load(str(path))
    given = values(stage, table)
    assert {"folder", "data", "steps"} <= table.keys()
    defaults = {name: default for name, _, default, _ in listed(*classes(stage))}
    for name, _ in flat(table):
        if name != "network.dropout":  # what is not so small as the mini has one
            assert given[name] != defaults[name], name
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 37 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("size", ["mini", "v2", None])
@pytest.mark.parametrize("stage", command.STAGES)
def test_all_options_are_written_with_their_help_and_taken_back(stage, size, tmp_path, capsys):
    path = str(tmp_path / "all.toml")
    changes = ["--learning-rate", "1e-05", "--folder", 'a "b"\\\x7f ü', "--workers", "0"]
    config = ["--config", size] if size else ["--steps", "7", "--data", "pictures"]
    assert cli.main(["train", stage, *config, *changes, "--write-config", path]) == 0
    assert f"{path}: the options of {stage}" in capsys.readouterr().out
    table = load(path)
    file = str(command.CONFIGS / size / f"{command.STAGES[stage][0]}.toml") if size else None
    expected = {**(load(file) if size else {"steps": 7, "data": "pictures"}), "learning_rate": 1e-5, "workers": 0}
    assert values(stage, table) == values(stage, expected | {"folder": 'a "b"\\\x7f ü'})
    assert {name for name, _ in flat(table)} == {name for name, *_ in listed(*classes(stage))}
    told = " ".join(line.removeprefix("# ") for line in open(path, encoding="utf-8").read().splitlines())
    for name, _, _, help in listed(*classes(stage)):
        assert help in told, name
    again = str(tmp_path / "again.toml")
    assert cli.main(["train", stage, "--config", path, "--write-config", again]) == 0
    assert open(again).read() == open(path).read()


def test_what_must_be_given_is_written_as_a_comment(tmp_path, capsys):
    path = tmp_path / "all.toml"
    assert cli.main(["train", "lora", "--steps", "5", "--write-config", str(path)]) == 0
    assert load(str(path))["steps"] == 5 and not {"folder", "data"} & load(str(path)).keys()
    assert "# folder =   # must be given" in path.read_text().splitlines()
    capsys.readouterr()
    assert cli.main(["train", "lora", "--config", str(path)]) == 2
    assert "all.toml: folder is missing (where the run keeps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--write-config", "gone/all.toml", "--config", "mini"], "gone/all.toml: could not be written (No such file"),
        (["--write-config", "all.toml", "--config", "mini", "--batch", "few"], "batch is 'few': a whole number"),
        (["--write-config", "all.toml", "--steps", "0"], "steps is 0: it must be at least 1"),
        (["--write-config", "all.toml", "--config", "wrong.toml"], "there is no option 'stepps'; there are folder"),
        (["--config", "wrong.toml"], "did you mean steps?"),
        (
            ["--data", "x", "--folder", "y"],
            "stage-c: steps is missing (number of updates of the weights): give --steps",
        ),
    ],
)
def test_what_is_wrong_with_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("stepps = 3")
    assert cli.main(["train", "stage-c", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and len(error) < 500
    assert not (tmp_path / "all.toml").exists()


def test_values_of_python_and_of_dotted_names_go_before_the_table():
    table = {"rate": 1.0, "network": {"widths": [4, 4], "latent_space": {"shift": 0.5}}}
    given = {"data": Path("x"), "prompts": ("b",), "network.latent_space.scale": 3.0, "network": {"heads": (0, 2)}}
    merged = merge(table, given)
    options = read(Options, merged, "c.toml")
    assert (options.data, options.rate, options.prompts) == ("x", 1.0, ("b",))
    assert options.network.widths == (4, 4) and options.network.heads == (0, 2)
    assert (options.network.latent_space.shift, options.network.latent_space.scale) == (0.5, 3.0)
    whole = StageBConfig(widths=(8, 8), heads=(0, 1))
    assert read(Options, merge({"data": "x"}, {"network": whole}), "c.toml").network == whole
    stages = (BackboneStage(True, 4, 2, 32, 1),)
    merged = merge({"data": "x"}, {"compressor": SemanticCompressorConfig(stages=stages)})
    assert read(Options, merged, "c.toml").compressor.stages == stages


@pytest.mark.parametrize(
    "value", [1e-5, 1e22, 0.1, float("inf"), -3, True, "", 'a"\\\n\x7f\u20ac😀', [1, 2], ["a"], [[True, 4]]]
)
def test_a_literal_is_read_as_it_was(value):
    assert tomllib.loads(f"x = {literal(value)}")["x"] == value


def test_messages_about_values_of_any_length_are_short():
    for table in ({"data": "x", "rate": "y" * 10_000}, {"data": "x", "z" * 10_000: 1}, {"data": ["x\x1b"] * 10_000}):
        with pytest.raises(w.WuerstchenError) as told:
            read(Options, table, "c.toml")
        assert len(str(told.value)) < 500 and str(told.value).isprintable()


def test_training_by_python_is_training_by_the_command_line(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(command, "_train", lambda module, *options: runs.append((module.__name__, *options)))
    sizes = {"depth": 2, "width": 64}
    w.train("stage-c", config="mini", folder=tmp_path, data="p", learning_rate=1e-5, prompts=["a"], network=sizes)
    arguments = ["--config", "mini", "--folder", str(tmp_path), "--data", "p", "--learning-rate", "1e-5"]
    arguments += ["--prompts", '["a"]', "--network.depth", "2", "--network.width", "64"]
    assert cli.main(["train", "stage-c", *arguments]) == 0
    assert runs[0] == runs[1] and runs[0][0].endswith("stages.stage_c")
    assert runs[0][1].folder == str(tmp_path) and runs[0][4].network.depth == 2 and runs[0][3].steps == 4000
    w.train("lora", folder="x", data="y", steps=3)  # without a configuration
    assert runs[2][3] == Plan(steps=3)


@pytest.mark.parametrize(
    "stage, options, told",
    [
        ("stage-d", {}, "there is no stage 'stage-d': take one of text-encoder, stage-a, stage-b, stage-c, previewer"),
        ("stage-c", {"config": "mini", "stepps": 3}, "there is no option 'stepps'"),
        ("stage-c", {"config": "mini", "learning_rate": "fast"}, "learning_rate is 'fast': a number is needed"),
        ("stage-c", {"config": "mini", "network": 3}, "network is 3: a table is needed"),
        ("stage-c", {"config": "mini", "network": {"depht": 3}}, "network: there is no option 'depht'"),
        ("stage-c", {"config": "nowhere.toml"}, "nowhere.toml: the configuration can't be read"),
        ("stage-c", {"folder": "x", "steps": 3}, "stage-c: data is missing"),
        ("stage-c", {"config": "mini", "steps": None}, "steps is None: a whole number is needed"),
        ("stage-c", {"config": "mini", "network.depth": object}, "depth is <class 'object'>: a whole number is needed"),
    ],
)
def test_what_is_wrong_with_training_by_python_is_told(stage, options, told):
    with pytest.raises(w.WuerstchenError) as error:
        w.train(stage, **options)
    assert told in str(error.value) and len(str(error.value)) < 500


def test_shipped_networks_are_the_minis_and_the_released_ones():
    for name, load_network, released in (
        ("stage_b", w.load_stage_b, StageBConfig()),
        ("stage_c", w.load_stage_c, StageCConfig()),
    ):
        for size, expected in (("mini", load_network(MINI / f"{name}.safetensors").config), ("v2", released)):
            path = str(command.CONFIGS / size / f"{name}.toml")
            network = read_all(classes(name.replace("_", "-")), load(path), path)[-1].network
            if name == "stage_b":  # the latent space is the compressor's
                network = replace(network, latent_space=expected.latent_space)
            assert network == expected
    path = str(command.CONFIGS / "mini" / "stage_b.toml")
    compressor = read_all(classes("stage-b"), load(path), path)[-1].compressor
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
    assert (
        cli.main(
            [
                "train",
                "stage-c",
                "--config",
                "v2",
                "--network.depth",
                "1",
                "--network.heads",
                "2",
                "--network.width",
                "64",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert "text_encoder: there is no clip_g.safetensors" in told and "released weights" in told
    assert cli.main(["train", "stage-b", "--config", "nothing.toml"]) == 2
    assert "nothing.toml: the configuration can't be read" in capsys.readouterr().err
