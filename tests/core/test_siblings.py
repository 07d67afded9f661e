from __future__ import annotations

from random import Random

import numpy as np
import pytest

from radixkv.siblings import Siblings, closest_of


def key(*ids: int) -> bytes:
    return np.array(ids, np.int32).tobytes()


@pytest.mark.parametrize("num_heads", [1, 40, 5000])
def test_the_closest_sibling_is_the_one_a_search_through_all_finds(num_heads):
    """One first token of all, so that they become many; a few; nearly one each."""
    random = Random(num_heads)
    siblings, model = Siblings(()), set()
    for step in range(6000):
        ids = key(random.randrange(num_heads), *(random.randrange(40) for _ in range(3)))
        if ids not in model:
            siblings.add(ids)
            model.add(ids)
        if random.random() < 0.3:
            gone = random.choice(sorted(model)) if step % 50 == 0 else ids
            siblings.remove(gone)
            model.remove(gone)
        if step % 60 == 0:
            probe = key(random.randrange(num_heads), *(random.randrange(40) for _ in range(random.randrange(4))))
            found, best = siblings.closest(probe), closest_of(model, probe)
            assert found.num_tokens == best.num_tokens
            assert (found.key in model) == (best.num_tokens > 0)
            assert found.key[: 4 * found.num_tokens] == probe[: 4 * found.num_tokens]
    assert sorted(siblings.keys()) == sorted(model)
    for ids in model:
        siblings.remove(ids)
    assert siblings.keys() == []


def test_a_probe_of_less_than_a_token_is_close_to_nobody():
    siblings = Siblings([key(1, 2), key(3, 4)])
    assert siblings.closest(b"").num_tokens == 0
    assert siblings.closest(key(9, 9)).num_tokens == 0
