"""Copies of question files that hold their pictures: VLMEvalKit's TSV (base64) and lmms-lab's Parquet (bytes).

Only where a picture stands is kept; it is read when it is asked for, so a file of gigabytes costs little memory.
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sightline.evaluate.task import Item

ENDINGS = (".tsv", ".parquet")
REFERENCE = 64  # a cell at most so long names the row whose picture is meant (VLMEvalKit)
NAMES = ("image_path", "image_source")  # columns that name a picture
LONGEST = 2**30  # bytes of one cell


class Pictures:
    """Pictures inside a file, by name."""

    def __init__(self, path: Path, places: Mapping[str, int]) -> None:
        self.path, self.places = path, dict(places)

    def split(self, items: Sequence[Item]) -> tuple[list[Item], tuple[str, ...]]:
        """All items, and no missing picture: `read` refuses rows without one."""
        return list(items), ()

    def open(self, item: Item) -> Image:
        """The picture of an item. InputError when it is no picture."""
        from sightline.images import open_image

        place = self.places[item.picture]
        data = _cell_of_tsv(self.path, place) if self.path.suffix == ".tsv" else _cell_of_parquet(self.path, place)
        return open_image(data)


def read(path: Path) -> tuple[list[dict[str, Any]], Pictures]:
    """The rows of a file, with "image" holding the picture's name, and the pictures.

    Raises:
        InputError: unreadable or damaged, or without pictures. MissingExtraError: Parquet needs pyarrow.
    """
    rows, places = [], {}
    try:
        for place, row in _rows_of_tsv(path) if path.suffix == ".tsv" else _rows_of_parquet(path):
            content = row.pop("image", None)
            if not content:
                raise InputError(f"{str(path)!r}, row {len(rows) + 1} has no picture in a column 'image'")
            row["image"] = _name(row, content)
            places.setdefault(row["image"], place)
            rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    return rows, Pictures(path, places)


def _name(row: Mapping[str, Any], content: bytes) -> str:
    """What the file calls the picture; MME's ids do ("artwork/1.jpg"); else a name made from its content."""
    given = next((str(row[key]) for key in NAMES if row.get(key)), None) or str(row.get("question_id", ""))
    return given if given and not given.isdecimal() else hashlib.sha1(content).hexdigest()


# -- TSV --------------------------------------------------------------------------------------------------------------


def _rows_of_tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset of the row that holds the picture, row with the picture's base64)."""
    held: dict[str, tuple[int, bytes]] = {}
    number = 1
    for start, row in _table(path):
        number += 1
        if None in row or None in row.values():
            raise InputError(
                f"{str(path)!r}, line {number} has another number of columns than the first line: cut off?"
            )
        cell = row.get("image") or ""
        if 0 < len(cell) <= REFERENCE:
            if cell not in held:
                raise InputError(
                    f"{str(path)!r}, line {number}: its picture is that of row {cell!r}, which is not above"
                )
            place, content = held[cell]
        else:
            place, content = start, hashlib.sha1(cell.encode()).digest() if cell else b""
        held[str(row.get("index", number - 2))] = place, content
        yield place, row | {"image": content}


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(offset in the file, row by column name), whatever is quoted."""
    csv.field_size_limit(LONGEST)
    position = 0
    with path.open("rb") as file:

        def lines() -> Iterator[str]:
            nonlocal position
            for raw in file:
                position += len(raw)
                yield raw.decode("utf-8")

        reader = csv.reader(lines(), delimiter="\t")
        header = [name.removeprefix("\ufeff") for name in next(reader, [])]
        while True:
            start = position
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield start, _named(header, cells)


def _named(header: list[str], cells: list[str]) -> dict[str, Any]:
    return dict(zip(header, cells, strict=True)) if len(header) == len(cells) else {None: cells}


def _cell_of_tsv(path: Path, place: int) -> bytes:
    with path.open("rb") as file:
        header = next(csv.reader([file.readline().decode("utf-8-sig")], delimiter="\t"))
        file.seek(place)
        cells = next(csv.reader((raw.decode("utf-8") for raw in file), delimiter="\t"))
    return base64.b64decode(cells[header.index("image")])


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import lib, parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {str(path)!r} needs pyarrow: pip install 'sightline[eval]'") from error
    try:
        return parquet.ParquetFile(path)
    except lib.ArrowInvalid as error:
        raise InputError(f"{str(path)!r} is no Parquet file or is cut off: {error}") from error


def _rows_of_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row, row with the picture's bytes)."""
    number = 0
    for batch in _parquet(path).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            image = row.get("image")
            content = image.get("bytes") if isinstance(image, dict) else image
            yield number, row | {"image": content if isinstance(content, bytes) else None}
            number += 1


def _cell_of_parquet(path: Path, place: int) -> bytes:
    file = _parquet(path)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if place < rows:
            image = file.read_row_group(group, columns=["image"])["image"][place].as_py()
            return image["bytes"] if isinstance(image, dict) else image
        place -= rows
    raise InputError(f"{str(path)!r} has changed: a picture is no longer there")
