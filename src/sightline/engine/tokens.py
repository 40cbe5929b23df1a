"""The token ledger: what every position of every row is, kept true while the model runs.

A video is a row of pictures here: picture k of its row is frame k (where a host merges neighbouring frames, group k of
them), in the order of the prompt, whether the frames came in as pictures or through the host's own path for videos.

A position is padding, the start token, text before or after the first image, an image token, or generated. The ledger is
made from the ids of the (already expanded) batch, so beams and `num_return_sequences` need nothing special: a reordered
cache only permutes rows of the same prompt, whose ledgers are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from sightline.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sightline.hosts.geometry import Layout


class Role(IntEnum):
    """What a position is."""

    PAD = 0
    START = 1  # the first real token of a row: BOS, or whatever the template begins with
    BEFORE = 2  # text before the first image (all text, when the row has no image)
    IMAGE = 3
    AFTER = 4  # text after the first image
    GENERATED = 5


@dataclass(frozen=True)
class Tokens:
    """The ledger of one batch of sequences. B rows, N positions (all the keys seen so far)."""

    role: Tensor  # (B, N) int8, values of Role
    image: Tensor  # (B, N) int16: which image, or frame of a video, of its row; -1 elsewhere
    index: Tensor  # (B, N) int32: place among the visual tokens of its image; -1 elsewhere
    position: Tensor  # (B, N) int32: column in the original, unpruned sequence
    layouts: tuple[tuple[Layout, ...], ...] | None = None  # per row, per image

    @classmethod
    def from_ids(
        cls,
        ids: Tensor,
        image_token: int,
        mask: Tensor | None = None,
        *,
        prompt: int | None = None,
        counts: Sequence[int] | None = None,
        video_token: int | None = None,
        frame_counts: Callable[[list[int]], Sequence[int]] | None = None,
    ) -> Tokens:
        """The ledger of a prompt.

        Args:
            ids: (B, N) token ids, image placeholders already expanded to one per visual token.
            image_token: id of the placeholder.
            mask: (B, N) 1 where real, 0 where padding (left, right or with holes); None: no padding.
            prompt: positions from here on were generated (a forward without cache repeats them); None: none were.
            counts: visual tokens of every image of the batch in order (row by row). Without it, every unbroken run of
                placeholders is taken as one image.
            video_token: id of the placeholder of videos, where a host has one.
            frame_counts: from the lengths of the runs of video placeholders to the visual tokens of every frame. Without
                it, every unbroken run is taken as one frame.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
        visual = (ids == image_token) & real  # (B, N)
        video = (ids == video_token) & real if video_token is not None else torch.zeros_like(real)
        if prompt is not None:
            visual[:, prompt:] = False
            video[:, prompt:] = False
        numbers = None
        if video_token is not None and bool(video.any()):
            frames = None if frame_counts is None else frame_counts(_runs(video))
            numbers = _interleave(_number_images(visual, counts), _number_images(video, frames))
            visual = visual | video
        first = torch.zeros_like(real)
        first.scatter_(1, real.int().argmax(1, keepdim=True), True)
        after = visual.int().cumsum(1) > 0
        role = torch.where(after, int(Role.AFTER), int(Role.BEFORE)).to(torch.int8)
        role[visual] = int(Role.IMAGE)
        role[first & ~visual] = int(Role.START)
        if prompt is not None:
            role[:, prompt:] = int(Role.GENERATED)
        role[~real] = int(Role.PAD)
        image, index = numbers if numbers is not None else _number_images(visual, counts)
        position = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32).expand_as(ids)
        return cls(role, image, index, position)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)"""
        return tuple(self.role.shape)

    def where(self, *roles: Role) -> Tensor:
        """(B, N) bool: positions that have one of the roles."""
        found = self.role == int(roles[0])
        for role in roles[1:]:
            found = found | (self.role == int(role))
        return found

    @cached_property
    def visual(self) -> Tensor:
        """(B, N) bool: image positions."""
        return self.where(Role.IMAGE)

    @cached_property
    def has_image(self) -> bool:
        """Whether any row has an image (one host-device sync, made once per prompt)."""
        return bool(self.visual.any())

    @cached_property
    def first_after(self) -> int:
        """The smallest column, over rows, of text after an image; N when there is none (one sync, once per prompt)."""
        columns = self.where(Role.AFTER, Role.GENERATED).any(0)
        return int(columns.int().argmax()) if bool(columns.any()) else self.role.shape[1]

    def extend(self, other: Tokens) -> Tokens:
        """The ledger with the positions of `other` (a later chunk of the same rows) behind it."""
        image = torch.where(other.image >= 0, other.image + self.image.amax(1, keepdim=True) + 1, other.image)
        role = other.role
        if self.has_image:  # text of the new chunk comes after an image already seen
            seen = self.visual.any(1, keepdim=True)
            moved = (role == int(Role.BEFORE)) | (role == int(Role.START))
            role = torch.where(moved & seen, int(Role.AFTER), role)
        begun = self.role.ne(int(Role.PAD)).any(1, keepdim=True)  # a row that was all padding starts only now
        role = torch.where((role == int(Role.START)) & begun, int(Role.BEFORE), role).to(torch.int8)
        return self._appended(role, image.to(torch.int16), other.index)

    def generated(self, count: int = 1) -> Tokens:
        """The ledger with `count` generated positions behind it. No host-device sync."""
        rows = self.role.shape[0]
        none = self.role.new_full((rows, count), -1)
        role = self.role.new_full((rows, count), int(Role.GENERATED))
        grown = self._appended(role, none.to(torch.int16), none.to(torch.int32))
        self._hand_down(grown)
        return grown

    def tail(self, count: int) -> Tokens:
        """The ledger of the last `count` positions."""
        width = self.role.shape[1]
        return replace(
            self,
            role=self.role[:, width - count :],
            image=self.image[:, width - count :],
            index=self.index[:, width - count :],
            position=self.position[:, width - count :],
        )

    def append(self, tail: Tokens) -> Tokens:
        """The ledger with `tail`, the newest positions of a longer ledger of the same rows, behind it as it is."""
        grown = replace(
            self,
            role=torch.cat([self.role, tail.role], 1),
            image=torch.cat([self.image, tail.image], 1),
            index=torch.cat([self.index, tail.index], 1),
            position=torch.cat([self.position, tail.position], 1),
        )
        if tail.role.shape[1] == 1:
            self._hand_down(grown)
        return grown

    def answered(self, supervised: Tensor) -> Tokens:
        """The ledger of a training sample: text that is `supervised` (B, N) bool is the answer, as if generated."""
        text = self.where(Role.BEFORE, Role.AFTER) & supervised.to(self.role.device)
        return replace(self, role=self.role.masked_fill(text, int(Role.GENERATED)))

    def crop(self, length: int) -> Tokens:
        """The ledger of the first `length` positions (a cache was cropped)."""
        return replace(
            self,
            role=self.role[:, :length],
            image=self.image[:, :length],
            index=self.index[:, :length],
            position=self.position[:, :length],
        )

    def select(self, keep: Tensor) -> Tokens:
        """The ledger after pruning.

        Args:
            keep: (B, M) columns to keep, increasing in every row; -1 fills rows that keep fewer and becomes padding.
        """
        if keep.dim() != 2 or keep.shape[0] != self.role.shape[0]:
            raise InputError(f"keep has shape {tuple(keep.shape)}: (B, M) with B = {self.role.shape[0]} rows is needed")
        columns, gone = keep.clamp(min=0).long(), keep < 0
        role = self.role.gather(1, columns).masked_fill(gone, int(Role.PAD))
        image = self.image.gather(1, columns).masked_fill(gone, -1)
        index = self.index.gather(1, columns).masked_fill(gone, -1)
        position = self.position.gather(1, columns).masked_fill(gone, -1)
        return replace(self, role=role, image=image, index=index, position=position)

    def rows(self, order: Tensor) -> Tokens:
        """The ledger of the rows `order` (B',), for batches that are reordered across prompts or expanded."""
        picked = {name: getattr(self, name)[order] for name in ("role", "image", "index", "position")}
        layouts = None if self.layouts is None else tuple(self.layouts[int(r)] for r in order)
        return replace(self, **picked, layouts=layouts)

    def with_layouts(self, layouts: Sequence[Sequence[Layout]]) -> Tokens:
        """The ledger that also knows where every visual token lies.

        Raises:
            InputError: a layout has another number of tokens than its image has placeholders, or one is missing.
        """
        layouts = tuple(tuple(row) for row in layouts)
        if len(layouts) != self.role.shape[0]:
            raise InputError(
                f"layouts for {len(layouts)} rows, the ledger has {self.role.shape[0]} rows: give one list per row"
            )
        for b, row in enumerate(layouts):
            images = int(self.image[b].max()) + 1
            if images > len(row):
                raise InputError(
                    f"row {b}: {len(row)} layouts for {images} images (without `counts`, every run of tokens is one)"
                )
            for k, layout in enumerate(row):
                found = int((self.image[b] == k).sum())
                if found != len(layout):
                    raise InputError(f"row {b}, image {k}: the layout has {len(layout)} tokens, the prompt has {found}")
        return replace(self, layouts=layouts)

    def cells(self, row: int, image: int = 0) -> Tensor:
        """(n, 3) crop, row, column in the grid of every visual token still there of an image; -1 for separators."""
        if self.layouts is None:
            raise InputError("this ledger has no layouts: make it with `tokens.with_layouts(...)`")
        layout = self.layouts[row][image]
        table = torch.cat([torch.as_tensor(layout.crop)[:, None], torch.as_tensor(layout.cell)], 1)
        return table[self.index[row][self.image[row] == image].long().cpu()]

    def _hand_down(self, grown: Tokens) -> None:
        """A generated token changes neither of these: keep what is known, sync-free."""
        for name in ("has_image", "first_after"):
            if name in self.__dict__:
                grown.__dict__[name] = self.__dict__[name]

    def _appended(self, role: Tensor, image: Tensor, index: Tensor) -> Tokens:
        start = self.position.amax() + 1  # not the width: pruning may have dropped columns
        position = (start + torch.arange(role.shape[1], device=role.device)).to(torch.int32).expand_as(role)
        return Tokens(
            torch.cat([self.role, role], 1),
            torch.cat([self.image, image], 1),
            torch.cat([self.index, index], 1),
            torch.cat([self.position, position], 1),
            self.layouts,
        )


def _number_images(visual: Tensor, counts: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Image number within its row, and place within its image, of every visual token; -1 elsewhere. (B, N) each."""
    order = visual.int().cumsum(1) - 1  # (B, N) place among the visual tokens of the row
    if counts is None:
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        image = starts.int().cumsum(1) - 1
    else:
        image = _split_by_counts(visual, counts)
    image = image.masked_fill(~visual, -1)
    begin = torch.where(visual, order, order.shape[1])  # first place of every image in its row, then the difference
    slots = int(image.max()) + 1 if image.numel() else 0
    first = begin.new_full((visual.shape[0], max(slots, 1)), visual.shape[1])
    first = first.scatter_reduce(1, image.clamp(min=0).long(), begin, reduce="amin")
    index = (order - first.gather(1, image.clamp(min=0).long())).masked_fill(~visual, -1)
    return image.to(torch.int16), index.to(torch.int32)


def _interleave(images: tuple[Tensor, Tensor], frames: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Numbers of images and of frames, numbered together in the order of the prompt. (B, N) each."""
    index = torch.maximum(images[1], frames[1])
    together = (index == 0).int().cumsum(1) - 1
    return together.masked_fill(index < 0, -1).to(torch.int16), index


def _runs(visual: Tensor) -> list[int]:
    """Lengths of the unbroken runs of a (B, N) mask, row by row."""
    lengths = []
    for row in visual.tolist():
        before = False
        for here in row:
            if here and before:
                lengths[-1] += 1
            elif here:
                lengths.append(1)
            before = here
    return lengths


def _split_by_counts(visual: Tensor, counts: Sequence[int]) -> Tensor:
    """Image numbers when the visual tokens of the batch, read row by row, belong to images of `counts` tokens."""
    rows = visual.sum(1).tolist()
    if sum(counts) != sum(rows):
        raise InputError(f"the images have {sum(counts)} visual tokens, the prompt has {sum(rows)} placeholders")
    if not set(accumulate(rows, initial=0)) <= set(accumulate(counts, initial=0)):
        raise InputError(
            f"images of {list(counts)} visual tokens do not fill rows of {rows} placeholders: one is cut in two"
        )
    sizes = torch.as_tensor(list(counts), dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(counts)), sizes).to(visual.device)
    image = torch.full(visual.shape, -1, device=visual.device, dtype=torch.long)
    image[visual] = owner
    first = torch.where(visual, image, len(counts)).amin(1, keepdim=True)  # the first image of every row
    return image - first
