"""From words to tasks: `scenes:pope:random`, `pope:FILE`, `pope-chat:FILE`, `chair:FOLDER`, `mme:PATH`, `vallu:FILE`, `robustvqa:FILE`."""

from __future__ import annotations

from pathlib import Path

from sightline.errors import InputError, UnknownNameError, nearest
from sightline.evaluate import files, pope_chat, robust, vallu, world
from sightline.evaluate.pope import check_rule
from sightline.evaluate.task import Task

SOURCES = ("scenes", "pope", "pope-chat", "chair", "mme", "vallu", "robustvqa")
SHOWN = 5  # names of missing pictures in a message


def find(
    on: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "val",
    size: int = 112,
    rule: str = "official",
    images: str | Path | None = None,
    synonyms: str | Path | None = None,
    words: str = "nltk",
    skip_missing: bool = False,
) -> list[Task]:
    """The tasks that `on` names.

    Args:
        on: "scenes:NAME" (see `world.build`), "pope:FILE", "pope-chat:FILE", "chair:FOLDER", "mme:PATH", "vallu:FILE" or "robustvqa:FILE".
        n: at least so many questions per task, whole pictures; None: all of a file, 600 on scenes.
        seed: chooses questions and subsets. split, size: of the generated world. rule: how yes and no are read in POPE.
        images: folder of the pictures of files. synonyms, words: for CHAIR on COCO.
        skip_missing: leave out questions whose picture is not there, instead of stopping.

    Raises:
        UnknownNameError: no such source, task or rule. InputError: a file cannot be used, or pictures are missing.
    """
    source, _, rest = on.partition(":")
    if source not in SOURCES:
        raise UnknownNameError(f"no task source {source!r}: {nearest(source, list(SOURCES))}, as in scenes:pope")
    check_rule(rule)
    if source == "scenes":
        return world.build(rest or "pope", 600 if n is None else n, seed, split, size, rule)
    if not rest:
        raise InputError(f"--on {on} names no file: write {source}:PATH")
    if source == "pope":
        tasks = files.pope(rest, images, n, seed, rule)
    elif source == "pope-chat":
        tasks = pope_chat.read(rest, images, n, seed, rule)
    elif source == "mme":
        tasks = [files.mme_files(rest, n, seed)]
    elif source == "vallu":
        tasks = [vallu.task(rest, images, n, seed)]
    elif source == "robustvqa":
        tasks = robust.read(rest, images, n, seed)
    else:
        tasks = [files.coco_chair(rest, images, synonyms, words, 500 if n is None else n, seed)]
    for task in tasks:
        check_missing(task, skip_missing)
    return tasks


def check_missing(task: Task, skip_missing: bool) -> None:
    """Raise InputError when pictures are missing, unless they are to be skipped and some questions are left."""
    if task.missing and (not skip_missing or not task.items):
        shown = ", ".join(task.missing[:SHOWN]) + (", ..." if len(task.missing) > SHOWN else "")
        left = len({item.picture for item in task.items})
        mend = "give --images FOLDER" + (", or --skip-missing to ask about the others" if task.items else "")
        raise InputError(
            f"task {task.name!r}: {len(task.missing)} of {len(task.missing) + left} pictures are missing ({shown}): {mend}"
        )
