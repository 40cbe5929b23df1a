"""The models people use: one small file per family, and the geometry of their visual tokens."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from sightline.hosts.base import REGISTRY, Host, ViTHost, check, find, get, register

__all__ = ["REGISTRY", "Host", "ViTHost", "check", "find", "get", "load_all", "register"]


def load_all() -> None:
    """Import every host file of this folder, so that REGISTRY is complete. Imports no model code."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
