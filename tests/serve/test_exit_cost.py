"""What exits cost and save, in blocks, by hand; and who is told when they cost more."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest

from eejax import LLM, EarlyExitParams, ExitCostWarning, SamplingParams
from eejax.core import ExitConfig, ModelConfig
from eejax.model.transformer import count_params, param_shapes
from eejax.serve import exit_cost
from eejax.serve.exit_cost import MIN_TOKENS, ExitLedger, PartSizes, asked_and_left, exit_costs
from tests.cases import SHAPES, random_params, shape_config

# A block: norms of 8 and 8, Q and O of 8 x 8, K and V of 4 x 8, an MLP of 3 x 12 x 8. A head: 123 x 8 and a norm of 8,
# just as much as two blocks.
BLOCK, MLP, MATRIX, NORM = 496, 288, 984, 8
NEVER = math.inf


def model(head: str = "shared", layers: tuple[int, ...] = (1, 2), **options) -> ModelConfig:
    return ModelConfig(
        vocab_size=123, hidden_size=8, intermediate_size=12, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4,
        exits=ExitConfig(layers, head, **options),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_of_the_real_parameters(shape: str) -> None:
    config = shape_config(shape)
    found, real = PartSizes.of(config), param_shapes(config)
    block = real["blocks"][0]
    assert (found.block, found.fill) == (count_params(block), block["wkv"].size)
    matrix = real["embedding" if config.tie_embeddings else "output"].size
    assert found.heads[config.n_layers] == matrix + config.hidden_size
    for layer, name in zip(config.exits.layers, config.exit_names, strict=True):
        own = real.get("exits", {}).get(name, {})
        body = count_params({part: own[part] for part in ("norm", "mlp", "block") if part in own})
        assert found.bodies[layer] == (config.hidden_size if config.exits.head == "shared" else body)
        assert found.heads[layer] == found.bodies[layer] + matrix


@pytest.mark.parametrize(
    ("head", "options", "body"),
    [
        ("shared", {}, NORM),
        ("norm", {"norm": False}, 0),
        ("norm", {"tie_output": False}, NORM),
        ("mlp", {}, NORM + MLP),
        ("block", {}, NORM + BLOCK),
    ],
)
def test_costs_by_hand(head: str, options: dict, body: int) -> None:
    for layer, with_logits in zip((1, 2), exit_costs(model(head, **options), with_logits=True), strict=True):
        assert with_logits.layer == layer
        assert with_logits.asked == pytest.approx((body + MATRIX) / BLOCK)
        assert with_logits.saved == pytest.approx(3 - layer + 2)  # the last head is two blocks
        assert with_logits.break_even == pytest.approx((body + MATRIX) / BLOCK / (5 - layer))
    # A token that leaves asks the exit's output matrix in place of the last one.
    [_, without] = exit_costs(model(head, **options), with_logits=False)
    assert without.asked == pytest.approx(body / BLOCK)
    assert without.saved == pytest.approx(1 + NORM / BLOCK)


def test_a_token_asks_every_exit_up_to_where_it_leaves() -> None:
    tokens_at = {1: 5, 3: 2, 4: 3}
    assert asked_and_left((1, 2, 3), (0.5, 0.5, 0.5), tokens_at) == {1: (10, 5), 2: (5, 0), 3: (5, 2)}
    assert asked_and_left((1, 2, 3), (0.5, NEVER, 0.5), tokens_at) == {1: (10, 5), 2: (0, 0), 3: (5, 2)}


def ledger(*added: tuple[tuple[float, ...], dict[int, int]]) -> ExitLedger:
    found = ExitLedger(model(), slots=7)
    for thresholds, tokens_at in added:
        found.add(thresholds, tokens_at)
    return found


def test_the_complaint_by_hand() -> None:
    """Asked 300 and 200 times at two blocks each; 100 saved four blocks each, 50 saved three."""
    both = ledger(((0.5, 0.5), {1: 40, 2: 50, 3: 110}), ((0.5, 0.5), {1: 60, 3: 40}))
    text = both.complaint()
    assert text is not None
    for part in (
        "over 300 decoded tokens", "paid 3.33 blocks", "saved 1.83 by exiting, of 3 blocks",
        "0.50 after block 1 (0.33 did), 0.67 after block 2 (0.25 did)", "up to 7 slots", "infinity", "(similarity)",
    ):  # fmt: skip
        assert part in text
    both.add((0.5, 0.5), {3: 1000})
    assert both.complaint() is None  # once is enough


def test_the_first_exit_pays_from_its_break_even_share_on() -> None:
    one = (0.5, NEVER)
    assert ledger((one, {1: 150, 3: 150})).complaint() is None
    text = ledger((one, {1: 149, 3: 151})).complaint()
    assert text is not None
    assert "after block 2" not in text  # nobody asked it


def test_few_tokens_tell_nothing() -> None:
    few = ledger(((0.5, 0.5), {3: MIN_TOKENS - 1}))
    assert few.complaint() is None
    few.add((0.5, 0.5), {3: 1})
    assert few.complaint() is not None
    assert ledger().complaint() is None


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(model())


@pytest.fixture
def llm(params: dict, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Eleven decoded tokens are enough to be told."""
    monkeypatch.setattr(exit_cost, "MIN_TOKENS", 11)
    return LLM.from_params(dataclasses.replace(model(), max_position=32), params, max_num_seqs=2, page_size=16)


def ask(llm: LLM, early_exit: EarlyExitParams | None, answers: int = 3) -> None:
    """Answers of five tokens, four of them decoded."""
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, early_exit=early_exit)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}] * answers, params, use_tqdm=False)


def test_the_user_is_told_once(llm: LLM) -> None:
    ask(llm, EarlyExitParams(1.5))  # no exit is asked: nothing to count
    ask(llm, EarlyExitParams(1.0), answers=2)  # eight tokens: too few yet, and a warning would be an error
    with pytest.warns(ExitCostWarning, match=r"12 decoded tokens, a token paid 4\.00 blocks .* saved 0\.00") as seen:
        ask(llm, EarlyExitParams(1.0), answers=1)
    assert [one.filename for one in seen] == [__file__]
    ask(llm, EarlyExitParams(1.0))


def test_others_are_told_nothing(llm: LLM) -> None:
    for early_exit in (
        None,
        EarlyExitParams(1.0, "similarity"),
        EarlyExitParams(0.0),  # all leave at the first exit
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask(llm, early_exit)
