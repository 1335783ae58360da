"""Imports run downwards only, and only `nodes/` knows ComfyUI."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom to the top: a module imports from its own entry and from layers below it, not from those beside it.
LAYERS = [
    ("wuerstchen_core.util",),
    ("wuerstchen_core.geometry", "wuerstchen_core.diffusion", "wuerstchen_core.models.config"),
    ("wuerstchen_core.models.blocks",),
    ("wuerstchen_core.models",),
    ("wuerstchen_core.checkpoints",),
    ("wuerstchen_core.tiling", "wuerstchen_core.offload", "wuerstchen_core.workflow"),
    ("wuerstchen_core.pipeline",),
    ("wuerstchen_core.training.options", "wuerstchen_core.reports"),
    ("wuerstchen_core.training.data", "wuerstchen_core.bulk"),
    ("wuerstchen_core.reports.evaluation",),
    ("wuerstchen_core.training.loop",),
    ("wuerstchen_core.training.stages",),
    ("wuerstchen_core.training.command",),
    ("wuerstchen_core.mini",),
    ("wuerstchen_core.cli",),
    ("wuerstchen_core.__main__", "wuerstchen_core.__init__"),
    ("nodes.host", "nodes.latents", "nodes.images", "nodes.sockets"),
    ("nodes",),
    ("__init__",),
]
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "execution", "server", "latent_preview", "node_helpers"}


def modules(root):
    """Name -> source of each module of the pack; an `__init__` is a module of that name."""
    files = [root / "__init__.py", *root.glob("nodes/**/*.py"), *root.glob("wuerstchen_core/**/*.py")]
    return {".".join(file.relative_to(root).with_suffix("").parts): file.read_text("utf-8") for file in files}


def imported(name, source):
    """Full names of what a module imports, wherever in it that stands."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def edges(sources):
    """Module -> modules of the pack that it imports."""
    found = {}
    for name, source in sources.items():
        found[name] = set()
        for target in imported(name, source):
            if target.startswith(("wuerstchen_core", "nodes.")):
                prefixes = [target, target.rpartition(".")[0]]  # a module, or what is named in one
                known = [one for prefix in prefixes for one in (prefix, f"{prefix}.__init__") if one in sources]
                found[name].update(known[:1])
    return found


def entry(name):
    """(layer, the longest name in LAYERS that the module is or lies in)"""
    fits = [(layer, one) for layer, ones in enumerate(LAYERS) for one in ones if f"{name}.".startswith(f"{one}.")]
    return max(fits, key=lambda fit: len(fit[1]))


def upwards(sources):
    """The imports that don't run downwards, as texts."""
    for name, targets in edges(sources).items():
        for target in targets:
            (layer, own), (other_layer, other) = entry(name), entry(target)
            if own != other and (other_layer > layer or other_layer == layer and not own.startswith("nodes.")):
                yield f"{name} -> {target}"


def test_imports_run_downwards():
    sources = modules(ROOT)
    assert len(sources) > 80 and sum(map(len, edges(sources).values())) > 300
    assert list(upwards(sources)) == []


def test_no_modules_of_the_core_import_each_other():
    core = {name: source for name, source in modules(ROOT).items() if name.startswith("wuerstchen_core.")}
    assert len(list(TopologicalSorter(edges(core)).static_order())) == len(core)  # or CycleError names the cycle


def test_only_nodes_know_the_host():
    for name, source in modules(ROOT).items():
        host = {target.split(".")[0] for target in imported(name, source)} & HOST
        allowed = HOST if name.startswith("nodes.host") else {"comfy_api"}
        assert host <= (allowed if name.startswith(("nodes.", "__init__")) else set()), name


@pytest.mark.parametrize(
    "name, source",
    [
        ("wuerstchen_core.training.data.sources", "from ...mini import emoji"),
        ("wuerstchen_core.training.loop.run", "def later():\n    from ..stages.stage_c import build"),
        ("wuerstchen_core.models.blocks", "from .stage_c import Prior"),
        ("wuerstchen_core.diffusion.guidance", "from ..models import stage_c"),
        ("wuerstchen_core.checkpoints.load", "import wuerstchen_core.pipeline"),
        ("wuerstchen_core.util.errors", "from .. import load_stage_a"),
        ("wuerstchen_core.pipeline", "from .cli.common import load_model"),
    ],
)
def test_an_import_that_runs_upwards_would_be_found(name, source):
    beside = {one: "" for one in modules(ROOT)}
    assert len(list(upwards({**beside, name: source}))) == 1
