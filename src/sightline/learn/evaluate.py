"""What a checkpoint can do on held-out scenes: POPE, questions by kind and captions, with plain greedy `generate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sightline import scenes

KINDS = ("exist", "colour", "count", "relation", "detail", "leading", "context")
CAPTION_PROMPT = "Please describe this image in detail."


def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Sequence, texts: Sequence[str], *,
           batch: int = 32, most: int = 160, note: str = "answers") -> list[str]:  # fmt: skip
    """Greedy answers to one question per picture, through the chat template and `generate`, left-padded in batches."""
    replies = []
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    for start in track(range(0, len(order), batch), note, transient=True):
        chosen = order[start : start + batch]
        dialogues = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": texts[k]}]}]
                     for k in chosen]  # fmt: skip
        prompts = [processor.apply_chat_template(dialogue, add_generation_prompt=True) for dialogue in dialogues]
        inputs = processor(images=[pictures[k] for k in chosen], text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=most)
        new = out[:, inputs["input_ids"].shape[1] :]
        replies += processor.batch_decode(new, skip_special_tokens=True)
    back = np.argsort(order)
    return [replies[k].strip() for k in back]


def said_no(reply: str) -> bool:
    """POPE's official reading: "no" or "not" among the words before the first full stop."""
    first = reply.split(".")[0].replace(",", "")
    return any(word in ("No", "no", "not") for word in first.split(" "))


def pope(model, processor, held: Sequence[scenes.Scene], split: str) -> dict:
    """Accuracy, precision, recall, F1 and yes ratio in percent (positive is yes), and the number of questions."""
    rows = scenes.pope(held, split=split, rng=np.random.Generator(np.random.PCG64(0)))
    pictures = {scene.file_name: scene.image for scene in held}
    replies = answer(model, processor, [pictures[r["image"]] for r in rows], [r["text"] for r in rows], most=4,
                     note=f"POPE {split}")  # fmt: skip
    yes = np.array([not said_no(reply) for reply in replies])
    truth = np.array([row["label"] == "yes" for row in rows])
    hit = int((yes & truth).sum())
    precision, recall = hit / max(1, yes.sum()), hit / max(1, truth.sum())
    return {
        "n": len(rows),
        "accuracy": round(100 * float((yes == truth).mean()), 2),
        "precision": round(100 * precision, 2),
        "recall": round(100 * recall, 2),
        "f1": round(200 * precision * recall / max(1e-9, precision + recall), 2),
        "yes": round(100 * float(yes.mean()), 2),
    }


def questions(model, processor, held: Sequence[scenes.Scene], per_kind: int) -> dict:
    """Percent of held-out questions answered exactly (case and full stop aside), by kind, with counts."""
    result = {}
    for kind in KINDS:
        asked = []
        for scene in held:
            rng = np.random.default_rng(scene.seed)
            asked += [(scene, question) for question in scenes.questions(scene, rng, 2, kinds=(kind,))]
            if len(asked) >= per_kind:
                break
        replies = answer(model, processor, [s.image for s, _ in asked], [q.text for _, q in asked], most=8, note=kind)
        right = [reply.strip(" .").lower() == q.answer.strip(" .").lower()
                 for reply, (_, q) in zip(replies, asked, strict=True)]  # fmt: skip
        result[kind] = {"n": len(asked), "accuracy": round(100 * float(np.mean(right)), 2)}
    return result


def captions(model, processor, held: Sequence[scenes.Scene], most: int = 160) -> dict:
    """CHAIR over detailed captions (Rohrbach et al., 2018, arXiv 1809.02156), in percent, and three examples."""
    replies = answer(model, processor, [s.image for s in held], [CAPTION_PROMPT] * len(held), most=most,
                     note="captions")  # fmt: skip
    named = [scenes.mentions(reply) for reply in replies]
    false = [sum(kind not in scene.counts() for kind in kinds) for kinds, scene in zip(named, held, strict=True)]
    found = sum(len(set(kinds) & set(scene.counts())) for kinds, scene in zip(named, held, strict=True))
    wrong = Counter(
        kind for kinds, scene in zip(named, held, strict=True) for kind in kinds if kind not in scene.counts()
    )
    return {
        "n": len(held),
        "chair_i": round(100 * sum(false) / max(1, sum(map(len, named))), 2),
        "chair_s": round(100 * float(np.mean([count > 0 for count in false])), 2),
        "recall": round(100 * found / max(1, sum(len(s.counts()) for s in held)), 2),
        "mentions": sum(map(len, named)),
        "words": round(float(np.mean([len(reply.split()) for reply in replies])), 1),
        "sentences": round(100 * float(np.mean([reply.endswith(".") for reply in replies])), 2),
        "invented": dict(wrong.most_common(5)),
        "examples": replies[:3],
    }


def evaluate(model: LlavaForConditionalGeneration, processor: LlavaProcessor, *, pictures: int = 360,
             per_kind: int = 300, split: str = "test") -> dict:  # fmt: skip
    """Everything above on the first `pictures` scenes of a split (6 POPE questions a picture with 3 kinds or more)."""
    held = [scenes.draw(seed, size=processor.image_processor.crop_size["height"])
            for seed in scenes.seeds(split, pictures)]  # fmt: skip
    return {
        "split": split,
        "pictures": pictures,
        "pope": {name: pope(model, processor, held, name) for name in ("random", "popular", "adversarial")},
        "questions": questions(model, processor, held, per_kind),
        "captions": captions(model, processor, held[: max(1, pictures // 2)]),
    }


def show(results: dict, console: Console | None = None) -> None:
    """Print the results as a table."""
    table = Table("task", "n", "accuracy %", "more", title=f"held-out scenes ({results['split']})")
    for split, row in results["pope"].items():
        more = f"F1 {row['f1']}, precision {row['precision']}, recall {row['recall']}, yes {row['yes']}"
        table.add_row(f"POPE {split}", str(row["n"]), str(row["accuracy"]), more)
    for kind, row in results["questions"].items():
        table.add_row(kind, str(row["n"]), str(row["accuracy"]), "")
    row = results["captions"]
    more = f"CHAIR_i {row['chair_i']}, CHAIR_s {row['chair_s']}, recall {row['recall']}, {row['words']} words"
    table.add_row("captions", str(row["n"]), "", more)
    (console or Console()).print(table)
