"""The nouns of the generated world: kinds of objects with their names, sizes and ids, and the colours.

Category ids are COCO's own (Lin et al., 2014, arXiv 1405.0312) where COCO has the kind, and 101 and up otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 38, 40),
    "orange": (246, 130, 24),
    "yellow": (248, 218, 48),
    "green": (40, 150, 62),
    "blue": (40, 92, 212),
    "purple": (140, 58, 172),
    "white": (244, 244, 241),
    "black": (36, 36, 41),
}


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    `aspect` is width / height of the drawing, `scale` its longest side relative to the sampled size,
    `spot` where a mark sits on it, in fractions of its box, `air` how often it is placed above the ground.
    """

    name: str
    plural: str
    category_id: int
    supercategory: str
    aspect: float
    spot: tuple[float, float]
    scale: float = 1.0
    air: float = 0.0
    synonyms: tuple[str, ...] = ()  # singular, plural, singular, plural, ...

    @property
    def singular(self) -> str:
        return self.name


_ALL = (
    Kind("person", "people", 1, "person", 0.44, (0.5, 0.42), 1.1, 0, ("man", "men", "woman", "women")),
    Kind("bicycle", "bicycles", 2, "vehicle", 1.5, (0.46, 0.40), 1.05, 0, ("bike", "bikes", "cycle", "cycles")),
    Kind("car", "cars", 3, "vehicle", 1.9, (0.5, 0.62), 1.1, 0, ("automobile", "automobiles")),
    Kind("bus", "buses", 6, "vehicle", 1.75, (0.5, 0.66), 1.15, 0, ("coach", "coaches")),
    Kind("boat", "boats", 9, "vehicle", 1.05, (0.5, 0.82), 1.1, 0, ("ship", "ships", "sailboat", "sailboats")),
    Kind("tractor", "tractors", 101, "vehicle", 1.25, (0.70, 0.52), 1.1),
    Kind("bird", "birds", 16, "animal", 1.35, (0.42, 0.50), 0.95, 0.6, ("birdie", "birdies")),
    Kind("cat", "cats", 17, "animal", 0.85, (0.5, 0.76), 1.0, 0, ("kitten", "kittens", "kitty", "kitties")),
    Kind("dog", "dogs", 18, "animal", 1.25, (0.45, 0.52), 1.0, 0, ("puppy", "puppies", "hound", "hounds")),
    Kind("sheep", "sheep", 20, "animal", 1.3, (0.45, 0.45), 1.0, 0, ("lamb", "lambs", "ewe", "ewes")),
    Kind("fish", "fish", 102, "animal", 1.6, (0.45, 0.55), 1.0, 0, ("fishes", "fishes")),
    Kind("umbrella", "umbrellas", 28, "outdoor", 1.1, (0.5, 0.25), 1.0, 0, ("parasol", "parasols")),
    Kind("ball", "balls", 37, "outdoor", 1.0, (0.5, 0.5), 0.85, 0.1, ("football", "footballs")),
    Kind("surfboard", "surfboards", 42, "outdoor", 0.34, (0.5, 0.51), 1.2),
    Kind("bottle", "bottles", 44, "kitchen", 0.4, (0.5, 0.86), 1.0, 0, ("flask", "flasks")),
    Kind("cup", "cups", 47, "kitchen", 1.15, (0.38, 0.6), 0.9, 0, ("mug", "mugs")),
    Kind("fork", "forks", 48, "kitchen", 0.34, (0.5, 0.36), 1.0),
    Kind("bowl", "bowls", 51, "kitchen", 1.6, (0.5, 0.62), 1.0, 0, ("basin", "basins")),
    Kind("plate", "plates", 103, "kitchen", 1.7, (0.5, 0.42), 1.05, 0, ("dish", "dishes", "saucer", "saucers")),
    Kind("chair", "chairs", 62, "furniture", 0.62, (0.45, 0.57), 1.1, 0, ("seat", "seats")),
    Kind("bed", "beds", 65, "furniture", 1.75, (0.62, 0.58), 1.2),
    Kind("table", "tables", 67, "furniture", 1.55, (0.5, 0.14), 1.15),
    Kind("lamp", "lamps", 104, "furniture", 0.6, (0.5, 0.27), 1.0),
    Kind("clock", "clocks", 85, "furniture", 1.0, (0.5, 0.62), 0.85, 0.75),
    Kind("laptop", "laptops", 73, "desk", 1.3, (0.5, 0.92), 1.05, 0, ("notebook", "notebooks")),
    Kind("book", "books", 84, "desk", 0.85, (0.55, 0.7), 0.95, 0, ("novel", "novels")),
    Kind("pen", "pens", 105, "desk", 1.1, (0.55, 0.45), 0.95, 0, ("biro", "biros")),
    Kind("tree", "trees", 106, "plant", 0.78, (0.5, 0.32), 1.25),
    Kind("flower", "flowers", 107, "plant", 0.62, (0.5, 0.12), 1.0, 0, ("blossom", "blossoms")),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
