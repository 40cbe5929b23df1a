"""LLaVA-format records: checks, prompts, tokens, and which tokens are supervised.

Record: {"id", "image" (absent for text only), "conversations": [{"from": "human" | "gpt", "value": str}, ...]}, turns
alternating and human first. The recipe is LLaVA's (Liu et al., 2023, arXiv 2304.08485): "plain" for stage 1 keeps the
picture and the answer alone; "chat" for stage 2 is the Vicuna-like dialogue whose answers and end tokens are supervised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaProcessor

from sightline.errors import InputError, ParameterError

IMAGE = "<image>"
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised record: `ids` and `labels` of equal length, and the picture, (S, S, 3) uint8 or None."""

    ids: list[int]
    labels: list[int]
    pixels: np.ndarray | None


def check(record: dict, images: Path | None = None) -> list[tuple[str, str]]:
    """The (question, answer) turns of a record, the picture's mark removed. Raises InputError naming what is wrong.

    A leading gpt turn is dropped, as LLaVA does. `images` is the folder the record's picture has to be in.
    """
    name = f"record {record.get('id', '?')!r}"
    turns = list(record.get("conversations") or [])
    if turns and turns[0].get("from") == "gpt":
        turns = turns[1:]
    if not turns or len(turns) % 2:
        raise InputError(f"{name}: {len(turns)} turns after a leading gpt turn is dropped; give human and gpt in pairs")
    wrong = [t.get("from") for k, t in enumerate(turns) if t.get("from") != ("human", "gpt")[k % 2]]
    if wrong:
        raise InputError(f"{name}: turn from {wrong[0]!r} out of order; human and gpt have to alternate")
    pictures = sum(t["value"].count(IMAGE) for t in turns[::2])
    if any(IMAGE in t["value"] for t in turns[1::2]):
        raise InputError(f"{name}: {IMAGE} in an answer; it may stand in human turns only")
    if pictures != int("image" in record):
        raise InputError(
            f"{name}: {pictures} {IMAGE} marks for {int('image' in record)} pictures; give one per picture"
        )
    if pictures and IMAGE not in turns[0]["value"]:
        raise InputError(f"{name}: {IMAGE} in a later turn; put it into the first human turn")
    if any(not t["value"].strip() for t in turns[1::2]):
        raise InputError(f"{name}: an empty answer; remove the turn")
    if images is not None and "image" in record and not (images / record["image"]).is_file():
        raise InputError(f"{name}: no picture {images / record['image']}; give its folder with --images")
    values = [t["value"].replace(IMAGE, "").strip() for t in turns]
    return list(zip(values[::2], values[1::2], strict=True))


def encode(turns: Sequence[tuple[str, str]], processor: LlavaProcessor, tokens: int, *, stage: int,
           limit: int = 2048, text_first: bool = False) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids and labels of a dialogue about `tokens` visual tokens (0: text only); labels are -100 where masked.

    Stage 1 ("plain"): <s> <image>… answer newline, the answer supervised. Stage 2: the chat template's
    <s>USER: <image>…newline question ASSISTANT: answer</s>USER: …, answers and their </s> supervised; with `text_first`
    <s>USER: question newline <image>… ASSISTANT: ….
    """
    text = processor.tokenizer
    picture = [processor.image_token_id] * tokens

    def ids_of(part: str) -> list[int]:
        return text(part, add_special_tokens=False)["input_ids"]

    pieces: list[tuple[list[int], bool]] = [([text.bos_token_id], False)]
    if stage == 1:
        pieces += [(picture, False), (ids_of(turns[0][1] + "\n"), True)]
    else:
        for k, (question, answer) in enumerate(turns):
            shown = bool(picture) and k == 0
            if shown and text_first:
                pieces += [(ids_of(f"USER: {question}\n") + picture + ids_of(" ASSISTANT:"), False)]
                pieces += [(ids_of(f" {answer}{text.eos_token}"), True)]
                continue
            pieces += [(ids_of("USER: ") + picture, False)] if shown else []
            opening = "\n" if shown else "USER: "
            pieces += [(ids_of(f"{opening}{question} ASSISTANT:"), False), (ids_of(f" {answer}{text.eos_token}"), True)]
    ids = [token for piece, _ in pieces for token in piece][:limit]
    labels = [token if kept else IGNORED for piece, kept in pieces for token in piece][:limit]
    return ids, labels


def collate(samples: Sequence[Sample], pad: int) -> dict[str, torch.Tensor]:
    """`ids`, `labels` (B, T) padded on the right and `pixels` (I, S, S, 3) of the samples that have a picture."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), pad)
    labels = torch.full((len(samples), longest), IGNORED)
    for k, sample in enumerate(samples):
        ids[k, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[k, : len(sample.labels)] = torch.tensor(sample.labels)
    pictures = [sample.pixels for sample in samples if sample.pixels is not None]
    batch = {"ids": ids, "labels": labels}
    return {**batch, "pixels": torch.from_numpy(np.stack(pictures))} if pictures else batch


def statistics(samples: Sequence[Sample], processor: LlavaProcessor) -> dict:
    """Counts, lengths and share of supervised tokens of tokenised records, and three of them with masks shown."""
    if not samples:
        raise ParameterError("no records: give a file with at least one")
    lengths = [len(sample.ids) for sample in samples]
    supervised = sum(label != IGNORED for sample in samples for label in sample.labels)
    kinds = Counter("image" if sample.pixels is not None else "text" for sample in samples)
    return {
        "records": len(samples),
        **dict(kinds),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "supervised_percent": round(100 * supervised / sum(lengths), 2),
        "examples": [shown(sample, processor) for sample in samples[:3]],
    }


def shown(sample: Sample, processor: LlavaProcessor) -> str:
    """The sample as text, supervised stretches between [[ and ]], visual tokens folded into one <image>."""
    text, out, run, kept = processor.tokenizer, "", [], False
    folded = [k for k, token in enumerate(sample.ids)
              if token != processor.image_token_id or k == 0 or sample.ids[k - 1] != token]  # fmt: skip
    for k in [*folded, None]:
        now = k is not None and sample.labels[k] != IGNORED
        if run and (k is None or now != kept):
            part = text.decode(run)
            out, run = out + (f"[[{part}]]" if kept else part), []
        if k is not None:
            run, kept = [*run, sample.ids[k]], now
    return out
