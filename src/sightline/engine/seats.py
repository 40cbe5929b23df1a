"""A seat beside every attention module: where the host's attention call meets the systems.

transformers' models fetch their attention function by name; ours is registered under two names that begin like the host's
own ("sdpa" or "eager") so that masks are made in the same form, and finds its seat as an attribute of the module.
timm calls torch's SDPA directly; there a `TorchFunctionMode` around the module's forward stands in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sightline.engine.attention import Call, Edit, Only, Probe, among, apply_factors, attend, rows_of
from sightline.engine.depth import Held, spread
from sightline.engine.select import take
from sightline.errors import HostError

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.attach import Attachment

# Never a name with "flash" in it: transformers would then send packed sequences and other masks.
NAMES = {"sdpa": "sightline", "eager": "sightline_eager"}
SEAT = "_sightline"


@dataclass
class Seat:
    """The engine's place at one attention module."""

    attachment: Attachment
    tower: str
    layer: int
    layers: int
    plain: str  # "sdpa", "eager" or "fused": the host's own kernel
    peeking: Callable[[Call], None] | None = None  # stands in for the attention while a layer is only looked at

    def take(self, module: nn.Module, undo: ExitStack) -> None:
        """Sit down beside `module`; `undo` gets up again."""
        module.__dict__[SEAT] = self
        undo.callback(module.__dict__.pop, SEAT, None)
        if self.plain == "fused":
            _intercept(module, self, undo)

    def run(self, call: Call, plain: Any) -> tuple[Tensor, Tensor | None]:
        """The call under all systems; the host's own kernel when none wants anything of this layer."""
        self.attachment.doors.heard.add(self.tower)
        if self.peeking is not None:
            self.peeking(call)
        if self.tower == "text" and self.attachment.sequences.current is None:
            return plain()
        if self.tower == "text":
            mask = self.attachment.doors.mask(call, self.layer)
            if mask is not None:
                call, plain = replace(call, mask=mask, causal=False), partial(plain, mask)
        wishes = self.attachment.call("attention" if self.tower == "text" else "vision_attention",
                                      self.tower, self.layer, self.layers, call.query.shape[1], call=call)  # fmt: skip
        if not wishes:
            return plain()
        wishes = [w for wish in wishes for w in (wish if isinstance(wish, (list, tuple)) else [wish])]
        if self.tower == "text":
            cuts, whole = self.attachment.sequences.current.cuts, self.attachment.sequences.current.tokens
            depth = cuts.depths[self.layer]
            width = (whole if depth is None else depth.tokens).shape[1]
            held = cuts.held.get(self.layer)
            heads = call.query.shape[1]
            wishes = [
                _on_keys(w, width, call.keys) if held is None else _on_held(w, held, width, heads) for w in wishes
            ]
        for wish in wishes:
            if isinstance(wish, Only):
                call = replace(call, only=wish.tokens if call.only is None else wish.tokens & call.only)
        edits, probes = ([w for w in wishes if isinstance(w, kind)] for kind in (Edit, Probe))
        return attend(call, plain if call.only is None else lambda: (among(call), None), edits, probes)

    def peek(self, forward: Callable[[], Any], queries: Tensor, past: Tensor | None) -> Tensor:
        """Attention rows of a layer that goes no further.

        Args:
            forward: runs the layer without a cache.
            queries: (B, R) which queries of the block.
            past: (B, Hkv, P, D) keys cached earlier.

        Returns:
            (B, H, R, P + Q) fp32.
        """
        found: list[Tensor] = []

        def see(call: Call) -> None:
            found.append(rows_of(call, queries, past))
            raise _Peeked

        self.peeking = see
        try:
            with torch.no_grad():
                forward()
        except _Peeked:
            return found[0]
        finally:
            self.peeking = None
        raise HostError("a decoder layer did not call its attention: its rows cannot be seen before tokens are dropped")


class _Peeked(Exception):
    """A layer was looked at, and shall not go on."""


Wish = Edit | Only | Probe


def _on_keys(wish: Wish, width: int, keys: int) -> Wish:
    """The wish with its ledger columns moved onto the keys that a sliding-window cache still has, the last ones."""
    dropped = max(0, width - keys)
    if dropped == 0 or isinstance(wish, Probe):
        return wish
    if isinstance(wish, Only):
        return Only(wish.tokens[:, dropped:])
    groups = None if wish.groups is None else wish.groups[:, dropped:]
    bias = None if wish.bias is None else wish.bias[..., dropped:]
    boost = None if wish.boost is None else wish.boost[..., dropped:]
    return replace(wish, groups=groups, bias=bias, boost=boost)


def _on_held(wish: Wish, held: Held, width: int, heads: int) -> Wish:
    """The wish with its ledger columns moved onto the keys that are left after tokens were taken out of the cache."""
    index = held.of_heads(width)
    if index.dim() == 3:
        index = index.repeat_interleave(heads // index.shape[1], 1)  # (B, H, K)
        wish = _of_heads(wish)

    def spread_out(weights: Tensor) -> Tensor:
        return spread(weights, index, width)

    def drawn_in(x: Tensor, dim: int, keys: int) -> Tensor:
        last = index[..., index.shape[-1] - keys :]
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, width - x.shape[dim]))
        if last.dim() == 2:
            return take(x.expand(index.shape[0], *x.shape[1:]), last, dim=dim)
        x = x.expand(*last.shape[:2], *x.shape[2:]).flatten(0, 1)  # every head a row
        return take(x, last.flatten(0, 1), dim=dim - 1).unflatten(0, last.shape[:2])

    if isinstance(wish, Only):
        return Only(drawn_in(wish.tokens, 1, index.shape[-1]))
    if isinstance(wish, Probe):
        return replace(wish, see=lambda weights, first: wish.see(spread_out(weights), first))
    rewrite = wish.rewrite and (
        lambda weights, first: drawn_in(wish.rewrite(spread_out(weights), first), 3, weights.shape[3])
    )
    groups = None if wish.groups is None else drawn_in(wish.groups, 1, index.shape[-1])
    bias = None if wish.bias is None else drawn_in(wish.bias, 3, index.shape[-1])
    boost = None if wish.boost is None else drawn_in(wish.boost, 3, index.shape[-1])
    return replace(wish, groups=groups, bias=bias, boost=boost, rewrite=rewrite)


def _of_heads(wish: Wish) -> Wish:
    """The wish for heads that hold different tokens: group factors become a rewrite, which sees the ledger's columns."""
    if isinstance(wish, Only):
        raise HostError("attention among some tokens cannot go with heads that hold different tokens in their caches")
    if isinstance(wish, Probe) or wish.factors is None:
        return wish

    def rewrite(weights: Tensor, first: int) -> Tensor:
        changed = apply_factors(weights, wish.groups, wish.factors, first)
        return changed if wish.rewrite is None else wish.rewrite(changed, first)

    return replace(wish, groups=None, factors=None, rewrite=rewrite)


def switch_attention(model: nn.Module, root: nn.Module, modules: list[nn.Module], undo: ExitStack) -> dict[int, str]:
    """Point the configs of these attention modules to our function; returns {id(module): the host's own kernel}.

    Raises:
        HostError: an attention implementation that shows no attention (flash, flex, ...), or code that does not go
            through transformers' attention interface.
    """
    _register()
    configs = {
        id(c): c
        for c in [getattr(root, "config", None), *(getattr(m, "config", None) for m in modules)]
        if c is not None
    }
    for module in modules:
        if getattr(module, "config", None) is None:
            raise HostError(
                f"{type(module).__name__} keeps no config: it does not use transformers' attention interface"
            )
    own = {}
    for key, config in configs.items():
        name = config._attn_implementation or "eager"
        if name in NAMES.values():
            raise HostError(
                f"{type(root).__name__} shares its configuration object with another model that carries systems: "
                "leave that one first, or build this one from a copy (copy.deepcopy(config))"
            )
        if name not in NAMES:
            raise HostError(
                f"attention implementation {name!r} cannot be seen or edited: load the model with "
                f"attn_implementation='sdpa' (just as fast here) or call model.set_attn_implementation('sdpa')"
            )
        own[key] = name
        undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
        config._attn_implementation_internal = NAMES[name]
    return {id(m): own[id(m.config)] for m in modules}


def _register() -> None:
    """Make our names known to transformers (process-wide, idempotent; harmless to models that do not use them)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, mask in (("sightline", sdpa_mask), ("sightline_eager", eager_mask)):
        AttentionInterface.register(name, attention_function)
        AttentionMaskInterface.register(name, mask)  # without this, create_causal_mask silently returns None


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: query (B, H, Q, D), key and value (B, Hkv, K, D) -> output (B, Q, H, D), weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seat: Seat | None = module.__dict__.get(SEAT)
    inner = sdpa_attention_forward
    if seat is not None and seat.plain == "eager":
        inner = sys.modules[type(module).__module__].eager_attention_forward
    if is_causal is not None:
        kwargs["is_causal"] = is_causal

    def plain(mask: Tensor | None = attention_mask) -> tuple[Tensor, Tensor | None]:
        if mask is not attention_mask and key.shape[2] > mask.shape[-1]:  # the rest of a static cache is still empty
            closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (0, key.shape[2] - mask.shape[-1]), value=closed)
        return inner(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)

    if seat is None:
        return plain()
    unusual = [k for k in ("softcap", "position_bias", "s_aux") if kwargs.get(k) is not None]
    if unusual:
        raise HostError(
            f"{type(module).__name__} uses {', '.join(unusual)} in its attention, which sightline cannot edit"
        )
    _refuse_dropout(dropout)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(attention_mask is None and query.shape[2] > 1 and causal)
    if causal and key.shape[2] > query.shape[2]:  # prefill into a static cache: the rest is still empty
        key_now, value_now = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    else:
        key_now, value_now = key, value
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shown = seat.plain == "eager"
    return seat.run(Call(query, key_now, value_now, attention_mask, causal, scale, shown), plain)


def _refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise HostError(f"attention dropout is {dropout}: call model.eval(), or set it to 0, before attaching")


def _intercept(module: nn.Module, seat: Seat, undo: ExitStack) -> None:
    """Stand in for `F.scaled_dot_product_attention` while `module` runs (timm's fused attention)."""
    if getattr(module, "fused_attn", True) is False:
        raise HostError(
            f"{type(module).__name__}.fused_attn is False: set it to True (TIMM_FUSED_ATTN=1) before attaching"
        )
    modes: list[TorchFunctionMode] = []

    def enter(module: nn.Module, args: tuple) -> None:
        modes.append(_SDPA(seat))
        modes[-1].__enter__()

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    undo.callback(module.register_forward_pre_hook(enter).remove)
    undo.callback(module.register_forward_hook(leave, always_call=True).remove)


class _SDPA(TorchFunctionMode):
    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self.seat = seat

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        _refuse_dropout(kwargs.get("dropout_p", 0.0))
        query, key, value = args[:3]
        mask = kwargs.get("attn_mask")
        while mask is not None and mask.dim() < 4:  # torch broadcasts it so
            mask = mask[None]
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5

        def plain() -> tuple[Tensor, None]:
            return func(*args, **kwargs).transpose(1, 2), None

        call = Call(query, key, value, mask, bool(kwargs.get("is_causal")), scale)
        with torch._C.DisableTorchFunction():
            output, _ = self.seat.run(call, plain)
        return output.transpose(1, 2)
