"""All that the nodes need of ComfyUI itself.

A module of it is imported when it is first used: describing the nodes takes none of ComfyUI's networks.
"""

import importlib

MODULES = ("devices", "fingerprints", "folders", "loading", "lora", "masks", "models", "sampling")


def __getattr__(name: str):
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
