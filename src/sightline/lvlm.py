"""A loaded vision-language model: its prompt form, its inputs, its answers. Made by `sightline.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.clips import Clip, is_clip, open_clip
from sightline.errors import InputError, ParameterError
from sightline.images import Picture, open_image

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from sightline.engine.system import System
    from sightline.hosts import Host

MAX_QUESTION = 8192  # bytes of UTF-8, about 2000 tokens
MAX_NEW_TOKENS = 4096

# For processors without a chat template: the pictures, then the question, one line each.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{PLACEHOLDER}{% else %}{{ c['text'] }}{% endif %}{{ '\\n' }}{% endfor %}{% endfor %}"
)


def check_question(question: str) -> str:
    """The question without surrounding blanks; InputError when it is empty, longer than 8 kB or no text."""
    if not isinstance(question, str):
        raise InputError(f"question {question!r} is of type {type(question).__name__}: give text")
    length = len(question.encode("utf-8", "surrogatepass"))
    if length > MAX_QUESTION:
        raise InputError(f"the question is {length} bytes long (it begins {question[:40]!r}): at most {MAX_QUESTION}")
    if not question.strip():
        raise InputError(f"the question {question!r} is empty: ask something, for example 'What is in the picture?'")
    return question.strip()


def check_max_new_tokens(count: int) -> int:
    """`count` when it is a whole number in [1, 4096]; ParameterError otherwise."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_NEW_TOKENS:
        raise ParameterError(
            f"max_new_tokens={count!r} is out of range: choose a whole number in [1, {MAX_NEW_TOKENS}]"
        )
    return count


@dataclass(frozen=True)
class LVLM:
    """A vision-language model with its processor. `model` is the plain transformers model; attach systems to it."""

    model: PreTrainedModel
    processor: ProcessorMixin
    host: Host
    name: str  # as given to `load`

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def inputs(self, images: Any, questions: str | Sequence[str]) -> BatchFeature:
        """Model inputs for a batch of B questions, left-padded, on the model's device.

        The chat template of the processor is used when it has one, else "<image>\\n" per picture and the question.

        Args:
            images: one picture for all questions, or a list with one entry per question; an entry is a picture, a list
                of pictures, a `Clip`, or None. Pictures are whatever `sightline.images.open_image` reads; the path of
                an animation or of a folder of frames is a clip. A clip goes in as a video where the host takes videos,
                else as several pictures.
            questions: one question (asked of every entry), or a list.

        Raises:
            InputError: a picture or question cannot be used, their numbers differ, or a prompt exceeds the context (which
                is put off where attached systems drop visual tokens before the decoder).
        """
        rows, asked = _pair(images, questions)
        for question in asked:
            self._check_placeholders(question)
        clips = [row for row in rows if isinstance(row, Clip)]
        native = self.takes_videos
        if native and len({len(clip) for clip in clips}) > 1:
            raise InputError(
                f"clips of {sorted({len(clip) for clip in clips})} frames in one batch: give them all the same number, "
                "for example with clip.sample(8), or ask about them one by one"
            )
        conversations = [[_message(row, question, native)] for row, question in zip(rows, asked, strict=True)]
        return self.encode(conversations, _video_facts(clips) if native else {})

    def encode(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], facts: Mapping[str, Any] | None = None
    ) -> BatchFeature:
        """Model inputs for B conversations in the form of transformers' chat templates, as `inputs` makes them.

        Args:
            conversations: lists of {"role": ..., "content": [{"type": "image", "image": PIL.Image}, {"type": "text",
                "text": ...}]}, the last one of the user.
            facts: more arguments for the processor, for example of videos.

        Raises:
            InputError: a prompt exceeds the context.
        """
        from sightline.engine.checks import check_weights
        from sightline.engine.prompts import note

        check_weights(self.model)
        has_template = getattr(self.processor, "chat_template", None) is not None
        batch = self.processor.apply_chat_template(
            list(conversations),
            chat_template=None if has_template else PLAIN_TEMPLATE.replace("{PLACEHOLDER}", self.processor.image_token),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left", **(facts or {})},
        )
        self._check_context(batch["input_ids"].shape[1], 0)
        batch = batch.to(self.device, self.dtype)
        told = list(conversations)

        def again(pictures: Sequence[Sequence[Image]], questions: Sequence[str]) -> BatchFeature:
            return self.encode([_retold(*row) for row in zip(told, pictures, questions, strict=True)], facts)

        parts = [[part for message in row for part in message["content"]] for row in told]
        seen = [[part["image"] for part in row if part["type"] == "image"] for row in parts]
        asked = [next((part["text"] for part in reversed(row) if part["type"] == "text"), "") for row in parts]
        note(batch, seen, asked, processor=self.processor, again=again)
        return batch

    @property
    def visual_ids(self) -> list[int]:
        """Ids of the placeholders of pictures and, where they have one of their own, of videos."""
        names = (self.host.image_token, self.host.video_token)
        return [getattr(self.model.config, name) for name in names if name is not None]

    @property
    def takes_videos(self) -> bool:
        """Whether clips go in as videos (the host and this processor have a path of their own for them)."""
        return self.host.video and getattr(self.processor, "video_processor", None) is not None

    def ask(
        self,
        images: Any,
        questions: str | Sequence[str],
        *,
        systems: Sequence[System] = (),
        max_new_tokens: int = 64,
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """Answer a question about a picture, or a batch of them; greedy unless `generate_kwargs` say otherwise.

        Args:
            images, questions: as in `inputs`.
            systems: what to attach while generating, for example `[sl.steer.VAR()]`.
            max_new_tokens: in [1, 4096].
            generate_kwargs: for `model.generate`, for example num_beams or do_sample; ParameterError when it takes none.

        Returns:
            The answer; a list of answers when a list was given or several sequences per question were asked for.
        """
        from sightline.engine.checks import check_options, check_systems
        from sightline.engine.passes import planned, plans

        check_max_new_tokens(max_new_tokens)
        check_systems(systems)
        check_options(self.model, generate_kwargs)
        if plans(systems):  # they ask the model about every question by itself
            answers = []
            for row, question in zip(*_pair(images, questions), strict=True):
                chosen = planned(systems, self, row.frames if isinstance(row, Clip) else row, question)
                answers += self._answers([row], [question], chosen, max_new_tokens, generate_kwargs)
        else:
            answers = self._answers(images, questions, systems, max_new_tokens, generate_kwargs)
        single = isinstance(questions, str) and not _is_batch(images) and len(answers) == 1
        return answers[0] if single else answers

    def _answers(
        self, images: Any, questions: str | Sequence[str], systems: Sequence[System], most: int, given: dict[str, Any]
    ) -> list[str]:
        import torch

        from sightline.engine.checks import generate

        opened = _pair(images, questions)
        with self._attached(systems), torch.inference_mode():
            batch = self.inputs(*opened)  # here, for systems that shorten a prompt let it be longer than the context
            length = batch["input_ids"].shape[1]
            self._check_context(length, most)
            made = generate(self.model, batch, given, do_sample=False, max_new_tokens=most)
        ids = getattr(made, "sequences", made)  # (B, length + new)
        return [text.strip() for text in self.processor.batch_decode(ids[:, length:], skip_special_tokens=True)]

    def _attached(self, systems: Sequence[System]) -> AbstractContextManager:
        if not systems:  # so that `ask` also works while the caller has systems attached
            return nullcontext()
        from sightline.engine.attach import attach

        return attach(self.model, *systems, host=self.host)

    def _check_placeholders(self, question: str) -> None:
        for name in ("image_token", "boi_token", "video_token"):
            token = getattr(self.processor, name, None)
            if token and str(token) in question:
                raise InputError(f"the question contains {str(token)!r}, which stands for a picture: leave it out")

    def _check_context(self, length: int, new: int) -> None:
        from sightline.engine.checks import postponed

        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and length + new > limit and not postponed(self.model, limit - new):
            asked = f"{length} tokens with its pictures" + (f" and {new} new ones are asked for" if new else "")
            raise InputError(
                f"the prompt has {asked}, but {self.name!r} holds {limit}: shorten the question, "
                "give fewer frames or pictures, smaller pictures, or ask for fewer new tokens"
            )


def _is_batch(images: Any) -> bool:
    return isinstance(images, list | tuple)


def _pair(images: Any, questions: str | Sequence[str]) -> tuple[list[list[Image] | Clip], list[str]]:
    """B rows of opened pictures and B checked questions."""
    if not isinstance(questions, str | Sequence):
        raise InputError(
            f"the question is of type {type(questions).__name__}: the picture comes first, then the question as text"
        )
    asked = [questions] if isinstance(questions, str) else list(questions)
    entries = list(images) if _is_batch(images) else [images] * len(asked)
    if len(asked) == 1:
        asked *= len(entries)
    if not asked or len(entries) != len(asked):
        raise InputError(
            f"{len(entries)} entries of images for {len(asked)} questions: give one per question "
            "(for several pictures in one question, a list in the list: [[first, second]])"
        )
    asked = [check_question(question) for question in asked]
    return [_open_row(entry) for entry in entries], asked


def _open_row(entry: Picture | Sequence[Picture] | Clip | None) -> list[Image] | Clip:
    if entry is None:
        return []
    if is_clip(entry):
        return open_clip(entry)
    return [open_image(one) for one in entry] if isinstance(entry, list | tuple) else [open_image(entry)]


def _message(row: list[Image] | Clip, question: str, native: bool) -> dict[str, Any]:
    if isinstance(row, Clip) and native:
        content = [{"type": "video", "video": np.stack([np.asarray(frame) for frame in row.frames])}]
    else:
        content = [{"type": "image", "image": image} for image in (row.frames if isinstance(row, Clip) else row)]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def _video_facts(clips: Sequence[Clip]) -> dict[str, Any]:
    """What a processor must be told of clips whose frames are chosen already."""
    if not clips:
        return {}
    facts = [
        {
            "total_num_frames": len(clip),
            "fps": clip.rate,
            "frames_indices": list(range(len(clip))),
            "duration": len(clip) / clip.rate,
            "width": clip.size[0],
            "height": clip.size[1],
        }
        for clip in clips
    ]
    return {"do_sample_frames": False, "video_metadata": facts}


def _retold(
    conversation: Sequence[Mapping[str, Any]], pictures: Sequence[Image], question: str
) -> list[dict[str, Any]]:
    """The conversation with other pictures, in order, and another last text."""
    each = iter(pictures)
    found = [
        {
            **message,
            "content": [
                {**part, "image": next(each)} if part["type"] == "image" else dict(part) for part in message["content"]
            ],
        }
        for message in conversation
    ]
    last = [part for message in found for part in message["content"] if part["type"] == "text"]
    if last:
        last[-1]["text"] = question
    return found
