"""Ways to ask: paraphrases of the world's questions and the usual instructions for captions, so that prompts may vary."""

from __future__ import annotations

import numpy as np

from sightline.scenes import KINDS, Question, Scene, caption, questions

DESCRIBE = {
    "detailed": (
        "Please describe this image in detail.",
        "Describe this image in detail.",
        "Please help me describe the image in detail.",
        "Describe this image.",
        "What do you see?",
        "What is in the image?",
    ),
    "short": ("Generate a short caption of this image.", "Describe this image briefly.", "Write a short caption."),
}
SUFFIXES = (
    "\nAnswer the question using a single word or phrase.",
    " Please answer this question with one word.",
    " Please answer yes or no.",
)


def describe(rng: np.random.Generator, style: str) -> str:
    """An instruction for a caption of a style, "short" or "detailed"; the first is the commonest."""
    forms = DESCRIBE[style]
    return forms[0] if rng.random() < 0.4 else forms[int(rng.integers(len(forms)))]


def _forms(question: Question) -> tuple[str, ...]:
    text = question.text
    if question.kind == "exist":
        thing = text.removeprefix("Is there ").removesuffix(" in the image?")
        return (f"Is there {thing}?", f"Do you see {thing}?", f"Can you see {thing} in the image?")
    if question.kind == "count":
        things = text.removeprefix("How many ").removesuffix(" are there?")
        return (f"How many {things} are in the image?", f"How many {things} do you see?")
    if question.kind == "colour":
        return (text.replace("colour", "color"),)
    if question.kind == "context":
        return ("What place is this?", "Where was this picture taken?")
    return ()


def rephrase(question: Question, rng: np.random.Generator) -> str:
    """The question's own text most of the time, else a paraphrase; rarely with a benchmark's suffix."""
    text, forms = question.text, _forms(question)
    if forms and rng.random() < 0.25:
        text = forms[int(rng.integers(len(forms)))]
    if question.kind != "context" and rng.random() < 0.03:
        last = 3 if question.truth in ("yes", "no") else 2
        text += SUFFIXES[int(rng.integers(last))]
    return text


def document(scene: Scene, rng: np.random.Generator) -> str:
    """A dialogue about a scene as text, for a tokenizer to learn words from: a caption, then questions and answers."""
    style = "detailed" if rng.random() < 0.5 else "short"
    turns = [(describe(rng, style), caption(scene, rng, style))]
    turns += [(rephrase(q, rng), q.answer) for q in questions(scene, rng, 16)]
    return "".join(f"USER: {asked} ASSISTANT: {answer}</s>" for asked, answer in turns)


def nouns() -> list[str]:
    """Singular and plural of every kind."""
    return [word for kind in KINDS.values() for word in (kind.singular, kind.plural)]
