"""Predictors of length: what they read, what they fall back on, and the file that heads lie in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from eejax.core.errors import CheckpointError, ConfigError, InvalidRequestError
from eejax.core.lengths import LEVELS, LengthEstimate
from eejax.model.weights import load_config
from eejax.schedule.length_heads import (
    HEADS_FILE,
    HIDDEN_EXTRAS,
    PROMPT_BUCKETS,
    PROMPT_FEATURES,
    LengthHeads,
    load_length_heads,
    save_length_heads,
)
from eejax.schedule.length_predictor import (
    LARGEST_NUMBER,
    QUESTION,
    ConstantPredictor,
    HiddenPredictor,
    LengthPredictor,
    PerceptionPredictor,
    PromptPredictor,
    hidden_features,
    make_predictor,
    prompt_features,
    question_turn,
    said_number,
)
from eejax.text.chat import chat_prompt
from eejax.text.tokenizer import load_tokenizer
from tests.cases import shape_config

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
MODEL = shape_config()
SIZE, Q, LIMIT = MODEL.hidden_size, len(LEVELS), 1000
FIVE = (5.0, 10.0, 20.0, 40.0, 80.0)


class Words:
    """A tokenizer of letters, with a chat template or without, or with one that takes no second turn."""

    vocab_size, bos_id, eos_id = 256, 1, 2
    special_ids = frozenset({1, 2})
    cleans_up = False

    def __init__(self, template: str | None = None) -> None:
        self.template = template

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [1] * add_bos + [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(i) for i in ids)

    def apply_chat_template(self, messages: Sequence[dict], add_generation_prompt: bool = True, **_: object) -> str:
        if self.template == "single" and len(messages) > 1:
            raise InvalidRequestError("one message only")
        turns = [f"[{message['role']}]{message['content']}" for message in messages]
        joint = "|" if self.template == "counted" else ""
        return f"<{len(messages)}>" * bool(joint) + joint.join(turns) + "[assistant]" * add_generation_prompt


def heads(seed: int = 0, **changes: object) -> LengthHeads:
    rng = np.random.default_rng(seed)
    made = LengthHeads(
        np.log(np.array(FIVE, np.float32)),
        rng.standard_normal((PROMPT_FEATURES + 1, Q)).astype(np.float32),
        rng.standard_normal((SIZE + HIDDEN_EXTRAS + 1, Q)).astype(np.float32),
        about={"training_prompts": 12},
    )
    return dataclasses.replace(made, **changes)


# ---------------------------------------------------------------------------------------------------------- features


def test_prompt_features_count_ngrams_in_their_order() -> None:
    one = prompt_features([5])
    assert one.shape == (PROMPT_FEATURES,)
    assert one.dtype == np.float32
    assert np.count_nonzero(one[:PROMPT_BUCKETS]) == 1
    assert one[PROMPT_BUCKETS] == 0  # the logarithm of one token
    several = prompt_features([5, 6, 7, 8])
    assert np.count_nonzero(several[:PROMPT_BUCKETS]) == 4 + 3 + 2
    assert several[PROMPT_BUCKETS] == pytest.approx(0.1 * math.log(4))
    assert np.array_equal(several, prompt_features((5, 6, 7, 8)))
    assert not np.array_equal(several, prompt_features([8, 7, 6, 5]))
    assert np.linalg.norm(prompt_features([3] * 50 + [4] * 9)[:PROMPT_BUCKETS]) == pytest.approx(1)


def test_hashes_fill_the_buckets_evenly() -> None:
    used = np.sum([prompt_features([token])[:PROMPT_BUCKETS] for token in range(4000)], axis=0)
    assert np.count_nonzero(used) > 0.8 * PROMPT_BUCKETS * (1 - math.exp(-4000 / PROMPT_BUCKETS))
    assert used.max() < 12


def test_hidden_features_do_not_know_how_large_the_state_was() -> None:
    state = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    found = hidden_features(state, np.array(FIVE))
    np.testing.assert_allclose(found, hidden_features(100 * state, np.array(FIVE)), rtol=1e-4)
    np.testing.assert_allclose(np.mean(found[:SIZE] ** 2), 1, rtol=1e-4)
    np.testing.assert_allclose(found[SIZE:], np.log(FIVE), rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- predictors


def test_constant_answers_with_the_training_answers_or_with_nothing() -> None:
    state = np.ones(SIZE, np.float32)
    for given_heads, expected in ((heads(), FIVE), (None, LengthEstimate.unknown(LIMIT).quantiles)):
        predictor = ConstantPredictor(given_heads)
        estimate = predictor.predict([1, 2, 3], LIMIT)
        assert estimate.quantiles == pytest.approx(expected)
        assert estimate == predictor.predict([9], LIMIT)
        assert predictor.refine(estimate, state, LIMIT) is estimate
        assert not predictor.needs_hidden
    assert ConstantPredictor(heads()).predict([1], 30).quantiles == pytest.approx((5, 10, 20, 30, 30))


def test_prompt_reads_the_prompt_alone() -> None:
    made, prompt = heads(), [4, 5, 6, 4]
    predictor = PromptPredictor(made)
    logs = prompt_features(prompt).astype(np.float64) @ made.prompt[:-1] + made.prompt[-1]
    estimate = predictor.predict(prompt, LIMIT)
    assert estimate == LengthEstimate.of(estimate.quantiles, LIMIT)
    assert estimate.quantiles == pytest.approx(LengthEstimate.of(np.exp(logs).tolist(), LIMIT).quantiles, rel=1e-4)
    assert predictor.refine(estimate, np.ones(SIZE, np.float32), LIMIT) is estimate
    assert not predictor.needs_hidden


def test_hidden_answers_like_prompt_first_and_then_reads_state_and_estimate() -> None:
    made, prompt = heads(), [4, 5, 6, 4]
    predictor = HiddenPredictor(made)
    before = predictor.predict(prompt, LIMIT)
    assert predictor.needs_hidden
    assert before == PromptPredictor(made).predict(prompt, LIMIT)
    state = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)
    normal = state / np.sqrt(np.mean(state**2))
    for earlier in (before, LengthEstimate.of(FIVE, LIMIT)):
        logs = np.concatenate([normal, np.log(earlier.quantiles), [1]]) @ made.hidden
        expected = LengthEstimate.of(np.exp(logs).tolist(), LIMIT)
        assert predictor.refine(earlier, state, LIMIT).quantiles == pytest.approx(expected.quantiles, rel=1e-3)


@given(
    numbers=arrays(np.float32, (Q,), elements=st.floats(width=32)),
    state=arrays(np.float32, (SIZE,), elements=st.floats(width=32)),
    limit=st.integers(1, 4096),
)
def test_absurd_heads_and_states_give_usable_estimates(numbers: np.ndarray, state: np.ndarray, limit: int) -> None:
    absurd = heads(marginal=numbers, perception=numbers)
    for matrix in (absurd.prompt, absurd.hidden):
        matrix[-1] = numbers
    hidden, perception = HiddenPredictor(absurd), PerceptionPredictor(absurd, Words())
    before = hidden.predict([1, 2, 3], limit)
    refined, constant = hidden.refine(before, state, limit), perception.predict([1, 2, 3], limit)
    for estimate in (before, refined, constant, perception.understand("37", limit)):
        assert estimate is not None
        assert estimate == LengthEstimate.of(estimate.quantiles, limit)
        assert all(1 <= value <= limit for value in estimate.quantiles)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, HiddenPredictor),
        ("hidden", HiddenPredictor),
        ("prompt", PromptPredictor),
        ("constant", ConstantPredictor),
        ("perception", PerceptionPredictor),
    ],
)
def test_predictors_by_name(name: str | None, kind: type[LengthPredictor]) -> None:
    assert type(make_predictor(name, heads(), Words())) is kind  # pyright: ignore[reportArgumentType]
    if name in ("hidden", "prompt"):
        with pytest.raises(ConfigError, match=rf"'{name}' needs length heads.*eejax train-length"):
            make_predictor(name, None, Words())  # pyright: ignore[reportArgumentType]
    else:
        expected = ConstantPredictor if name is None else kind
        assert type(make_predictor(name, None, Words())) is expected  # pyright: ignore[reportArgumentType]


def test_perception_needs_words() -> None:
    with pytest.raises(ConfigError, match=r"perception.*no tokenizer"):
        make_predictor("perception", heads(), None)


# -------------------------------------------------------------------------------------------------------- perception


def test_the_question_is_one_more_turn_of_the_conversation() -> None:
    tokenizer = load_tokenizer(DEMO)
    talk = [{"role": "user", "content": "What is a cat?"}]
    prompt = chat_prompt(tokenizer, talk)[1]
    asked = PerceptionPredictor(None, tokenizer).question(prompt)
    more = [{"role": "assistant", "content": ""}, {"role": "user", "content": QUESTION}]
    assert asked == chat_prompt(tokenizer, [*talk, *more])[1]
    assert asked.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", f"[user]{QUESTION}[assistant]"),
        (None, f"\n\n{QUESTION}\n"),
        ("single", f"\n\n{QUESTION}\n"),  # refuses a second turn
        ("counted", f"\n\n{QUESTION}\n"),  # begins otherwise when there are more turns
    ],
)
def test_the_question_where_templates_are_odd_or_none(template: str | None, expected: str) -> None:
    tokenizer = Words(template)
    assert tokenizer.decode(question_turn(tokenizer)) == expected
    assert PerceptionPredictor(None, tokenizer).question([7, 8]) == [7, 8, *map(ord, expected)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("About 120 tokens, or 90 words", 120),
        ("1,250", 1250),
        ("12.5 tokens", 12.5),
        ("-30", 30),
        (f"{LARGEST_NUMBER}", LARGEST_NUMBER),
        ("", None),
        ("many", None),
        ("0", None),
        (f"{LARGEST_NUMBER}0", None),
        ("9" * 400, None),
        ("Ⅷ ²", None),
    ],
)
def test_the_first_number_counts_if_it_can_be_a_length(text: str, number: float | None) -> None:
    assert said_number(text) == number
    estimate = PerceptionPredictor(None, Words()).understand(text, LIMIT)
    assert (estimate is None) == (number is None)


def test_a_said_number_spreads_as_measured_or_by_a_factor_of_two() -> None:
    measured = heads(perception=np.log(np.array([0.1, 0.5, 1.5, 2, 4], np.float32)))
    estimate = PerceptionPredictor(measured, Words()).understand("20", LIMIT)
    assert estimate is not None
    assert estimate.quantiles == pytest.approx((2, 10, 30, 40, 80))
    for without in (None, heads()):
        predictor = PerceptionPredictor(without, Words())
        estimate = predictor.understand("20", LIMIT)
        assert estimate is not None
        assert estimate.quantiles == pytest.approx((10, 20 * 2**-0.625, 20, 20 * 2**0.625, 40))
        assert predictor.predict([1, 2], LIMIT) == ConstantPredictor(without).predict([1, 2], LIMIT)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("perception", [None, np.arange(Q, dtype=np.float32)])
def test_heads_come_back_from_their_file(tmp_path: Path, perception: np.ndarray | None) -> None:
    made = heads(perception=perception)
    assert load_length_heads(tmp_path, MODEL) is None
    for _ in range(2):  # the second replaces the first
        assert save_length_heads(tmp_path, made) == tmp_path / HEADS_FILE
    assert [file.name for file in tmp_path.iterdir()] == [HEADS_FILE]
    found = load_length_heads(tmp_path, MODEL)
    assert found is not None
    assert found.about == made.about
    for name in ("marginal", "prompt", "hidden"):
        assert np.array_equal(getattr(found, name), getattr(made, name))
    assert (found.perception is None) == (perception is None)
    if perception is not None:
        assert np.array_equal(found.perception, perception)


def rewrite(file: Path, change: Callable[[dict], object], levels: object = LEVELS) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"eejax": json.dumps({"levels": levels, "about": {}})})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"no"), "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), "is damaged"),
        (lambda file: rewrite(file, lambda t: t.pop("prompt")), "prompt is missing"),
        (lambda file: rewrite(file, lambda t: t.update(more=t["prompt"])), "more is not known"),
        (lambda file: rewrite(file, lambda t: t.update(hidden=t["hidden"][:-1])), r"hidden must be float32 \(38, 5\)"),
        (lambda file: rewrite(file, lambda t: t.update(marginal=np.ones(Q))), "marginal must be float32"),
        (lambda file: rewrite(file, lambda t: t["prompt"].fill(np.nan)), "prompt holds values that are not finite"),
        (lambda file: rewrite(file, lambda t: t, [0.5]), r"holds quantiles at \[0.5\]"),
        (lambda file: rewrite(file, lambda t: t, "half"), "holds quantiles at half"),
        (lambda file: save_file(load_file(file), file), "is damaged: KeyError"),
        (lambda file: save_file(load_file(file), file, {"eejax": "{"}), "is damaged: JSONDecodeError"),
    ],
)
def test_damaged_heads_are_refused_by_name(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(save_length_heads(tmp_path, heads()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_length_heads(tmp_path, MODEL)
    assert HEADS_FILE in str(caught.value)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    save_length_heads(tmp_path, heads())
    with pytest.raises(CheckpointError, match=r"hidden must be float32 \(28, 5\), got float32 \(38, 5\)"):
        load_length_heads(tmp_path, shape_config("odd_sizes"))


def test_heads_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        save_length_heads(tmp_path / "nowhere", heads())


def test_the_demo_has_heads() -> None:
    found = load_length_heads(DEMO, load_config(DEMO))
    assert found is not None
    assert found.perception is not None
    assert (DEMO / HEADS_FILE).stat().st_size < 2**20
    tokenizer = load_tokenizer(DEMO)
    predictor = make_predictor(None, found, tokenizer)
    assert predictor.needs_hidden
    short, long = (
        predictor.predict(chat_prompt(tokenizer, [{"role": "user", "content": text}])[1], 512).quantile(0.5)
        for text in ("What does `npm sbom` do?", "Write an essay about the history of the Roman empire.")
    )
    assert 1.2 * short < long
