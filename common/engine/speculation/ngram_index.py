"""Where each n-gram of a growing text ended last, in some 50 bytes a token.

Owns a hash table with open addressing, an entry of 8 bytes for each different n-gram: the upper half is a tag
made of its tokens, which says where in the table it belongs, too, the lower half where it ended. Two n-grams
in four billion have the same tag, and then the later one is kept: whoever looks up compares the tokens.
Nothing is deleted. Tokens are hashed once, and a lookup costs the same however long the text is.
"""

from __future__ import annotations

import itertools
import operator
import secrets
from collections.abc import Sequence as AnySequence

import numpy as np
from numpy.typing import NDArray

SIZES = (2, 4, 8, 16)  # of the n-grams
MANY = 16  # tokens, from which on all at once are cheaper, in NumPy
ROOM = 64  # entries, of a text that begins

_MASK = 2**64 - 1
_FACTOR, _BASE = (secrets.randbits(64) | 1 for _ in range(2))  # that nobody can make n-grams collide
_SIZES = [
    (size, secrets.randbits(64), [pow(_BASE, place, 2**64) for place in range(known, size)])
    for known, size in itertools.pairwise((0, *SIZES))
]
"""With each size a number of its own, and a factor of each token that the next smaller one lacks, by the
token's place before the end."""
_HALF = np.uint64(32)


def tags(tokens: AnySequence[int], end: int) -> list[int]:
    """Of the n-grams that end there, the shortest first."""
    last = tokens[max(0, end - SIZES[-1]) : end][::-1]
    value, known, found = 0, 0, []
    for size, salt, powers in _SIZES:
        if size > end:
            break
        value += sum(map(operator.mul, last[known:size], powers))
        known = size
        found.append(((value + salt) * _FACTOR & _MASK) >> 32)
    return found


class NGramIndex:
    """Of the n-grams of a text that end after `begin`."""

    def __init__(self, begin: int = 0) -> None:
        self.indexed = begin  # those that end up to there are in it
        self._count = 0  # of entries, or more
        self._newest: tuple[int, list[int]] = 0, []
        self._make(ROOM)

    @property
    def num_bytes(self) -> int:
        return self._slots.nbytes

    def add(self, tokens: AnySequence[int], end: int, expected: int = 0) -> None:
        """The n-grams of `tokens[:end]` that are not in it yet; those of `tokens[:expected]` will follow."""
        start = self.indexed
        if end <= start:
            return
        self._reserve((end - start) * len(SIZES), (expected - start) * len(SIZES))
        if end - start < MANY:
            for at in range(start + 1, end + 1):
                for tag in self.newest(tokens, at):
                    self._put(tag, at)
        else:
            self._put_all(_words(tokens, start, end))
        self.indexed = end

    def newest(self, tokens: AnySequence[int], end: int) -> list[int]:
        """`tags`, but for the same end they are computed once: what is looked up now is added next."""
        if self._newest[0] != end:
            self._newest = end, tags(tokens, end)
        return self._newest[1]

    def find(self, tag: int) -> int:
        """Where the last n-gram with this tag ended; 0 if there is none."""
        slots, capacity = self._view, self._capacity
        at = tag * capacity >> 32
        while word := slots[at]:
            if word >> 32 == tag:
                return word & 0xFFFFFFFF
            at = at + 1 if at + 1 < capacity else 0
        return 0

    def _make(self, capacity: int) -> None:
        self._capacity = capacity
        self._slots = np.zeros(capacity, np.uint64)
        self._view = memoryview(self._slots.data)  # whose elements are Python's numbers, in half the time

    def _reserve(self, more: int, expected: int) -> None:
        """Three entries of four are used at most."""
        if (self._count + more) * 4 <= self._capacity * 3:
            return
        words = self._slots[self._slots > 0]
        self._count = len(words)
        if (self._count + more) * 4 > self._capacity * 3:
            self._make(max(2 * self._capacity, (self._count + max(more, expected)) * 3 // 2))
            self._count = 0
            self._put_all(words)

    def _put(self, tag: int, end: int) -> None:
        slots, capacity = self._view, self._capacity
        at = tag * capacity >> 32
        while (word := slots[at]) and word >> 32 != tag:
            at = at + 1 if at + 1 < capacity else 0
        self._count += not word
        slots[at] = tag << 32 | end

    def _put_all(self, words: NDArray[np.uint64]) -> None:
        """All at once: each goes one place further while another n-gram has its own. Equal ones go together,
        so that the last of them stays."""
        slots, capacity = self._slots, np.uint64(self._capacity)
        own = words >> _HALF
        self._count += len(words)
        places = (own * capacity >> _HALF).astype(np.int64)
        while len(words):
            found = slots[places]
            free = (found == 0) | (found >> _HALF == own)
            slots[places[free]] = words[free]
            left = slots[places] >> _HALF != own
            words, own = words[left], own[left]
            places = (places[left] + 1) % self._capacity


def _words(tokens: AnySequence[int], start: int, end: int) -> NDArray[np.uint64]:
    """The entries of all n-grams that end in `(start, end]`, in the order of their ends within a size."""
    before = min(start, SIZES[-1])
    numbers = np.array(tokens[start - before : end], np.uint64)
    ends = np.arange(start + 1, end + 1, dtype=np.uint64)
    values, known, found = np.zeros(end - start, np.uint64), 0, []
    for size, salt, powers in _SIZES:
        for place, power in enumerate(powers, known):
            first = max(0, place - before)  # of the ends, that has a token so far before it
            values[first:] += numbers[before + first - place : len(numbers) - place] * np.uint64(power)
        known = size
        first = max(0, size - 1 - start)
        own = (values[first:] + np.uint64(salt)) * np.uint64(_FACTOR) >> _HALF
        found.append(own << _HALF | ends[first:])
    return np.concatenate(found)
