"""`record`: see attention while a model runs, cheaply, without changing a bit of what it computes.

Each forward gives one row: that of the last query, which decides the next token. Its mass on each key group is always
kept (T, L, B, H, G); its weights on the image, sink values, the tower's attention and whole maps only when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sightline.engine.attention import Edit, Probe
from sightline.engine.pictures import Pictures
from sightline.engine.sinks import check_tau, default_tau, sink_dims_of, sink_value
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role, Tokens
from sightline.errors import InputError, ParameterError, SizeError

GROUPS = ("start", "before", "image", "visual sink", "after", "generated")
TOWER = ("cls", "received", "maps")


@dataclass
class Seen:
    """What one batch of sequences looked like. T forwards, L layers, B rows, H heads, N prompt positions."""

    tokens: Tokens  # the ledger of the prompt
    columns: Tensor  # (B, V) column of every visual token, -1 where a row has fewer
    phi: dict[int, Tensor] = field(default_factory=dict)  # layer -> (B, N) sink values of the prompt
    tower: dict[int, Tensor] = field(default_factory=dict)  # tower layer -> attention there, see `record`
    maps: list[dict[int, Tensor]] = field(default_factory=list)  # per forward: layer -> (B, H, Q, K)
    ledgers: dict[int, Tokens] = field(default_factory=dict)  # layer -> what it has seen of the prompt
    pictures: Pictures | None = None  # the encoding of its pictures, where a system asked for it
    _masses: list[list[Tensor]] = field(default_factory=list, repr=False)
    _rows: list[list[Tensor]] = field(default_factory=list, repr=False)

    @property
    def masses(self) -> Tensor:
        """(T, L, B, H, G) fp32: mass of every forward's last query on each group of GROUPS; sums to 1 over G."""
        return torch.stack([torch.stack(step) for step in self._masses]).cpu()

    @property
    def rows(self) -> Tensor:
        """(T, L, B, H, V) fp16: weights of every forward's last query on the visual tokens."""
        if not self._rows or not self._rows[0]:
            raise InputError("image rows were not recorded: use record(image_rows=True)")
        return torch.stack([torch.stack(step) for step in self._rows]).cpu()

    @property
    def places(self) -> Tensor:
        """(B, V) which visual token of its image each entry of `rows` is, -1 where a row has fewer."""
        found = self.tokens.index.gather(1, self.columns.clamp(min=0))
        return found.masked_fill(self.columns < 0, -1).cpu()

    def sinks(self, tau: float) -> Tensor:
        """(L, B, N) bool: prompt positions with phi above tau."""
        return torch.stack([self.phi[layer] for layer in sorted(self.phi)]) > tau


class Recorder(System):
    """An observer among the systems of `attach`; made by `record`."""

    def __init__(
        self,
        *,
        image_rows: bool,
        sinks: bool,
        maps: bool,
        tower: str | None,
        tau: float | None,
        sink_dims: tuple[int, ...] | None,
        limit_mb: float,
    ) -> None:
        if tower is not None and tower not in TOWER:
            raise ParameterError(f"tower={tower!r} is not known; choose one of {', '.join(TOWER)}, or None")
        self.image_rows, self.sinks, self.maps, self.tower = image_rows, sinks, maps, tower
        self.tau, self.sink_dims = tau, sink_dims
        self.limit = limit_mb * 2**20
        self.sequences: list[Seen] = []
        self.tower_seen: dict[int, Tensor] = {}
        self._bytes = 0

    @property
    def seen(self) -> Seen:
        """The last sequence that has an image (guidance and contrastive decoding run others beside it), else the last."""
        if not self.sequences:
            raise InputError("nothing was recorded yet: run the model while the recorder is attached")
        with_image = [s for s in self.sequences if s.tokens.has_image]
        return (with_image or self.sequences)[-1]

    def stations(self) -> tuple[str, ...]:
        if self.tower is not None and not self.has_text:
            return ("vision_attention",)
        tower = () if self.tower is None else ("vision_attention",)
        return (*tower, "hidden", "attention") if self.sinks else (*tower, "attention")

    def prepare(self, shape: Shape) -> dict[str, Any]:
        self.has_text = shape.heads > 0
        if not self.sinks or not self.has_text:
            return {"dims": (), "tau": float("inf")}
        tau = default_tau(shape.hidden_size) if self.tau is None else self.tau
        check_tau(tau, shape.hidden_size)
        dims = sink_dims_of(shape, tau) if self.sink_dims is None else tuple(self.sink_dims)
        self.setup = {"dims": dims, "tau": tau}
        return self.setup

    def hidden(self, site: Site, hidden: Tensor) -> None:
        """Sink values of the prompt, per layer."""
        if not site.prefill or site.second:
            return
        seen = self._seen(site)
        phi = sink_value(hidden, site.setup["dims"])  # (B, Q)
        phi = _everywhere(torch.nn.functional.pad(phi, (site.start, 0)), site)  # (B, N)
        before = seen.phi.get(site.layer)
        if before is not None and site.start > 0:
            phi = phi + torch.nn.functional.pad(before, (0, phi.shape[1] - before.shape[1]))
        seen.phi[site.layer] = phi
        self._count(phi)

    def attention(self, site: Site) -> list[Edit | Probe]:
        if site.second:  # the answer's own attention is meant
            return []
        seen = self._seen(site)
        if site.prefill:
            seen.ledgers[site.layer], seen.pictures = site.tokens, site.pictures
        if site.layer == 0:
            seen._masses.append([])
            seen._rows.append([])
            if self.maps:
                self._check_maps(site)
                seen.maps.append({})
        member = self._member(site, seen)
        probes: list[Edit | Probe] = [Probe(lambda w, _: self._last(site, seen, member, w), start=site.queries - 1)]
        if self.maps:
            parts: list[Tensor] = []
            probes.append(Probe(lambda w, _: self._map(site, seen, parts, w)))
        return probes

    def vision_attention(self, site: Site) -> Probe | None:
        if site.second:
            return None
        into = self.tower_seen
        if site.layer == 0:
            into.clear()
        if self.tower == "cls":
            return Probe(lambda w, _: into.__setitem__(site.layer, w[:, :, 0].cpu()), stop=1)
        parts: list[Tensor] = []
        return Probe(lambda w, _: self._tower(site.layer, parts, w))

    # -- what is kept -----------------------------------------------------------------------------------------------

    def _seen(self, site: Site) -> Seen:
        seen = site.state.get("seen")
        if seen is None:
            seen = site.state["seen"] = Seen(site.whole, _columns(site.whole))
            self.sequences.append(seen)
        elif site.prefill and seen.tokens.shape != site.whole.shape:
            seen.tokens, seen.columns = site.whole, _columns(site.whole)
        return seen

    def _member(self, site: Site, seen: Seen) -> Tensor:
        """(B, N, G) fp32 group membership of the prompt at this layer; made at prefill."""
        if site.prefill or ("member", site.layer) not in site.state:
            tokens = site.tokens
            sink = torch.zeros_like(tokens.visual)
            if seen.phi:
                phi = seen.phi[site.layer]
                phi = phi if site.columns is None else phi.gather(1, site.columns.clamp(min=0))
                sink = tokens.visual & (phi > site.setup["tau"])
            groups = [
                tokens.where(Role.START),
                tokens.where(Role.BEFORE),
                tokens.visual & ~sink,
                sink,
                tokens.where(Role.AFTER),
                tokens.where(Role.GENERATED),
            ]
            site.state["member", site.layer] = torch.stack(groups, -1).float()
        return site.state["member", site.layer]

    def _last(self, site: Site, seen: Seen, member: Tensor, weights: Tensor) -> None:
        row = weights[:, :, 0].detach()  # (B, H, K)
        dropped = max(0, site.tokens.shape[1] - row.shape[-1])  # columns a sliding-window cache has let go
        member = member[:, dropped:]
        width = min(member.shape[1], row.shape[-1])
        masses = row[..., :width] @ member[:, :width]  # (B, H, G)
        if row.shape[-1] > width:
            masses[..., -1] += row[..., width:].sum(-1)
        seen._masses[-1].append(masses)
        self._count(masses)
        if self.image_rows:
            columns = seen.columns if site.columns is None else _places(site, seen.columns)
            columns = columns - dropped
            picked = row.gather(2, columns.clamp(min=0)[:, None].expand(-1, row.shape[1], -1))
            kept = picked.masked_fill(columns[:, None] < 0, 0).half()
            seen._rows[-1].append(kept)
            self._count(kept)

    def _map(self, site: Site, seen: Seen, parts: list[Tensor], weights: Tensor) -> None:
        parts.append(weights.detach().cpu())
        if sum(p.shape[2] for p in parts) == site.queries:
            seen.maps[-1][site.layer] = torch.cat(parts, 2)

    def _tower(self, layer: int, parts: list[Tensor], weights: Tensor) -> None:
        if self.tower == "maps":
            self._count(weights)
            parts.append(weights.detach().cpu())
            self.tower_seen[layer] = torch.cat(parts, 2)
        else:  # mean attention that each key receives
            parts.append(weights.detach())
            rows = sum(p.shape[2] for p in parts)
            self.tower_seen[layer] = (sum(p.sum(2) for p in parts) / rows).cpu()  # (B, H, K)

    def _count(self, kept: Tensor) -> None:
        self._bytes += kept.numel() * kept.element_size()
        if self._bytes > self.limit:
            raise SizeError(
                f"the recording passed {self.limit / 2**20:.0f} MB: record fewer tokens, drop image_rows or maps, "
                f"or raise record(limit_mb=...)"
            )

    def _check_maps(self, site: Site) -> None:
        rows, keys = site.queries, site.tokens.shape[1]
        need = 4 * site.layers * site.tokens.shape[0] * site.heads * rows * keys
        if self._bytes + need > self.limit:
            raise SizeError(
                f"whole maps of {site.layers} layers x {site.heads} heads x {rows} x {keys} need {need / 2**20:.0f} MB, "
                f"more than limit_mb={self.limit / 2**20:.0f}: use record(image_rows=True) instead, or raise limit_mb"
            )
        self._bytes += need


def _everywhere(values: Tensor, site: Site) -> Tensor:
    """Values (B, M) of what a layer has seen -> (B, N) on all columns of the sequence, 0 where it has not."""
    if site.columns is None:
        return values
    width = site.whole.shape[1]
    index = torch.where(site.columns < 0, width, site.columns)
    return values.new_zeros(values.shape[0], width + 1).scatter(1, index, values)[:, :width]


def _places(site: Site, columns: Tensor) -> Tensor:
    """Columns (B, V) of the whole sequence -> where the layer's ledger has them; -1 where it does not."""
    order = torch.arange(site.columns.shape[1], device=columns.device).expand_as(site.columns)
    index = torch.where(site.columns < 0, site.whole.shape[1], site.columns)
    place = torch.full((columns.shape[0], site.whole.shape[1] + 1), -1, device=columns.device)
    return place.scatter(1, index, order).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)


def _columns(tokens: Tokens) -> Tensor:
    """(B, V) columns of the visual tokens of every row, in order; -1 fills shorter rows."""
    counts = tokens.visual.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    order = torch.argsort(~tokens.visual, dim=1, stable=True)[:, :width]
    place = torch.arange(width, device=order.device)
    return order.masked_fill(place >= counts[:, None], -1)


def record(
    *,
    image_rows: bool = False,
    sinks: bool = True,
    maps: bool = False,
    tower: str | None = None,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
    limit_mb: float = 2048,
) -> Recorder:
    """An observer to attach beside (behind) systems: `rec = record(); attach(model, VAR(), rec)`; then `rec.seen`.

    Args:
        image_rows: also keep the weights of every forward's last query on the visual tokens (T, L, B, H, V).
        sinks: also keep phi of the prompt tokens, and count visual sinks as a group of their own.
        maps: also keep whole attention maps (B, H, Q, K) of every forward. Large: refused above `limit_mb`.
        tower: also keep attention of the vision tower: "cls" row (B, H, K), "received" by each key on average
            (B, H, K), or "maps" (B, H, Q, K); in `rec.tower_seen[layer]` of the last image batch.
        tau, sink_dims: as in VAR; None: the defaults for this model.
        limit_mb: how much a recording may hold.

    Raises:
        SizeError: the recording would pass `limit_mb`; before the work where the size is known beforehand.
    """
    return Recorder(
        image_rows=image_rows, sinks=sinks, maps=maps, tower=tower, tau=tau, sink_dims=sink_dims, limit_mb=limit_mb
    )
