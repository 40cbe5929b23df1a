"""The page of a study: what was asked, what was found, in plain words, with n and intervals; one self-contained file."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sightline.explain.figures import LABELS

ASKED = {
    "sinks": "Are there visual tokens with huge values in a few fixed dimensions, and do they draw the attention of the text?",
    "masking": "Does the model need its sinks? They are hidden from the text; so are, instead, as many random other tokens.",
    "contribution": "What does a sink add to the text, for all the attention it gets?",
    "maps": "Do the sinks lie on background, and is the attention map clearer without them?",
    "ablations": "Does it help to give the sinks' attention to other visual tokens, and does it matter to whom and where?",
    "heads": "Which heads look at the picture?",
}
TITLES = {
    "sinks": "1 · Sink map",
    "masking": "2 · Hiding the sinks",
    "contribution": "3 · What tokens contribute",
    "maps": "4 · Attention on the picture",
    "ablations": "5 · Redistribution and its variants",
    "heads": "Heads that look at the picture",
}


def render(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The HTML page. `pictures`: PNG by file stem, as `figures.draw_all` makes them; they are embedded."""
    from jinja2 import Environment, FileSystemLoader

    folder = Path(__file__).parent / "templates"
    template = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True).get_template(
        "study.html.j2"
    )
    said = sentences(found)
    parts = [
        {"id": key, "title": TITLES[key], "asked": ASKED[key], "found": said[key], "png": _uri(pictures.get(key))}
        for key in ASKED
    ]
    return template.render(parts=parts, table=table(found), config=found["config"], counts=found["counts"])


def sentences(found: dict[str, Any]) -> dict[str, str]:
    """One or a few plain sentences per experiment, for the page and the terminal."""
    return {
        "sinks": _sinks(found),
        "masking": _masking(found),
        "contribution": _contribution(found),
        "maps": _maps(found),
        "ablations": _ablations(found),
        "heads": _heads(found),
    }


def table(found: dict[str, Any]) -> list[list[str]]:
    """Accuracy per group of questions, yes ratio and mean log-probability of the true answer; the header first."""
    groups = [g for g in ("random", "popular", "adversarial", "open") if g in found["conditions"]["none"]]
    rows = [
        ["condition", *(f"{g}, accuracy %" for g in groups), "POPE, yes %", "log p(truth), all", "answers changed %"]
    ]
    for name, scores in found["conditions"].items():
        if name.startswith("mask random "):
            continue
        cells = [_cell(scores[g]["accuracy"], 100) for g in groups]
        yes = _cell(scores["pope"]["yes"], 100) if "pope" in scores else "–"
        changed = scores["all"]["answers changed"]["value"]
        rows.append(
            [
                LABELS.get(name, f"VAR, {name}"),
                *cells,
                yes,
                _cell(scores["all"]["logprob"], 1, 3),
                f"{100 * changed:.1f}",
            ]
        )
    return rows


def _sinks(found: dict[str, Any]) -> str:
    config, numbers, n = found["config"], found["sinks"], found["counts"]["pictures"]
    tau, top = config["found_tau"], max(numbers["phi max"])
    limit = f"Of {n} pictures, the largest φ of a visual token is {top:.2f} in the mean (τ = {tau:.3g}; at most {config['width'] ** 0.5:.1f} is possible)."
    if not config["found_dims"]:
        over = f"; tokens exceed τ there in layers {_ranges(numbers['layers'])}" if numbers["layers"] else ""
        return (
            "The model shows no sinks: its start token has no huge value in any fixed dimension, so there are no sink "
            f"dimensions, and VAR changes nothing. {limit} Here φ is over all dimensions{over}."
        )
    dims = ", ".join(map(str, config["found_dims"]))
    if not numbers["layers"]:
        return f"The model shows no visual sinks in its sink dimensions ({dims}), so VAR changes nothing. {limit}"
    layers = numbers["layers"]
    count = [numbers["per picture"][k] for k in layers]
    known = [v for k, v in enumerate(numbers["spearman"]) if k in layers and v is not None]
    follows = (
        f" There, rank correlation of φ with the attention from the text is {sum(known) / len(known):+.2f} in the mean."
        if known
        else ""
    )
    return (
        f"Sink dimensions: {dims}. Visual sinks (φ > {tau:.3g}) occur in {numbers['any picture']} of {n} pictures, in layers "
        f"{_ranges(layers)}: {sum(count) / len(count):.1f} tokens per picture in the mean of these layers.{follows}"
    )


def _masking(found: dict[str, Any]) -> str:
    if not found["contrast"]:
        return "Not run: there are no visual sinks to hide."
    sinks, other = (found["conditions"][name]["all"] for name in ("mask sinks", "mask random"))
    draws = found["config"]["draws"]
    text = (
        f"With the sinks hidden, accuracy changed by {_points(sinks['accuracy change'])} and log p(truth) by "
        f"{_nats(sinks['logprob change'])}; with as many random other tokens hidden (mean of {_count(draws, 'draw')}), by "
        f"{_points(other['accuracy change'])} and {_nats(other['logprob change'])} (n = {sinks['accuracy change']['n']})."
    )
    a, b = _sign(sinks["logprob change"]), _sign(other["logprob change"])
    contrast = found["contrast"]["logprob"]
    verdicts = {
        (0, -1): "This is what the paper reports: the sinks can go, other tokens are missed.",
        (0, 0): "Neither effect can be told from none with this many questions.",
        (1, -1): "Hiding the sinks even helps, hiding other tokens hurts: in the sense of the paper.",
    }
    unlike = {
        -1: "Unlike in the paper, hiding the sinks hurts.",
        0: "The sinks can go, but so can other tokens.",
        1: "Hiding the sinks helps.",
    }
    side = {
        -1: "The sinks are missed more than the others",
        0: "The two cannot be told apart",
        1: "The sinks are missed less than the others",
    }
    return f"{text} {verdicts.get((a, b), unlike[a])} {side[_sign(contrast)]}: difference {_nats(contrast)}."


def _contribution(found: dict[str, Any]) -> str:
    numbers = found["contribution"]
    if not numbers or numbers["norm ratio"]["value"] is None:
        return "Not measured: there are no visual sinks."
    norm, attention, each = (numbers[f"{name} ratio"] for name in ("norm", "attention", "norm per attention"))
    verdict = {
        (1, -1): "They get more attention than they contribute, as the paper says.",
        (1, 1): "They get more attention, and contribute even more: unlike in the paper.",
    }.get((_sign(attention, 1), _sign(each, 1)), "The paper's much attention with little contribution does not show.")
    return (
        f"In layers that have both, a sink gets {_times(attention)} the attention of another visual token and adds "
        f"{_times(norm)} the norm to the text (geometric means over {_count(norm['n'], 'picture')} with sinks). {verdict}"
    )


def _maps(found: dict[str, Any]) -> str:
    numbers = found["maps"]
    base, share = numbers["base rate"], numbers["sinks on background"]
    if share["value"] is None or not found["config"]["found_dims"]:
        return f"No visual sinks. Of all visual tokens {_percent(base)} show background (less than 5 % object)."
    side = {1: "more than by chance", 0: "no clear difference from chance", -1: "less than by chance"}
    return (
        f"{_percent(share)} of the sinks show background, against {_percent(base)} of all visual tokens: "
        f"{side[_sign(numbers['excess on background'])]} "
        f"({_count(numbers['sinks counted'], 'sink')} over all layers of {_count(base['n'], 'picture')}). Without the sinks, "
        f"{_percent(numbers['attention on objects without sinks'])} of the attention on the picture lies on objects, with "
        f"them {_percent(numbers['attention on objects'])}: a change of {_points(numbers['gain'])}."
    )


def _ablations(found: dict[str, Any]) -> str:
    conditions = found["conditions"]
    plain = conditions["none"].get("pope")
    start = (
        f"As it is, the model answers {_percent(plain['accuracy'])} of {plain['accuracy']['n']} POPE questions right."
        if plain
        else ""
    )
    if "var" not in conditions:
        return f"{start} Variants were not run: without sinks all are the model as it is."
    lines = [
        f"{LABELS[name]}: accuracy {_points(conditions[name]['pope']['accuracy change'])}, log p(truth) {_nats(conditions[name]['pope']['logprob change'])}"
        for name in ("var", "no head selection", "budget to text", "budget to all")
    ]
    change = _sign(conditions["var"]["pope"]["logprob change"])
    verdict = {
        1: "VAR makes the true answers more likely.",
        0: "No effect of VAR can be told from none.",
        -1: "VAR makes the true answers less likely.",
    }
    return f"{start} Changes: {'; '.join(lines)}. {verdict[change]}"


def _heads(found: dict[str, Any]) -> str:
    selected = [v for row in found["heads"]["selected"] for v in row]
    centric = sum(v >= 0.5 for v in selected)
    return (
        f"{centric} of {len(selected)} heads pass VAR's test (at least 20 % of the attention on the picture, at most half of "
        f"that on sinks) for at least half of {found['heads']['text queries']} text queries."
    )


def _sign(one: dict[str, Any], middle: float = 0) -> int:
    """-1, 0 or 1: on which side of the middle the whole interval lies; 0 when there is no interval."""
    if one["low"] is None:
        return 0
    return 1 if one["low"] > middle else -1 if one["high"] < middle else 0


def _points(one: dict[str, Any]) -> str:
    return _said(one, lambda v: f"{100 * v:+.1f}", " points")


def _nats(one: dict[str, Any]) -> str:
    return _said(one, lambda v: f"{v:+.3f}")


def _percent(one: dict[str, Any]) -> str:
    return _said(one, lambda v: f"{100 * v:.1f}", " %")


def _times(one: dict[str, Any]) -> str:
    return _said(one, lambda v: f"{v:.2f}", " times")


def _said(one: dict[str, Any], number: Callable[[float], str], unit: str = "") -> str:
    """The value, with its range where there is one."""
    value = f"{number(one['value'])}{unit}"
    return value if one["low"] is None else f"{value} [{number(one['low'])}, {number(one['high'])}]"


def _cell(one: dict[str, Any], scale: float, digits: int = 1) -> str:
    return _said(one, lambda v: f"{scale * v:.{digits}f}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _ranges(numbers: list[int]) -> str:
    """2, 3, 4, 7 as "2–4, 7"."""
    runs: list[list[int]] = []
    for k in numbers:
        if runs and k == runs[-1][-1] + 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _uri(png: bytes | None) -> str | None:
    return None if png is None else "data:image/png;base64," + base64.b64encode(png).decode("ascii")
