"""The parameters that slow-fast adds to a language model: one `SlowBranch` per hybrid layer, and their file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sightline.errors import InputError

KEY = "model.layers.{}.self_attn."  # of the published checkpoints


class SlowBranch(nn.Module):
    """The new parameters of one hybrid layer, under the names of the published checkpoints.

    Args:
        width: D of the states. heads, heads_kv, dim: of the layer's attention.
    """

    def __init__(self, width: int, heads: int, heads_kv: int, dim: int) -> None:
        super().__init__()
        self.heads_kv, self.dim = heads_kv, dim
        self.cross_attn_kv_proj = nn.Linear(width, 2 * heads_kv * dim)
        self.cross_attn_gate_proj = nn.Sequential(nn.Linear(heads * dim, 1), nn.Tanh())
        self.cross_attn_warm_up_gate = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def start_from(self, key: nn.Linear, value: nn.Linear) -> None:
        """Begin with the layer's own projections, head by head."""
        for name in ("weight", "bias"):
            pair = [getattr(one, name) for one in (key, value)]
            pair = [
                torch.zeros_like(one.weight[:, 0]) if p is None else p
                for p, one in zip(pair, (key, value), strict=True)
            ]
            heads = [p.unflatten(0, (self.heads_kv, self.dim)) for p in pair]
            getattr(self.cross_attn_kv_proj, name).copy_(torch.stack(heads, 1).flatten(0, 2))

    def keys_values(self, slow: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n_v, D) normed slow tokens -> keys and values (B, H_kv, n_v, d_h)."""
        both = self.cross_attn_kv_proj(slow).unflatten(2, (self.heads_kv, 2, self.dim))
        return both[:, :, :, 0].transpose(1, 2), both[:, :, :, 1].transpose(1, 2)

    def gate(self, output: Tensor, tanh: bool = True) -> Tensor:
        """(B, n, H d_h) attention before the output projection -> gamma (B, n, 1)."""
        alpha = self.cross_attn_warm_up_gate
        return self.cross_attn_gate_proj(output) * (alpha.tanh() if tanh else alpha)


def branch_state(branch: nn.ModuleDict) -> dict[str, Tensor]:
    """The branch's parameters under the keys of the published checkpoints."""
    return {KEY.format(layer) + name: t for layer, part in branch.items() for name, t in part.state_dict().items()}


def load_branch(branch: nn.ModuleDict, path: str | Path) -> None:
    """Read what `branch_state` names from a safetensors file; other keys in it are left alone.

    Raises:
        InputError: the file is missing or damaged, lacks a key, or holds another shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path).expanduser(), "pt") as file, torch.no_grad():
            held = set(file.keys())
            for name, target in branch_state(branch).items():
                if name not in held:
                    raise InputError(f"{path} has no {name!r}: it holds no slow-fast branch for this model")
                found = file.get_tensor(name)
                if found.shape != target.shape:
                    raise InputError(f"{path}: {name} is {tuple(found.shape)}, this model needs {tuple(target.shape)}")
                target.copy_(found)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}; give a safetensors file of the branch") from error
