"""Memories and questions made up by a seed, with the statistics of real text: for measuring time, not quality.

The words: English stop words, four of ten, as in what people write, and 60,000 invented ones whose frequency falls
with their rank as Zipf and Mandelbrot found (the commonest is in about one memory of eight, half of those used at all
are in a handful). Three memories of ten begin with "User", as what models extract does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SEED = 20251120
COMMON = 100
"""The first so many words by rank count as common."""

_STOP = (
    "the", "to", "and", "of", "a", "in", "is", "it", "for", "that", "on", "with", "was", "as", "at", "by",
    "this", "be", "are", "from", "have", "or", "an", "not", "but", "they", "you", "we", "his", "her", "she",
    "he", "my", "me", "their", "our", "had", "has", "were", "been", "will", "would", "can", "could", "should",
    "do", "does", "did", "so", "if", "when", "what", "which", "who", "how",
)  # fmt: skip
_SYLLABLES = [
    a + b for a in ("", *"bdfgklmnprstvz", "br", "ch", "st", "tr") for b in ("a", "e", "i", "o", "u", "ai")
]
_CODAS = ("", "n", "r", "l", "k", "sh", "nd", "m")
_WORDS = 60_000
_STOP_SHARE, _USER_SHARE = 0.4, 0.3
_BLOCK = 10_000


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    words: np.ndarray
    """By rank, commonest first."""
    summed: np.ndarray
    """Share of all uses up to each rank."""


def _vocabulary() -> _Vocabulary:
    chance = np.random.default_rng(SEED)
    made: dict[str, None] = {}
    while len(made) < _WORDS:
        count = chance.integers(2, 4)
        made["".join(chance.choice(_SYLLABLES, count)) + str(chance.choice(_CODAS))] = None
    weights = 1 / (np.arange(1, _WORDS + 1) + 10.0)
    return _Vocabulary(words=np.array(list(made), dtype=object), summed=np.cumsum(weights) / weights.sum())


class MadeTexts:
    """Texts in an order that never changes; a longer list begins with the shorter one."""

    def __init__(self) -> None:
        self._vocabulary = _vocabulary()
        self._rank = {word: rank for rank, word in enumerate(self._vocabulary.words)}

    def memories(self) -> Iterator[str]:
        """Sentences of 5 to 40 words, without end."""
        for block in itertools.count():
            chance = np.random.default_rng((SEED, block))
            lengths = chance.integers(5, 41, _BLOCK)
            words = self._draw(chance, int(lengths.sum()))
            begins_with_user = chance.random(_BLOCK) < _USER_SHARE
            for number, end in enumerate(np.cumsum(lengths)):
                sentence = words[end - lengths[number] : end]
                if begins_with_user[number]:
                    sentence[0] = "User"
                yield " ".join(sentence) + "."

    def questions(self, count: int) -> list[str]:
        """Questions of 3 to 10 words: of each kind a quarter, stop words, common, by frequency and rare ones."""
        chance = np.random.default_rng((SEED, -1 % 2**32))
        found = []
        for length in chance.integers(3, 11, count):
            kinds = chance.integers(0, 4, length)
            common = np.append(self._vocabulary.words[:COMMON], "user")
            words = np.where(
                kinds == 0,
                chance.choice(np.array(_STOP, dtype=object), length),
                np.where(
                    kinds == 1,
                    chance.choice(common, length),
                    np.where(
                        kinds == 2,
                        self._by_frequency(chance, length),
                        chance.choice(self._vocabulary.words[_WORDS // 10 :], length),
                    ),
                ),
            )
            found.append(" ".join(words) + "?")
        return found

    def question_about(self, memory: str) -> str:
        """Four of the eight commonest words of a memory, of those that are no stop words."""
        words = {word for word in memory[:-1].split() if word in self._rank}
        commonest = sorted(words, key=self._rank.__getitem__)[:8]
        return " ".join(random.Random(memory).sample(commonest, min(4, len(commonest)))) + "?"

    def _draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        stop = chance.choice(np.array(_STOP, dtype=object), count)
        return np.where(chance.random(count) < _STOP_SHARE, stop, self._by_frequency(chance, count))

    def _by_frequency(self, chance: np.random.Generator, count: int) -> np.ndarray:
        return self._vocabulary.words[np.searchsorted(self._vocabulary.summed, chance.random(count))]
