"""What sliding windows, norm-less heads and exits that own a block add to the cost of a token (`bench/cost.py`).

`tests/test_bench.py` has the rest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cost import ModelCost, TokenCost, at_full_depth, ideal_from_bytes, prefill_ops
from eejax.config import ExitConfig, ModelConfig
from eejax.model import count_params, param_shapes

# Blocks of 100 parameters, the last head 50, exits after 2 and 4 of 6 with heads of 130; windows of 5 from block 3 on.
COST = ModelCost(
    n_layers=6,
    block_params=100,
    fill_params=10,
    head_params={2: 130, 4: 130, 6: 50},
    body_params={2: 80, 4: 80},
    kv_per_token=2,
    attention_ops=8,
    itemsize=4,
    sliding_window=5,
    sliding_from=3,
    block_exits=(2, 4),
)


def model(exits: ExitConfig, **options) -> ModelConfig:
    return ModelConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4,
        exits=exits, **options,
    )  # fmt: skip


@pytest.mark.parametrize("probes", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_heads_are_counted_from_the_real_parameters(head, tied, norm, probes):
    cost = ModelCost.of(model(ExitConfig((1,), head, tie_output=tied, norm=norm, probes=probes)), 2)
    matrix, vector = 20 * 8, 8
    mlp, block = 3 * 8 * 12, count_params(param_shapes(model(ExitConfig()))["blocks"][0])
    body = {"norm": 0, "mlp": mlp, "block": block}[head]
    assert cost.head_params == {1: body + matrix + norm * vector, 3: matrix + vector}
    assert cost.body_params == {1: body + norm * vector}
    assert cost.block_exits == ((1,) if head == "block" else ())


def test_a_shared_head_costs_the_same_with_a_probe():
    plain, probed = (ModelCost.of(model(ExitConfig((1,), probes=probes)), 2) for probes in (False, True))
    assert plain == probed


def test_windows_come_from_the_configuration():
    cost = ModelCost.of(model(ExitConfig(), sliding_window=6, sliding_from=2), 2)
    assert (cost.sliding_window, cost.sliding_from) == (6, 2)
    assert cost.kv_positions(TokenCost(3, 10, (3,))) == 10 + 10 + 6


@pytest.mark.parametrize(
    ("exit_layer", "context", "heads", "positions"),
    [
        (6, 4, (6,), 6 * 4),  # nothing has slid out of the window
        (6, 5, (6,), 6 * 5),
        (6, 6, (6,), 3 * 6 + 3 * 5),
        (6, 20, (6,), 3 * 20 + 3 * 5),
        (2, 20, (2,), 2 * 20 + 20),  # the exit's own block sees everything
        (4, 20, (2, 4), 3 * 20 + 5 + 2 * 20),
        (6, 20, (4, 6), 3 * 20 + 3 * 5 + 20),
    ],
)
def test_positions_read_by_hand(exit_layer, context, heads, positions):
    token = TokenCost(exit_layer, context, heads)
    weights = 100 * exit_layer + sum(COST.head_params[e] for e in heads)
    assert COST.kv_positions(token) == positions
    assert COST.token_bytes(token) == 4 * (weights + 2 * positions)
    assert COST.token_ops(token) == 2 * weights + 8 * positions


def test_a_probe_runs_its_exit_s_own_block():
    asked, probed = TokenCost(6, 20, (2, 6)), TokenCost(6, 20, (6,), probes=(2,))
    assert COST.kv_positions(probed) == COST.kv_positions(asked)
    assert COST.fill_bytes(probed) == COST.fill_bytes(asked)
    assert COST.token_ops(asked) - COST.token_ops(probed) == 2 * (130 - 80)


def test_exits_that_were_not_asked_are_filled_in():
    filled = {(2, (2,)): 4 + 1, (4, (2, 4)): 2, (4, (4,)): 2 + 1, (6, (6,)): 2}
    for (exit_layer, heads), blocks in filled.items():
        assert COST.fill_bytes(TokenCost(exit_layer, 7, heads)) == 4 * 10 * blocks


def test_prefill_reads_windows_and_runs_no_exit():
    attention = 8 * (3 * (1 + 2 + 3 + 4 + 5 + 6 + 7) + 3 * (1 + 2 + 3 + 4 + 5 + 5 + 5))
    assert prefill_ops(COST, 7) == 2 * (6 * 100 * 7 + 50) + attention


def test_the_mean_head_is_that_of_the_heads_asked():
    tokens = [TokenCost(2, 9, (2,)), TokenCost(6, 9, (2, 4, 6))]
    assert COST.mean_head(tokens) == (130 + 130 + 130 + 50) / 4
    assert COST.mean_head([]) == 50
    # Alone in its batch, a step reads what its token needs.
    positions = sum(map(COST.kv_positions, tokens))
    assert COST.step_bytes(8, 4, positions, COST.mean_head(tokens)) == sum(map(COST.token_bytes, tokens))
    assert COST.step_bytes(8, 4, positions) == 4 * (800 + 4 * 50 + 2 * positions)


def test_an_exit_s_own_block_lowers_the_ideal():
    tokens = [TokenCost(2, 20, (2,))]
    assert at_full_depth(tokens, 6) == [TokenCost(6, 20, (6,))]
    plain = replace(COST, block_exits=(), head_params={2: 50, 4: 50, 6: 50})
    whole = 650 + 2 * (3 * 20 + 3 * 5)
    assert ideal_from_bytes(COST, tokens) == whole / (330 + 2 * 60)
    assert ideal_from_bytes(plain, tokens) == whole / (250 + 2 * 40)
