"""Everything about a model that attaching may touch, so that tests can ask whether a trace was left."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")  # fmt: skip


def trace(model: nn.Module) -> dict[str, Any]:
    """Hooks, attributes and class of every module; attention name and contents of every config; weights by version."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        found[name, "dict"] = sorted(module.__dict__)
        found[name, "hooks"] = [list(getattr(module, kind, {})) for kind in HOOKS]
        found[name, "forward"] = module.__dict__.get("forward")
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            found[name, "attention"] = (id(config), config._attn_implementation)
            found[name, "config"] = config.to_dict()
    for name, p in model.named_parameters():
        found[name, "weight"] = (p.data_ptr(), p._version)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two traces, in words."""
    keys = {*before, *after}
    return sorted(f"{key[0] or 'model'} ({key[1]})" for key in keys if before.get(key) != after.get(key))
