"""Compiled code and systems: `torch.compile` does not look at hooks, and would run the plain model, or systems long gone.

While systems are attached, `torch.compile` is therefore ignored in this process; compiled code is kept for afterwards.
`generate` with a static cache compiles by itself on GPUs, so this concerns people who never asked for it.
"""

from __future__ import annotations

from contextlib import ExitStack
from threading import Lock
from typing import Any

_lock = Lock()
_open = 0  # attachments that act, of all models
_stance: Any = None  # what `torch.compiler` was told before the first of them


def run_uncompiled(undo: ExitStack) -> None:
    """Ignore `torch.compile` until `undo`, and until all others who asked for it have left too."""
    import torch

    global _open, _stance
    with _lock:
        _open += 1
        if _open == 1:
            _stance = torch.compiler.set_stance("force_eager")
    undo.callback(_leave)


def _leave() -> None:
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            _stance.__exit__(None, None, None)
