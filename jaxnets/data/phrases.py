"""A parallel corpus that needs no file: short German sentences and their English translations.

They are made from a small grammar with the cases and genders of German, so that word for word doesn't
translate them: "den Ball" is "the ball" and "Der Hund" is "The dog", verbs go to the end behind "kann",
and a place may come first. It shows whether a model learns to translate, and says nothing of real text.
"""

import itertools

import numpy as np

from jaxnets import errors
from jaxnets.data import order
from jaxnets.data.parallel import Pairs, ParallelCorpus

_WHO = [  # gender, German, English
    ("m", "Mann", "man"),
    ("f", "Frau", "woman"),
    ("n", "Kind", "child"),
    ("m", "Hund", "dog"),
    ("f", "Katze", "cat"),
    ("n", "Mädchen", "girl"),
    ("m", "Junge", "boy"),
]
_WHAT = [
    ("m", "Ball", "ball"),
    ("f", "Blume", "flower"),
    ("n", "Buch", "book"),
    ("m", "Hut", "hat"),
    ("f", "Gitarre", "guitar"),
    ("n", "Fahrrad", "bicycle"),
]
_DOES = [  # he does it, to do it, and the same in English
    ("sieht", "sehen", "sees", "see"),
    ("sucht", "suchen", "looks for", "look for"),
    ("hält", "halten", "holds", "hold"),
    ("trägt", "tragen", "carries", "carry"),
    ("mag", "mögen", "likes", "like"),
]
_WHERE = [
    ("", ""),
    ("im Park", "in the park"),
    ("am Strand", "at the beach"),
    ("auf der Straße", "on the street"),
    ("vor dem Haus", "in front of the house"),
]
_NOMINATIVE = {"m": ("der", "ein"), "f": ("die", "eine"), "n": ("das", "ein")}
_ACCUSATIVE = {"m": ("den", "einen"), "f": ("die", "eine"), "n": ("das", "ein")}
_ENGLISH = ("the", "a")
_SIZES = {"train": 4000, "val": 200, "test": 200}
_SEED = 0


def load_phrases(*, source: str = "de", target: str = "en") -> ParallelCorpus:
    """Phrases: 4,000, 200 and 200 pairs, no sentence of which is in two parts.

    Args:
        source: "de" or "en".
        target: the other.

    Raises:
        ConfigError: for another language.

    Example:
        >>> pairs = load_phrases().parts["test"]
        >>> len(pairs), len(set(pairs.source))
        (200, 200)
    """
    for language in (source, target):
        if language not in ("de", "en"):
            raise errors.unknown("language of phrases", language, ("de", "en"))
    pairs = _all_pairs()
    drawn = order.index(_SEED, np.arange(len(pairs)), len(pairs))
    sides = (0, 1) if source == "de" else (1, 0)
    parts, begin = {}, 0
    for part, size in _SIZES.items():
        rows = [pairs[i] for i in drawn[begin : begin + size]]
        source_side, target_side = ([row[side] for row in rows] for side in sides)
        parts[part] = Pairs(source_side, target_side)
        begin += size
    return ParallelCorpus("phrases", parts, "made here")


def _all_pairs() -> list[tuple[str, str]]:
    pairs = []
    for who, what, does, where, k, m, form in itertools.product(
        _WHO, _WHAT, _DOES, _WHERE, (0, 1), (0, 1), ("now", "can", "place first")
    ):
        if form == "place first" and not where[0]:
            continue
        subject = f"{_NOMINATIVE[who[0]][k]} {who[1]}"
        thing = f"{_ACCUSATIVE[what[0]][m]} {what[1]}"
        actor, object_ = f"{_ENGLISH[k]} {who[2]}", f"{_ENGLISH[m]} {what[2]}"
        if form == "can":
            german = f"{subject} kann {thing} {where[0]} {does[1]}"
            english = f"{actor} can {does[3]} {object_} {where[1]}"
        elif form == "now":
            german, english = (
                f"{subject} {does[0]} {thing} {where[0]}",
                f"{actor} {does[2]} {object_} {where[1]}",
            )
        else:
            german = f"{where[0]} {does[0]} {subject} {thing}"
            english = f"{where[1]} {actor} {does[2]} {object_}"
        pairs.append(tuple(_sentence(text) for text in (german, english)))
    return pairs


def _sentence(words: str) -> str:
    text = " ".join(words.split())
    return f"{text[0].upper()}{text[1:]}."
