"""Grouped attention: see and edit attention at close to the price of the host's fast kernel.

    A = softmax(scale * q k^T + mask)                     (B, H, Q, K), never materialised whole
    m_g = sum_{j in g} A_j                                mass of a query on key group g
    A'_j = f_g(m) * A_j  for j in g                       group factors (what most steering systems are)

Queries that a system edits or looks at are few: all but them go through the host's own kernel, they are computed in
chunks of bounded size. Softmax is in fp32; keys and values of grouped-query attention are never expanded.
`naive_attention` is the readable truth that the fast paths are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.engine.select import columns, take

CHUNK_BYTES = 8 << 20  # fp32 scores of one chunk of rows; bounds the extra memory
PIECE_BYTES = 1 << 20  # the same on a CPU where scores are only summed: they stay in its cache between the steps


@dataclass(frozen=True)
class Call:
    """One attention call, as every host makes it."""

    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, Hkv, K, D)
    value: Tensor  # (B, Hkv, K, Dv)
    mask: Tensor | None  # (B|1, H|1, Q, K) bool (True = attend) or additive float; None: `causal` rules
    causal: bool  # with no mask: query i sees keys 0..i
    scale: float
    weights: bool = False  # the host's kernel returns the weights too, and they are wanted
    only: Tensor | None = None  # (B, K) bool: the tokens that take part, as keys and as queries; None: all

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    def allowed(self) -> Tensor:
        """(B|1, H|1, Q, K) bool: which key each query may attend to."""
        if self.mask is None:
            allowed = torch.ones(self.queries, self.keys, dtype=torch.bool, device=self.query.device)
            return (allowed.tril() if self.causal else allowed)[None, None]
        mask = self.mask[..., : self.keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


@dataclass(frozen=True)
class Edit:
    """What a system does to one attention call. Everything counts columns as the token ledger does (N positions).

    Queries [start, stop) of the block are edited, of these only the ones in `rows`. In order: `boost`, `bias`, `factors`,
    `rewrite`, `gain`, `after`.
    """

    start: int = 0
    stop: int | None = None
    rows: Tensor | None = None  # (B, stop - start) bool
    boost: Tensor | None = None  # (B|1, H|1, 1, <= N): logits w become w + boost |w|, before any bias
    bias: Tensor | None = None  # (B|1, H|1, stop - start | 1, <= N) added to the logits
    groups: Tensor | None = None  # (B, <= N, G) 0/1 in fp32: disjoint key groups; later columns belong to none
    factors: Callable[[Tensor, int], Tensor] | None = None  # (masses (B, H, R, G), first row) -> factors (B, H, R, G)
    rewrite: Callable[[Tensor, int], Tensor] | None = None  # (weights (B, H, R, K), first row) -> weights
    gain: Tensor | None = None  # (B|1, H, stop - start | 1) factor on head outputs
    # (outputs (B, R, H, Dv) of [start, stop), start) -> outputs, or None to leave them; after all edits of the call
    after: Callable[[Tensor, int], Tensor | None] | None = None


@dataclass(frozen=True)
class Probe:
    """Look at the final weights of queries [start, stop): `see(weights (B, H, R, K), first row)`, chunk by chunk."""

    see: Callable[[Tensor, int], None]
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Only:
    """Attention among some tokens: the others are neither seen nor see, their output is zero. Costs what those few cost."""

    tokens: Tensor  # (B, N) bool, by ledger columns; of the running block at least one per row should take part


def attend(
    call: Call, plain: Callable[[], tuple[Tensor, Tensor | None]], edits: Sequence[Edit], probes: Sequence[Probe]
) -> tuple[Tensor, Tensor | None]:
    """Attention with edits and probes.

    Args:
        call: the call.
        plain: the host's own kernel; returns the output (B, Q, H, Dv) and its weights (B, H, Q, K) or None.
        edits: applied in this order.
        probes: see the weights after all edits.

    Returns:
        What `plain` returns, with the edited rows replaced. Rows that no edit touches are the host's, bit for bit.
    """
    output, weights = _attend(call, plain, [e for e in edits if not _only_after(e)], probes)
    for edit in edits:
        if edit.after is not None:
            output = _after(output, edit)
    return output, weights


def _only_after(edit: Edit) -> bool:
    return edit.after is not None and edit.boost is edit.bias is edit.factors is edit.rewrite is edit.gain is None


def _after(output: Tensor, edit: Edit) -> Tensor:
    """(B, Q, H, Dv) outputs with those of the edit's rows replaced."""
    start, stop = edit.start, output.shape[1] if edit.stop is None else edit.stop
    old = output[:, start:stop]
    new = edit.after(old, start)
    if new is None:
        return output
    new = new.to(old.dtype)
    if edit.rows is not None:
        new = torch.where(edit.rows[..., None, None], new, old)
    return new if new.shape == output.shape else torch.cat([output[:, :start], new, output[:, stop:]], 1)


def _attend(
    call: Call, plain: Callable[[], tuple[Tensor, Tensor | None]], edits: Sequence[Edit], probes: Sequence[Probe]
) -> tuple[Tensor, Tensor | None]:
    queries = call.queries
    touched = _union(edits, queries)
    decoding = touched and touched == (0, 1) == (0, queries) and not call.weights
    if decoding and all(e.rows is None for e in edits) and not all(_only_gain(e) for e in edits):
        output, weights = call.query.new_empty(call.query.shape[0], 1, call.query.shape[1], call.value.shape[-1]), None
    else:
        output, weights = plain()
        output = output.clone() if touched and output.requires_grad else output
        weights = weights.clone() if touched and weights is not None and weights.requires_grad else weights
    cheap = _only_gain if weights is not None else _only_bias_or_gain  # a bias would show in the weights
    if touched and not probes and call.only is None and all(cheap(e) for e in edits):
        _write(output, call, edits, touched, lambda a, b: _biased_output(call, edits, a, b))
        return output, weights
    whole = _union([*edits, *probes], queries)
    for a, b in _chunks(call, whole):
        rows = _edited_weights(call, edits, a, b)  # (B, H, R, K) fp32
        for probe in probes:
            lo, hi = _overlap(probe, a, b, queries)
            if lo < hi:
                probe.see(rows[:, :, lo - a : hi - a], lo)
        lo, hi = (max(a, touched[0]), min(b, touched[1])) if touched else (0, 0)
        if lo < hi:
            new = _times_value(rows[:, :, lo - a : hi - a], call.value)
            _put(output, new, edits, lo, hi, queries)
            if weights is not None:
                weights[:, :, lo:hi, : rows.shape[-1]] = rows[:, :, lo - a : hi - a].to(weights.dtype)
    return output, weights


def row_weights(call: Call, start: int, stop: int, bias: Tensor | None = None, boost: Tensor | None = None) -> Tensor:
    """Softmax weights of queries [start, stop): (B, H, R, K) fp32. A row that sees no key is zero, never NaN."""
    heads_kv = call.key.shape[1]
    power = 2.0 ** math.floor(math.log2(call.scale))  # exact, and keeps q k^T in fp16 from overflowing
    query = call.query[:, :, start:stop] * power
    batch, heads, rows, dim = query.shape
    grouped = query.reshape(batch, heads_kv, heads // heads_kv * rows, dim)
    scores = (grouped @ call.key.transpose(-1, -2)).view(batch, heads, rows, call.keys).float() * (call.scale / power)
    scores = scores if boost is None else torch.addcmul(scores, boost, scores.abs())
    scores = _masked(call, scores if bias is None else scores + bias, start, stop)
    if bias is None and call.mask is None and call.only is None:
        return scores.softmax(-1)
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Reference: output (B, Q, H, Dv) and the whole map (B, H, Q, K), fp32. Materialises Q x K."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1).float(), value.repeat_interleave(repeat, 1).float()
    scores = query.float() @ key.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    elif causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and the mass of EVERY query on every group, in one pass of the fast kernel.

    The group indicators ride along as extra value columns (q and k are padded with zeros to keep equal head sizes), so
    no Q x K matrix appears.

    Args:
        query: (B, H, Q, D); key: (B, Hkv, K, D); value: (B, Hkv, K, D).
        groups: (B, K, G) 0/1, any float dtype. Groups may overlap.
        scale, mask, causal: as in `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        Output (B, Q, H, D) and masses (B, H, Q, G), both in the dtype of `value`.
    """
    count, heads_kv = groups.shape[-1], key.shape[1]
    extra = -(-count // 8) * 8  # kernels like multiples of eight
    indicator = F.pad(groups.to(value.dtype), (0, extra - count))[:, None].expand(-1, heads_kv, -1, -1)
    output = F.scaled_dot_product_attention(
        F.pad(query, (0, extra)),
        F.pad(key, (0, extra)),
        torch.cat([value, indicator], -1),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=heads_kv != query.shape[1],
    )
    dim = value.shape[-1]
    return output[..., :dim].transpose(1, 2), output[..., dim : dim + count]


def merge(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    Args:
        output1, output2: (..., D) attention outputs; lse1, lse2: (...) log-sum-exp of their scores (-inf: no key).

    Returns:
        Output (..., D) and log-sum-exp (...), fp32.
    """
    lse = torch.logaddexp(lse1.float(), lse2.float())
    safe = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
    weight1, weight2 = (lse1.float() - safe).exp(), (lse2.float() - safe).exp()
    return weight1[..., None] * output1.float() + weight2[..., None] * output2.float(), lse


def _edited_weights(call: Call, edits: Sequence[Edit], a: int, b: int) -> Tensor:
    boost = _summed(call, edits, [e.boost for e in edits], a, b)
    weights = row_weights(call, a, b, _bias(call, edits, a, b), boost)
    for edit in edits:
        lo, hi = _overlap(edit, a, b, call.queries)
        if lo >= hi or (edit.factors is None and edit.rewrite is None):
            continue
        part = weights[:, :, lo - a : hi - a]
        new = part
        if edit.factors is not None:
            new = apply_factors(new, edit.groups, edit.factors, lo)
        if edit.rewrite is not None:
            new = edit.rewrite(new, lo)
        if edit.rows is not None:
            new = torch.where(edit.rows[:, None, lo - edit.start : hi - edit.start, None], new, part)
        weights = new if (lo, hi) == (a, b) else torch.cat([weights[:, :, : lo - a], new, weights[:, :, hi - a :]], 2)
    return weights


def apply_factors(
    weights: Tensor, groups: Tensor, factors: Callable[[Tensor, int], Tensor], first_row: int = 0
) -> Tensor:
    """Multiply the keys of every group by a factor that depends on the row's group masses.

    Args:
        weights: (B, H, R, K) rows of attention; groups: (B, <= K, G) disjoint 0/1.
        factors: (masses (B, H, R, G), first row) -> factors (B, H, R, G).
        first_row: number of the first row, handed to `factors`.
    """
    batch, heads, rows, keys = weights.shape
    width = min(groups.shape[1], keys)
    member = groups[:, :width].to(weights.dtype)  # (B, K', G)
    head = weights[..., :width]
    masses = (head.reshape(batch, heads * rows, width) @ member).view(batch, heads, rows, -1)
    change = (factors(masses, first_row) - 1).reshape(batch, heads * rows, -1) @ member.transpose(1, 2)
    head = torch.addcmul(head, head, change.view(batch, heads, rows, width))  # change is 0 outside the groups
    return head if width == keys else torch.cat([head, weights[..., width:]], -1)


def _times_value(weights: Tensor, value: Tensor) -> Tensor:
    """(B, H, R, K) x (B, Hkv, K, Dv) -> (B, R, H, Dv), without expanding the value heads."""
    batch, heads, rows, keys = weights.shape
    heads_kv = value.shape[1]
    grouped = weights.to(value.dtype).reshape(batch, heads_kv, heads // heads_kv * rows, keys)
    return (grouped @ value[:, :, :keys]).view(batch, heads, rows, -1).transpose(1, 2)


def _biased_output(call: Call, edits: Sequence[Edit], a: int, b: int) -> Tensor | None:
    """Rows [a, b) under additive biases through the fast kernel; None when there is only a gain to apply."""
    bias = _bias(call, edits, a, b)
    if bias is None:
        return None
    full = _masked(call, bias, a, b)
    output = F.scaled_dot_product_attention(
        call.query[:, :, a:b],
        call.key,
        call.value,
        attn_mask=full.to(call.query.dtype),
        scale=call.scale,
        enable_gqa=call.key.shape[1] != call.query.shape[1],
    )
    return output.transpose(1, 2)


def _write(output: Tensor, call: Call, edits: Sequence[Edit], span: tuple[int, int], compute) -> None:
    for a, b in _chunks(call, span):
        new = compute(a, b)
        if new is None:  # a gain alone; autograd may need the rows as they were
            new = output[:, a:b].clone() if torch.is_grad_enabled() else output[:, a:b]
        _put(output, new, edits, a, b, call.queries)


def _put(output: Tensor, new: Tensor, edits: Sequence[Edit], a: int, b: int, queries: int) -> None:
    """Write rows [a, b) of the output (B, Q, H, Dv), with gains, where some edit covers them."""
    covered = torch.zeros(output.shape[0], b - a, dtype=torch.bool, device=output.device)
    every = False
    for edit in edits:
        lo, hi = _overlap(edit, a, b, queries)
        if lo >= hi:
            continue
        rows = None if edit.rows is None else edit.rows[:, lo - edit.start : hi - edit.start]
        every = every or (rows is None and (lo, hi) == (a, b))
        covered[:, lo - a : hi - a] |= True if rows is None else rows
        if edit.gain is not None:
            part = new[:, lo - a : hi - a] * _gain(edit, lo, hi).to(new.dtype)
            part = part if rows is None else torch.where(rows[:, :, None, None], part, new[:, lo - a : hi - a])
            new = torch.cat([new[:, : lo - a], part, new[:, hi - a :]], 1)
    output[:, a:b] = new if every else torch.where(covered[:, :, None, None], new, output[:, a:b])


def rows_of(call: Call, queries: Tensor, past: Tensor | None = None) -> Tensor:
    """Weights of chosen queries, other ones in every row of the batch: (B, H, R, P + K) fp32.

    Args:
        queries: (B, R) which queries of the call; -1: none, its row is zero.
        past: (B, Hkv, P, D) keys in front of the call's own.
    """
    key = call.key if past is None else torch.cat([past, call.key], 2)
    mask = visible(call, queries, key.shape[2])[:, None]
    asked = replace(call, query=take(call.query, queries, dim=2), key=key, mask=mask, only=None)
    return row_weights(asked, 0, queries.shape[1])


def visible(call: Call, queries: Tensor, keys: int | None = None) -> Tensor:
    """(B, R, keys) bool: which keys the queries (B, R) of a call may see, as all its heads do; none for a query -1."""
    keys = call.keys if keys is None else keys
    if call.mask is None:
        order = torch.arange(keys, device=queries.device)
        last = queries + keys - call.queries if call.causal else torch.full_like(queries, keys)
        return (order <= last[..., None]) & (queries >= 0)[..., None]
    mask = call.mask[:, 0, :, :keys].expand(queries.shape[0], -1, -1)
    mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return take(mask, queries) if mask.shape[1] > 1 else mask & (queries >= 0)[..., None]


@torch.no_grad()
def sums_of(call: Call, queries: Tensor) -> Tensor:
    """What chosen queries give to every key in sum, mean over heads: (B, K) fp32, as `rows_of(...).mean(1).sum(1)`.

    Some heads at a time, so that no (B, H, R, K) appears; on a CPU what is at work stays in its cache.

    Args:
        queries: (B, R) which queries of the call; -1: none.
    """
    heads_kv = call.key.shape[1]
    power = 2.0 ** math.floor(math.log2(call.scale))  # as in `row_weights`
    seen = visible(call, queries)  # (B, R, K)
    asks = seen.any(-1)  # a row that sees no key gives nothing
    bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen & asks[..., None], -torch.inf)
    asked = (take(call.query, queries, dim=2, filled=False) * power).unflatten(1, (heads_kv, -1))  # (B, Hkv, G, R, D)
    total = torch.zeros_like(bias[:, 0])
    for row, (query, key) in enumerate(zip(asked, call.key, strict=True)):
        each = bias[row].numel() * query.shape[1] * 4
        step = max(1, (PIECE_BYTES if key.device.type == "cpu" else CHUNK_BYTES) // each)
        for q, k in zip(query.split(step), key.split(step), strict=True):  # (h, G, R, D), (h, K, D)
            scores = (q.flatten(1, 2) @ k.transpose(1, 2)).float().view(-1, *bias[row].shape)  # (h G, R, K)
            weights = torch.add(bias[row], scores, alpha=call.scale / power).softmax(-1)
            total[row] += asks[row].float().repeat(len(weights)) @ weights.flatten(0, 1)
    return total / call.query.shape[1]


def among(call: Call) -> Tensor:
    """The output (B, Q, H, Dv) of attention among `call.only`: gathered, one run of the fast kernel, put back."""
    keys = columns(call.only)  # (B, k)
    prompt = call.queries == call.keys
    queries = keys if prompt else columns(call.only[:, call.keys - call.queries :])  # (B, p)
    even = len(keys) == 1 or not bool((keys < 0).any())
    mask = None
    if call.mask is not None or not (prompt and call.causal and even):
        mask = take(visible(call, queries), keys, dim=2)[:, None]  # (B, 1, p, k)
        mask = mask | ~mask.any(-1, keepdim=True)  # fillers see all, for kernels that make NaN of nothing
    output = F.scaled_dot_product_attention(
        take(call.query, queries, dim=2, filled=not even),
        take(call.key, keys, dim=2, filled=not even),
        take(call.value, keys, dim=2, filled=not even),
        attn_mask=mask,
        is_causal=mask is None,
        scale=call.scale,
        enable_gqa=call.key.shape[1] != call.query.shape[1],
    ).transpose(1, 2)  # (B, p, H, Dv)
    batch, count = len(queries), call.queries
    place = torch.arange(batch, device=queries.device)[:, None] * count + queries
    place = torch.where(queries < 0, batch * count, place).flatten()  # fillers go behind the end
    full = output.new_zeros(batch * count + 1, *output.shape[2:]).index_copy(0, place, output.flatten(0, 1))
    return full[:-1].view(batch, count, *output.shape[2:])


def _gain(edit: Edit, lo: int, hi: int) -> Tensor:
    """The edit's factor on head outputs of rows [lo, hi), as (B|1, R|1, H, 1)."""
    gain = edit.gain if edit.gain.shape[-1] == 1 else edit.gain[..., lo - edit.start : hi - edit.start]
    return gain.transpose(1, 2)[..., None]


def _masked(call: Call, scores: Tensor, start: int, stop: int) -> Tensor:
    """Scores (..., R, K) of queries [start, stop), -inf where they may not look (additive masks are added)."""
    if call.only is not None:
        own = call.only[:, None, call.keys - call.queries + start : call.keys - call.queries + stop, None]
        scores = scores.masked_fill(~(own & call.only[:, None, None]), -torch.inf)
    if call.mask is not None:
        mask = call.mask[:, :, start:stop, : call.keys] if call.mask.shape[2] > 1 else call.mask[..., : call.keys]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        return (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
    if call.causal:
        order = torch.arange(call.keys, device=scores.device)
        return scores.masked_fill(order > order[start:stop, None], -torch.inf)
    return scores


def _bias(call: Call, edits: Sequence[Edit], a: int, b: int) -> Tensor | None:
    """The sum of the edits' additive biases on rows [a, b), fp32 (B|1, H|1, R, <= K); None: there is none."""
    return _summed(call, edits, [e.bias for e in edits], a, b)


def _summed(call: Call, edits: Sequence[Edit], terms: Sequence[Tensor | None], a: int, b: int) -> Tensor | None:
    """The sum of the edits' terms (B|1, H|1, rows | 1, <= N) on rows [a, b), each in its own rows only."""
    total = None
    for edit, term in zip(edits, terms, strict=True):
        lo, hi = _overlap(edit, a, b, call.queries)
        if term is None or lo >= hi:
            continue
        term = term.float()[..., : call.keys]
        term = term if term.shape[2] == 1 else term[:, :, lo - edit.start : hi - edit.start]
        term = F.pad(term.expand(-1, -1, hi - lo, -1), (0, call.keys - term.shape[-1], lo - a, b - hi))
        if edit.rows is not None:
            rows = F.pad(edit.rows[:, lo - edit.start : hi - edit.start], (lo - a, b - hi))
            term = term.masked_fill(~rows[:, None, :, None], 0.0)  # not a product: a bias may be -inf
        total = term if total is None else total + term
    return total


def _only_bias_or_gain(edit: Edit) -> bool:
    return edit.factors is None and edit.rewrite is None and edit.boost is None


def _only_gain(edit: Edit) -> bool:
    return _only_bias_or_gain(edit) and edit.bias is None


def _overlap(span: Edit | Probe, a: int, b: int, queries: int) -> tuple[int, int]:
    return max(span.start, a), min(queries if span.stop is None else span.stop, b)


def _union(spans: Sequence[Edit | Probe], queries: int) -> tuple[int, int] | None:
    """The smallest range of queries that holds every span; None when there is nothing to do."""
    ends = [_overlap(s, 0, queries, queries) for s in spans]
    ends = [(lo, hi) for lo, hi in ends if lo < hi]
    return (min(lo for lo, _ in ends), max(hi for _, hi in ends)) if ends else None


def _chunks(call: Call, span: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    if span is None:
        return
    batch, heads = call.query.shape[:2]
    step = max(1, CHUNK_BYTES // (4 * batch * heads * call.keys))
    for a in range(span[0], span[1], step):
        yield a, min(a + step, span[1])
