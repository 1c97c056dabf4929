"""What sliding windows, norm-less heads and exits that own a block add to the cost of a token (`bench/cost.py`).

And the ideal speed-up of a batch, whose rows share one reading of the weights.

`tests/bench/test_bench.py` has the rest.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest

from bench.cost import (
    ModelCost,
    TokenCost,
    at_full_depth,
    ideal_from_bytes,
    ideal_from_operations,
    ideal_from_roofline,
    prefill_ops,
)
from eejax.core import ExitConfig, ModelConfig
from eejax.model.transformer import count_params, param_shapes

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
    assert cost.tied_output == tied


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


def test_segments_add_up_to_the_blocks_of_a_token():
    token = TokenCost(6, 20, (6,))
    assert [COST.segment_positions(token, e, e + 2) for e in (0, 2, 4)] == [40, 20 + 5, 10]
    assert sum(COST.segment_positions(token, e, e + 1) for e in range(6)) == COST.kv_positions(token)


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


# Two segments of two blocks of 100 parameters. Norms of 10 stand before an output matrix of 50.
PAIR = ModelCost(
    n_layers=4,
    block_params=100,
    fill_params=10,
    head_params={2: 60, 4: 60},
    body_params={2: 10},
    kv_per_token=2,
    attention_ops=8,
    itemsize=4,
)
BANDWIDTH, RATE = 4.0, 3.0
# At these rates one row takes the bytes' time, and two rows that of their operations. Ten positions in two blocks.
SEGMENT = (4 * (200 + 20 * 2) / BANDWIDTH, 2 * (2 * 200 + 20 * 8) / RATE)
NORM = (4 * 10 / BANDWIDTH, 2 * 2 * 10 / RATE)
MATRIX = (4 * 50 / BANDWIDTH, 2 * 2 * 50 / RATE)


def of_two(times: tuple[float, float], share: float) -> float:
    """Expected time of a part that each of two rows needs with chance `share`."""
    return 2 * share * (1 - share) * times[0] + share**2 * times[1]


def leaving(*later: TokenCost) -> list[TokenCost]:
    """Three tokens of four leave at the exit; the others are `later`."""
    return [TokenCost(2, 10, (2,))] * 3 + list(later)


@pytest.mark.parametrize(
    ("cost", "later", "heads"),
    [
        # No logits decide: one output matrix for both rows, wherever they leave.
        (PAIR, TokenCost(4, 10, (4,)), of_two(NORM, 3 / 4) + of_two(NORM, 1 / 4) + MATRIX[1]),
        # So do probes, but both rows run the norm before theirs.
        (PAIR, TokenCost(4, 10, (4,), probes=(2,)), NORM[1] + of_two(NORM, 1 / 4) + MATRIX[1]),
        # Logits of both rows at the exit, and of those that go on.
        (PAIR, TokenCost(4, 10, (2, 4)), NORM[1] + MATRIX[1] + of_two(NORM, 1 / 4) + of_two(MATRIX, 1 / 4)),
        # A matrix for each exit point.
        (
            replace(PAIR, tied_output=False),
            TokenCost(4, 10, (4,)),
            of_two(NORM, 3 / 4) + of_two(MATRIX, 3 / 4) + of_two(NORM, 1 / 4) + of_two(MATRIX, 1 / 4),
        ),
    ],
)
def test_a_batch_of_two_by_hand(cost, later, heads):
    full = 2 * SEGMENT[1] + NORM[1] + MATRIX[1]
    early = SEGMENT[1] + of_two(SEGMENT, 1 / 4) + heads
    assert ideal_from_roofline(cost, leaving(later), 2, BANDWIDTH, RATE) == pytest.approx(full / early, rel=1e-12)


# Everything at once: windows, blocks of exits' own, probes, logits that decide, contexts of all lengths.
MIXED = {
    "no logits": [TokenCost(2, 3, (2,)), TokenCost(4, 9, (4,)), TokenCost(6, 40, (6,)), TokenCost(2, 20, (2,))],
    "logits": [TokenCost(2, 3, (2,)), TokenCost(4, 9, (2, 4)), TokenCost(6, 40, (2, 4, 6)), TokenCost(2, 20, (2,))],
    "probes": [TokenCost(2, 3, (2,)), TokenCost(4, 9, (4,), (2,)), TokenCost(6, 40, (6,), (2, 4))],
    "nobody at the end": [TokenCost(2, 3, (2,)), TokenCost(4, 9, (2, 4))],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", MIXED.values(), ids=MIXED)
def test_limits_of_the_roofline(tokens, tied):
    cost = replace(COST, tied_output=tied)
    alone = ideal_from_roofline(cost, tokens, 1, bandwidth=7.0, rate=math.inf)
    assert alone == pytest.approx(ideal_from_bytes(cost, tokens), rel=1e-12)
    for rows in (1, 2, 300):
        computed = ideal_from_roofline(cost, tokens, rows, bandwidth=math.inf, rate=7.0)
        assert computed == pytest.approx(ideal_from_operations(cost, tokens), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_full_depth_gains_nothing(rows):
    tokens = at_full_depth(MIXED["logits"], 6)
    assert ideal_from_roofline(COST, tokens, rows, bandwidth=5.0, rate=3.0) == 1.0


def test_weights_alone_are_shared_by_all_rows():
    """Nothing but weights costs anything, so every row more is one more that may need the deep ones."""
    cost, tokens = replace(PAIR, kv_per_token=0), leaving(TokenCost(4, 10, (4,)))
    found = []
    for rows in (1, 2, 4, 8, 16, 300):
        found.append(ideal_from_roofline(cost, tokens, rows, BANDWIDTH, math.inf))
        some, most = 1 - 0.75**rows, 1 - 0.25**rows
        assert found[-1] == pytest.approx(460 / (200 + 200 * some + 10 * some + 10 * most + 50), rel=1e-12)
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.4
    assert found[-1] < 1  # all is read, and the exit's norm besides


def test_a_large_batch_computes():
    """From two rows on operations take longer here, and hardly a step of 300 rows has fewer in any part."""
    tokens = leaving(TokenCost(4, 10, (4,)))
    found = ideal_from_roofline(PAIR, tokens, 300, BANDWIDTH, RATE)
    assert found == pytest.approx(ideal_from_operations(PAIR, tokens), rel=1e-12)
    assert ideal_from_roofline(PAIR, tokens, 2, BANDWIDTH, RATE) < 0.97 * found


@pytest.mark.parametrize("rows", [32, 300])
def test_many_rows_against_exact_fractions(rows):
    """Reading and computing take the same time at the expected number of rows."""
    cost = replace(PAIR, head_params={2: 0, 4: 0}, body_params={2: 0})
    share = Fraction(1, 8)

    def read(count: int | Fraction) -> Fraction:
        return Fraction(200 + 40 * count) if count else Fraction(0)

    def seconds(count: int) -> Fraction:
        return max(read(count), count / (rows * share) * read(rows * share))

    expected = sum(math.comb(rows, k) * share**k * (1 - share) ** (rows - k) * seconds(k) for k in range(rows + 1))
    tokens = [TokenCost(2, 10, (2,))] * 7 + [TokenCost(4, 10, (4,))]
    rate = float(rows * share * (400 + 160) / read(rows * share))
    found = ideal_from_roofline(cost, tokens, rows, BANDWIDTH, rate)
    assert found == pytest.approx(float(2 * seconds(rows) / (seconds(rows) + expected)), rel=1e-12)
