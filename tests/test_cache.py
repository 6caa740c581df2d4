from __future__ import annotations

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itd.cache import ByteCache


def test_what_was_not_used_for_longest_is_forgotten_first() -> None:
    cache: ByteCache[str] = ByteCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    cache.put("d", "D", 3)
    assert ("b" in cache, cache.get("a"), cache.get("c"), cache.get("d")) == (False, "A", "C", "D")
    assert cache.get("b") is None
    assert (len(cache), cache.n_bytes) == (3, 9)


def test_a_value_that_does_not_fit_is_not_kept() -> None:
    cache: ByteCache[str] = ByteCache(10)
    cache.put("a", "A", 11)
    assert (len(cache), cache.n_bytes) == (0, 0)


def test_a_new_value_takes_the_place_of_the_old() -> None:
    cache: ByteCache[str] = ByteCache(10)
    cache.put("a", "A", 4)
    cache.put("a", "AA", 6)
    assert (cache.get("a"), cache.n_bytes) == ("AA", 6)
    cache.discard("a")
    cache.discard("a")
    assert cache.n_bytes == 0
    cache.put("b", "B", 1)
    cache.clear()
    assert (len(cache), cache.n_bytes) == (0, 0)


@given(puts=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 7)), max_size=40), max_bytes=st.integers(0, 20))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_a_cache_never_holds_more_than_it_may_and_counts_what_it_holds(puts: list[tuple[int, int]], max_bytes: int) -> None:
    cache: ByteCache[int] = ByteCache(max_bytes)
    sizes = {}
    for key, n_bytes in puts:
        cache.put(key, key, n_bytes)
        sizes[key] = n_bytes
        assert cache.n_bytes <= max_bytes
        assert cache.n_bytes == sum(sizes[k] for k in sizes if k in cache)


def test_a_negative_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds 0 bytes or more, got -1"):
        ByteCache(-1)


def test_a_cache_is_copied_with_what_it_holds() -> None:
    cache: ByteCache[str] = ByteCache(3)
    cache.put("a", "value", 2)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        copied.put("b", "other", 2)
        assert (copied.get("a"), copied.get("b"), cache.get("a")) == (None, "other", "value")


def test_threads_share_a_cache() -> None:
    cache: ByteCache[int] = ByteCache(50)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            cache.put(rng.randrange(60), seed, rng.randrange(5))
            cache.get(rng.randrange(60))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert cache.n_bytes == sum(n for _, n in cache._values.values()) <= 50
