"""What `tests/shapes.py` checks, and what it lets through."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from eejax.device.kv_fill import Waiting
from pallas_kernels import PagedKVCache, Slots, slots_of

CACHE = PagedKVCache(jnp.zeros((1, 2, 1, 4, 8)), jnp.zeros((1, 2, 1, 4, 8)))

pytestmark = pytest.mark.skipif(os.environ.get("CHECK_SHAPES") == "off", reason="shapes are not checked")


def test_arguments_of_other_shapes_are_errors():
    table, positions = jnp.zeros((3, 2), jnp.int32), jnp.zeros(3, jnp.int32)
    slots_of(CACHE, table, positions)
    for wrong in ((table[:2], positions), (table, positions[None]), (table.astype(jnp.float32), positions)):
        with pytest.raises(TypeCheckError):
            slots_of(CACHE, *wrong)
        with pytest.raises(TypeCheckError):
            jax.eval_shape(lambda *arrays: slots_of(CACHE, *arrays), *wrong)


def test_dataclasses_are_checked_where_they_hold_arrays():
    ids = jnp.zeros(3, jnp.int32)
    with pytest.raises(TypeCheckError):
        Slots(ids, ids[:2])
    assert jax.tree.map(lambda _: "anything", Slots(ids, ids)).pages == "anything"
    Slots(np.zeros(3), np.zeros(2))
    with pytest.raises(TypeCheckError):
        Waiting(jnp.zeros((4, 2, 3)), jnp.zeros((2, 3), jnp.int32), jnp.zeros((3, 2), jnp.int32))


def test_a_function_can_be_left_to_check_its_own(unchecked_shapes):
    with pytest.raises(ValueError):  # jax's own
        slots_of(CACHE, jnp.zeros((3, 2), jnp.int32), jnp.zeros((3, 1), jnp.int32))
