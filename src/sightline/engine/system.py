"""What a system is to the engine: a configuration with methods for the stations it needs.

The path of one question: pixels -> tower (vision_hidden, vision_attention) -> visual_tokens, positions -> decoder layers
(cut, hidden, mask, attention, mlp, output) -> cache -> logits (-> second: another prompt read beside it). A system overrides
the stations it acts at; each gets a `Site` that says where the model stands.
Systems never see the host: everything they may know is on the site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from sightline.engine.attention import Call, Edit, Only, Probe
    from sightline.engine.cuts import View
    from sightline.engine.passes import Passes
    from sightline.engine.pictures import Pictures
    from sightline.engine.prompts import Prompt
    from sightline.engine.select import Keep
    from sightline.engine.tokens import Tokens

STATIONS = (
    "pixels",
    "vision_hidden",
    "vision_attention",
    "visual_tokens",
    "positions",
    "cut",
    "hidden",
    "mask",
    "attention",
    "mlp",
    "output",
    "cache",
    "logits",
    "second",
)


@dataclass(frozen=True)
class Shape:
    """Plain facts about the model that a system may need to prepare itself."""

    model_type: str  # of the language model's configuration, e.g. "llama"
    layers: int
    heads: int
    heads_kv: int
    hidden_size: int
    first_states: Callable[[], Tensor]  # () -> (L, D) fp32: first token's state entering every layer (runs the model)
    input_norm: Callable[[int, Tensor], Tensor] | None = None  # (layer, its input states) -> what its attention reads
    key_value: Callable[[int], tuple[nn.Linear, nn.Linear]] | None = None  # (layer) -> its key and value projections
    tower_layers: int = 0
    tower_prefix: int = 0  # class token and registers before the patches in the tower's sequence
    feature_layer: int = -1  # 0-based tower layer whose output goes to the projector
    merged: bool = False  # a visual token is made of several patches of the tower
    packed: int = 0  # patches of a visual token, in towers that pack all pictures into one row and can be cut; else 0
    tiled: bool = False  # pictures are seen as a whole and in tiles, known by number and place


@dataclass
class Site:
    """Where the model stands when a station is called."""

    tower: str  # "text" or "vision"
    layer: int  # of its tower; -1 outside the layers
    layers: int  # how many there are
    heads: int
    tokens: Tokens | None  # what this layer has seen, this block included (outside the layers: all); None in the tower
    start: int  # column of the block's first query; the block's queries are columns start..N-1
    queries: int  # Q of this block
    prefill: bool  # the block is (part of) a prompt, not a generated token
    step: int  # forwards of this sequence so far: 0 at the first
    state: dict[Any, Any] = field(default_factory=dict)  # the system's own memory of this sequence
    setup: Any = None  # what the system's `prepare` returned
    tally: dict[Any, Any] = field(default_factory=dict)  # the system's memory of everything since entry, for `report`
    seen: dict[Any, Any] = field(default_factory=dict)  # the system's memory of the pictures of this encoding
    pictures: Pictures | None = None  # the encoding: in the tower the one now running, in the decoder the prompt's
    call: Call | None = None  # the attention call, at the two attention stations; to read, never to write
    whole: Tokens | None = None  # the ledger of all tokens, also of those dropped inside the language model
    columns: Tensor | None = None  # (B, M) column in `whole` of everything in `tokens`; -1: filler; None: the same
    labels: Tensor | None = None  # (B, Q) wanted next tokens of the block, where the model is trained
    cuts: View | None = None  # what was dropped at which layer, attention rows before a cut, taking out of the cache
    stream: str = ""  # which of the system's extra runs this is ("text", "plain"); "" in the run that answers
    head: Callable[..., Tensor] | None = None  # (states (B, D), norm=False, mean=False) -> (B, V): the model's own head
    second: bool = False  # this is the second stream of some system, not the sequence that is being answered


class System:
    """Base of all systems. Override the stations you need; return None to leave things as they are."""

    slug = ""
    everywhere = False  # True: part of the model as it was trained, so it also acts in the extra runs of other systems
    drafts = False  # True: acts alike where several new tokens are read at once and some taken back (assisted decoding)

    def streams(self) -> tuple[str, ...]:
        """Extra runs of a prompt with pictures that the engine makes before the prompt itself, without a cache.

        "text": the prompt with its pictures left out. "plain": the prompt as it is, with no system acting. In them the
        stations of this system are called with `site.stream` set and the same `site.state` as in the run that answers.
        """
        return ()

    def conflicts(self, other: System) -> str | None:
        """Why this system cannot run together with `other`; None when it can."""
        if type(self) is type(other):
            return "both would do the same edit twice"
        return None

    def prepare(self, shape: Shape) -> Any:
        """Called once on entry, before anything is changed. What it returns is `site.setup`. May raise ParameterError."""

    def plan(self, passes: Passes) -> System:
        """What to attach for one question, where the caller lets systems ask the model first (`lvlm.ask`, `look`)."""
        return self

    def idle(self) -> bool:
        """True when the parameters make this system change nothing (strength 0): the engine then leaves the host alone."""
        return False

    def pixels(self, site: Site, pixel_values: Tensor) -> Tensor | None:
        """Input of the vision tower, shape as the host makes it."""

    def vision_attention(self, site: Site) -> Edit | Probe | None:
        """An attention call of the vision tower."""

    def vision_hidden(self, site: Site, hidden: Tensor) -> Keep | None:
        """(R, N, C) input of tower layer `site.layer`. A `Keep` (R, N) drops tokens from here to the tower's end.

        Towers that pack all pictures into one row (R = 1; `site.pictures.parts`) are asked once more behind their last
        layer, before patches are merged, with `site.layer` = number of layers.
        """

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Tensor | Keep | None:
        """(B, Q, D) input embeddings of the decoder, visual tokens in place (`site.tokens.visual` says where).

        A `Keep` drops tokens: the decoder never sees them.
        """

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        """(B, Q, D) input of decoder layer `site.layer`: which tokens go on from here.

        Called only for blocks with image tokens. The last real token of every row always goes on. `site.cuts.rows` shows
        this layer's attention rows beforehand; they cost its keys.
        """

    def positions(self, site: Site, positions: Tensor) -> Tensor | None:
        """(A, B, Q) position ids of the block as the decoder gets them; A = 3 where rotary positions have three axes."""

    def hidden(self, site: Site, hidden: Tensor) -> Tensor | None:
        """(B, Q, D) input of decoder layer `site.layer`, before its norm."""

    def mask(self, site: Site, allowed: Tensor) -> Tensor | None:
        """(B|1, 1, Q, N) bool, which position each query of a prompt may attend to. Asked once for all layers alike."""

    def attention(self, site: Site) -> Edit | Probe | Only | None:
        """The self-attention call of decoder layer `site.layer`; also a list of wishes."""

    def mlp(self, site: Site, output: Tensor) -> Tensor | None:
        """(B, Q, D) output of the feed-forward part of decoder layer `site.layer`, before it is added."""

    def output(self, site: Site, hidden: Tensor) -> Tensor | None:
        """(B, Q, D) state that leaves decoder layer `site.layer`; after the last one the final norm follows."""

    def cache(self, site: Site, cache: Any) -> None:
        """The key-value cache after a forward.

        Edit its layers' `.keys` and `.values` in place; to shorten them, call `site.cuts.evict`.
        """

    def logits(self, site: Site, logits: Tensor) -> Tensor | None:
        """(B, V) scores of the next token: of the last position that is not padding."""

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any] | None:
        """Arguments of `generate` for the prompt of a second stream, made by `prompt`; None: no second stream.

        From then on every token is read by both streams, and `contrast` weighs their scores.
        """

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        """(B, V) fp32 scores of the next token, from those of the first and of the second stream."""
        raise NotImplementedError

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        """What the system did since entry, as plain numbers, from what it kept in `site.tally`."""
        return {}

    def stations(self) -> tuple[str, ...]:
        """The stations that this class overrides."""
        return tuple(s for s in STATIONS if getattr(type(self), s) is not getattr(System, s))
