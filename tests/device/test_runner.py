"""The compiled programs: what memory they take, when they are compiled, and how much they run."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core import (
    CacheConfig,
    DecayingThreshold,
    DecodeConfig,
    EarlyExitParams,
    EngineConfig,
    ExitConfig,
    ModelConfig,
    SamplingParams,
    SchedulerConfig,
)
from eejax.core.buckets import Piece, batch_size, bucket_of, cut_prefill
from eejax.core.request import MicroBatch, Request, RequestOutput, Sequence
from eejax.core.xla_flags import set_xla_flags
from eejax.device.batch_arrays import MAX_DEVICE_STOP_IDS, logprobs_of, prefill_tokens
from eejax.device.decode_state import WAITING_PER_ROW
from eejax.device.runner import Runner
from eejax.device.sampling import token_logprobs
from eejax.serve.engine import Engine
from pallas_kernels.native import library
from tests.cases import random_model, random_prompt
from tests.reference import Reference, rms_norm

SHAPE = "mha"  # three blocks, exits after 1 and 2, a shared head
MODEL, PARAMS = random_model(SHAPE)
DEPTH, EXITS = MODEL.n_layers, MODEL.exits.layers
PAGES, PAGE, MAX_LEN, CHUNK = 16, 8, 32, 8
EAGER = DecodeConfig(fill="eager")
NATIVE = library.refusal() is None
NEVER = EarlyExitParams(1.0)  # asks every head, and no top probability reaches 1


def config(num_pages: int = PAGES, model: ModelConfig = MODEL, decode: DecodeConfig = EAGER) -> EngineConfig:
    return EngineConfig(
        model=model,
        cache=CacheConfig(num_pages, PAGE),
        scheduler=SchedulerConfig(max_num_seqs=3, max_chunk_steps=CHUNK),
        decode=decode,
        max_model_len=MAX_LEN,
        prefill_chunk=16,
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    """All tests of this file use its programs; it has compiled every one of them."""
    engine = Engine(config(), PARAMS)
    engine.runner.warm_up()
    return engine


@pytest.fixture
def runner(engine: Engine) -> Runner:
    return engine.runner


def sequence(runner: Runner, place: int = 0, prompt_length: int = 5, max_tokens: int = 20, **params) -> Sequence:
    """A prefilled sequence with one token, on pages of its own."""
    given = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens} | params)
    thresholds = given.early_exit.thresholds_for(MODEL) if given.early_exit else (float("inf"),) * len(EXITS)
    prompt = tuple(random_prompt(MODEL, prompt_length, place))
    stop_ids = frozenset(given.stop_token_ids)
    [seq] = Request(f"r{place}", None, prompt, given, max_tokens, thresholds, stop_ids, given.seed or 0).sequences
    width = runner.config.pages_per_seq
    seq.pages = list(range(place * width, (place + 1) * width))
    [row] = runner.run(MicroBatch("prefill", (seq,))).rows
    assert row.exit_layers == (DEPTH,)
    seq.append(row.token_ids[0], DEPTH, None)
    return seq


def decode(runner: Runner, *seqs: Sequence, n_steps: int = CHUNK, yield_on_free: bool = False, hold: int = 1):
    return runner.run(MicroBatch("decode", seqs, n_steps, yield_on_free, hold=hold))


def always(measure: str = "random", **options) -> EarlyExitParams:
    return EarlyExitParams(0.0, measure, **options)


def run_all(engine: Engine, *requests: tuple[list[int], SamplingParams]) -> list[RequestOutput]:
    ids = [engine.add_request({"prompt_token_ids": prompt}, params) for prompt, params in requests]
    finished: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return [finished[i] for i in ids]


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def larger() -> Runner:
    return Runner(config(256 * PAGES), PARAMS)


@pytest.fixture(scope="module")
def plain() -> Runner:
    """All rows run every block that one of them needs."""
    return Runner(config(decode=DecodeConfig("never", "eager", "never")), PARAMS)


@pytest.fixture(scope="module")
def deferring() -> tuple[Runner, Runner]:
    """Deferred fill-in with compaction, over a small and a large cache."""
    decode = DecodeConfig("always", "deferred")
    return Runner(config(decode=decode), PARAMS), Runner(config(256 * PAGES, decode=decode), PARAMS)


@pytest.fixture(scope="module")
def windowed() -> tuple[Runner, Runner]:
    """A model with sliding windows and blocks of exits' own, over a small and a large cache."""
    model, params = random_model("everything_else", n_layers=3, exits=ExitConfig((1, 2), "block"))
    return Runner(config(model=model), params), Runner(config(256 * PAGES, model), params)


def cache_bytes(runner: Runner) -> int:
    return runner.cache.k.nbytes + runner.cache.v.nbytes


def single_threaded_loops(program: str) -> int:
    """Loops that XLA:CPU took for small and made one kernel of a single thread: it marks them."""
    return program.count("xla_cpu_small_call")


def test_no_loop_was_made_a_single_threaded_kernel(runner, windowed):
    """The heads and the fill-in must not be among them (eejax/core/xla_flags.py)."""
    for one in (runner, windowed[0]):
        assert single_threaded_loops(one.decode_program(4).as_text()) == 0


SMALL_LOOP = """
import jax, jax.numpy as jnp
loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: jnp.sin(x) + jnp.roll(x, 1), x))
print(loop.lower(jnp.zeros(8)).compile().as_text())
"""


@pytest.mark.parametrize("flags", ["of XLA", "of eejax"])
def test_single_threaded_loops_are_found_where_xla_makes_them(flags):
    """A control for the test above: XLA makes them by default, and the search finds them."""
    environment = os.environ | {"XLA_FLAGS": ""}
    if flags == "of eejax":
        set_xla_flags(environment)
    ran = subprocess.run(
        [sys.executable, "-c", SMALL_LOOP], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "while" in ran.stdout
    assert (single_threaded_loops(ran.stdout) > 0) == (flags == "of XLA")


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_memory_does_not_grow_with_the_cache(runner, larger, kind):
    assert_memory_does_not_grow_with_the_cache(runner, larger, kind)


def test_memory_does_not_grow_with_the_cache_when_states_wait(deferring):
    assert_memory_does_not_grow_with_the_cache(*deferring, "decode")


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_memory_does_not_grow_with_the_cache_of_windows_and_blocks_of_exits(windowed, kind):
    runner, larger = windowed
    assert runner.cache.k.shape[0] == runner.config.model.n_cached_blocks > runner.config.model.n_layers
    assert_memory_does_not_grow_with_the_cache(runner, larger, kind)


def assert_memory_does_not_grow_with_the_cache(runner: Runner, larger: Runner, kind: str) -> None:
    small, large = (
        (r.decode_program(4) if kind == "decode" else r._prefill_program(16)).memory_analysis()
        for r in (runner, larger)
    )
    assert cache_bytes(larger) == 256 * cache_bytes(runner)
    assert 0 < small.temp_size_in_bytes == large.temp_size_in_bytes < cache_bytes(larger) // 16
    # What is donated comes back: the cache is neither copied nor allocated anew.
    assert small.alias_size_in_bytes >= cache_bytes(runner)
    assert large.alias_size_in_bytes >= cache_bytes(larger)
    grown = large.output_size_in_bytes - small.output_size_in_bytes
    assert grown == cache_bytes(larger) - cache_bytes(runner) == large.alias_size_in_bytes - small.alias_size_in_bytes


def test_the_donated_cache_is_used_in_place(runner):
    seq = sequence(runner)
    before = runner.cache
    address = before.k.unsafe_buffer_pointer(), before.v.unsafe_buffer_pointer()
    decode(runner, seq)
    assert before.k.is_deleted() and before.v.is_deleted()
    assert (runner.cache.k.unsafe_buffer_pointer(), runner.cache.v.unsafe_buffer_pointer()) == address


# -------------------------------------------------------------------------------------------------------- compilation


def test_buckets_are_powers_of_two_that_cover_everything(runner):
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 31, 33)] == [1, 2, 4, 4, 8, 32, 64]
    assert bucket_of(3, 16) == 16
    assert [batch_size(40, 32, free) for free in (False, True)] == [64, 128]  # more than there are as a rule
    # At most three sequences, one row of four being padding; where that costs nothing, two are padded as well.
    assert runner.decode_buckets == ([1, 4] if NATIVE else [1, 2, 4])
    assert runner.prefill_buckets == [16]


@pytest.mark.skipif(not NATIVE, reason="without native kernels padding is computed")
@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, [1]), (2, [1, 2]), (8, [1, 8]), (16, [1, 8, 16]), (32, [1, 8, 32]), (50, [1, 8, 32, 64])],
)
def test_fewer_batch_sizes_are_compiled_where_padding_costs_nothing(most, buckets):
    given = replace(config(), scheduler=SchedulerConfig(most, CHUNK))
    assert Runner(given, PARAMS).decode_buckets == buckets
    never = replace(given, decode=DecodeConfig("never", "eager", "never"))
    assert Runner(never, PARAMS).decode_buckets == [2**i for i in range(buckets[-1].bit_length())]


NO_OPERATION = {"get-tuple-element", "tuple", "bitcast", "parameter", "constant"}


def most_ready(instructions: list[tuple[str, str, list[str]]]) -> int:
    """The most operations of a computation that wait at a time, if they run in the order of becoming ready.

    Args:
        instructions: name, opcode and operands of each.
    """
    made_by: dict[str, set[str]] = {}
    missing: dict[str, int] = {}
    readers: dict[str, list[str]] = {}
    for name, opcode, operands in instructions:
        needs = set().union(*(made_by.get(one, set()) for one in operands))
        if opcode in NO_OPERATION:
            made_by[name] = needs
            continue
        made_by[name], missing[name] = {name}, len(needs)
        for one in needs:
            readers.setdefault(one, []).append(name)
    ready, most = [name for name, count in missing.items() if not count], 0
    while ready:
        most = max(most, len(ready))
        for reader in readers.get(ready.pop(0), ()):
            missing[reader] -= 1
            ready += [reader] if not missing[reader] else []
    return most


@pytest.mark.skipif(not NATIVE, reason="what XLA makes of products is not ours to order")
def test_xla_has_no_reason_to_give_operations_of_a_step_to_another_thread(engine):
    """On a CPU it gives half away where more than eight are left when it takes one; to wake a thread is slow."""
    program = engine.runner.decode_program(4).as_text()
    found = {}
    for part in re.split(r"\n\n", program):
        lines = re.findall(r"^  (?:ROOT )?%([\w.-]+) = .*? ([a-z-]+)\((.*)$", part, re.MULTILINE)
        calls = [(name, opcode, re.findall(r"%([\w.-]+)", rest.split("), ")[0])) for name, opcode, rest in lines]
        if "eejax_linear" in part and "eejax_paged_attention" in part:
            found[part.split(" ", 1)[0]] = most_ready(calls)
        elif sum(opcode == "while" for _, opcode, _ in calls) > DEPTH:  # the segments, one after another
            found["step"] = most_ready(calls)
    assert len(found) == len(EXITS) + 2, "every segment, and the step around them"
    assert max(found.values()) <= 9, found


def test_nothing_is_compiled_after_warm_up(engine):
    programs, compilations = dict(engine.runner._compiled.programs), engine.runner.compilations
    assert set(programs) == {("prefill", 16, ""), *(("decode", rows, "") for rows in engine.runner.decode_buckets)}
    rng = np.random.default_rng(0)
    exits = (None, NEVER, always(), EarlyExitParams(DecayingThreshold((0.3, 0.4)), "margin", min_layers=2))
    samplings = (
        {"temperature": 0.0},
        {"top_k": 5, "top_p": 0.9, "seed": 3},
        {"min_p": 0.1, "logprobs": 4, "temperature": 2.0},
        {"n": 2, "stop_token_ids": list(range(0, 60, 5))},
    )
    requests = [
        (
            random_prompt(MODEL, int(rng.integers(1, MAX_LEN)), i),
            SamplingParams(
                max_tokens=int(rng.integers(1, 20)),
                early_exit=exits[i // 4],
                logprobs=options.pop("logprobs", None),
                **options,
            ),
        )
        for i, options in enumerate(dict(samplings[i % 4]) for i in range(16))
    ]
    compiled: list[str] = []  # in the whole process, or fetched from the compilation cache

    def listen(event: str, _: float, **__: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1).lower(1).compile()
        assert len(compiled) == 1, "the listener hears nothing"
        for company in (1, 2, 13):
            batch, requests = requests[:company], requests[company:]
            assert all(output.finished for output in run_all(engine, *batch))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1
    assert engine.runner._compiled.programs == programs
    assert engine.runner.compilations == engine.stats().compilations == compilations


SECOND_START = """
from eejax import LLM, EarlyExitParams, SamplingParams
from tests.cases import random_model

llm = LLM.from_params(*random_model("mqa", n_layers=2), max_model_len=16, max_num_seqs=1, page_size=8)
params = SamplingParams(max_tokens=4, seed=1, early_exit=EarlyExitParams(0.5))
tokens = llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)[0].outputs[0].token_ids
print(llm.stats().compilations, *tokens)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    cache = tmp_path / "cache"
    if NATIVE:  # the C compiler has built these
        shutil.copytree(library.cache_folder() / "native", cache / "native")

    def start() -> list[int]:
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", SECOND_START],
            env=os.environ | {"EEJAX_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return [int(number) for number in ran.stdout.split()]

    first, second = start(), start()
    assert first[0] == 2  # prefill and decode
    assert second[0] == 0
    assert first[1:] == second[1:]
    assert list((cache / "xla").rglob("*"))


# ------------------------------------------------------------------------------------------------------ hidden states


def fresh(runner: Runner, prompt: list[int], place: int = 0, **params) -> Sequence:
    thresholds, asked = (float("inf"),) * len(EXITS), SamplingParams(temperature=0.0, **params)
    [seq] = Request(f"fresh {place}", None, tuple(prompt), asked, 4, thresholds, frozenset(), 0).sequences
    width = runner.config.pages_per_seq
    seq.pages = list(range(place * width, (place + 1) * width))
    return seq


@pytest.mark.parametrize("length", [1, 5, 16, 23])  # 23 takes two calls
def test_prefill_hands_out_what_the_last_block_made_of_the_last_prompt_token(runner, length):
    prompt = random_prompt(MODEL, length)
    [row] = runner.run(MicroBatch("prefill", (fresh(runner, prompt),)), wants_hidden=True).rows
    assert row.hidden is not None
    assert (row.hidden.shape, row.hidden.dtype) == ((MODEL.hidden_size,), np.float32)
    logits = np.asarray(PARAMS["output"]) @ rms_norm(np.asarray(PARAMS["norm"]), row.hidden, MODEL.norm_eps)
    expected = Reference(MODEL, PARAMS).full_depth(prompt)[DEPTH][-1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_hidden_states_are_of_fresh_prompts_and_only_where_wanted(runner):
    seq = fresh(runner, random_prompt(MODEL, 5))
    [row] = runner.run(MicroBatch("prefill", (seq,))).rows
    assert row.hidden is None
    seq.append(row.token_ids[0], DEPTH, None)
    [row] = runner.run(MicroBatch("prefill", (seq,)), wants_hidden=True).rows  # as after a preemption
    assert row.hidden is None


SPANS = st.lists(
    st.integers(0, 40).flatmap(lambda begin: st.integers(0, 70).map(lambda length: (begin, begin + length))),
    max_size=12,
)


@settings(max_examples=200)
@given(SPANS, st.integers(1, 40), st.integers(1, 6))
def test_prefill_is_cut_into_full_calls(spans, chunk, max_rows):
    calls = cut_prefill(spans, chunk, max_rows)
    found = [(piece.row, piece.start + i) for call in calls for piece in call for i in range(piece.length)]
    # Every position once, one row after another: a token's predecessors are in its call or in an earlier one.
    assert found == [(row, position) for row, span in enumerate(spans) for position in range(*span)]
    for call in calls:
        assert len({piece.row for piece in call}) == len(call) <= max_rows
        assert all(piece.length > 0 for piece in call)
        assert sum(piece.length for piece in call) <= chunk
    for call in calls[:-1]:
        full = sum(piece.length for piece in call) == chunk
        assert full or (len(call) == max_rows and call[-1].start + call[-1].length == spans[call[-1].row][1])


def test_a_row_that_does_not_fit_goes_on_in_the_next_call():
    spans = [(0, 5), (8, 20), (0, 0), (3, 6)]
    together = [[Piece(0, 0, 5), Piece(1, 8, 5)], [Piece(1, 13, 7), Piece(3, 3, 3)]]
    assert cut_prefill(spans, 10, 3) == together
    alone = [[Piece(0, 0, 5)], [Piece(1, 8, 10)], [Piece(1, 18, 2)], [Piece(3, 3, 3)]]
    assert cut_prefill(spans, 10, 1) == alone
    assert cut_prefill([], 10, 1) == []


class Watched(tuple):
    """A prompt that counts how many of its tokens are read."""

    __slots__ = ()
    read = 0

    def __iter__(self) -> Iterator[int]:
        Watched.read += len(self)
        return super().__iter__()

    def __getitem__(self, at):
        Watched.read += len(range(len(self))[at]) if isinstance(at, slice) else 1
        return super().__getitem__(at)


@pytest.mark.parametrize("length", [50, 400])
def test_a_long_prompt_is_read_once_however_many_calls_it_takes(length):
    prompt = random_prompt(MODEL, length)
    [seq] = Request("r", None, Watched(prompt), SamplingParams(), 4, (math.inf,) * 2, frozenset(), 0).sequences
    calls = cut_prefill([(0, length)], 16, 1)
    Watched.read = 0
    found = [prefill_tokens([(seq, piece) for piece in call], 16, 1, DEPTH) for call in calls]
    assert [token for one in found for token in one.ids.tolist()][:length] == prompt
    assert Watched.read == length


def test_answer_tokens_are_prefilled_with_the_blocks_that_they_ran():
    """After a preemption, at every place where a call may begin and end."""
    [seq] = Request("r", None, (1, 2, 3), SamplingParams(), 9, (math.inf,) * 2, frozenset(), 0).sequences
    for token, layer in ((4, 3), (5, 1), (6, 2), (7, 3)):
        seq.append(token, layer, None)
    tokens, depths = [1, 2, 3, 4, 5, 6], [3, 3, 3, 1, 2, 3]
    for start, stop in itertools.combinations(range(seq.prefill_length + 1), 2):
        assert seq.prefill_tokens(start, stop, 3) == (tokens[start:stop], depths[start:stop])


def test_rows_of_one_call_get_their_own_results(runner):
    """Beside one another: a row that wants log-probabilities, one that does not, and one that has its token already."""
    width = runner.config.pages_per_seq
    seqs = [
        fresh(runner, random_prompt(MODEL, length, length), place=place, logprobs=asks)
        for place, (length, asks) in enumerate([(13, 2), (4, None), (7, 0)])
    ]
    alone = [runner.run(MicroBatch("prefill", (seq,)), wants_hidden=True).rows[0] for seq in seqs]
    seqs[2].append(alone[2].token_ids[0], DEPTH, None)
    assert len({page for seq in seqs for page in seq.pages}) == 3 * width
    found = runner.run(MicroBatch("prefill", tuple(seqs)), wants_hidden=True).rows
    assert (found[2].token_ids, found[2].logprobs, found[2].hidden) == ((), (), None)
    for together, by_itself in zip(found[:2], alone[:2], strict=True):
        assert (together.token_ids, together.exit_layers) == (by_itself.token_ids, by_itself.exit_layers)
        np.testing.assert_allclose(together.hidden, by_itself.hidden, atol=1e-4)
    assert found[1].logprobs == ()
    [ours], [theirs] = found[0].logprobs, alone[0].logprobs
    assert list(ours) == list(theirs)
    assert [x.logprob for x in ours.values()] == pytest.approx([x.logprob for x in theirs.values()], abs=1e-4)


# --------------------------------------------------------------------------------------------------- how much is run


@pytest.mark.parametrize(("count", "width"), [(1, 0), (1, 3), (2, 0), (3, 2)])
def test_row_steps_count_padding_and_a_static_batch_is_no_narrower_than_its_width(runner, count, width):
    bucket = next(size for size in runner.decode_buckets if size >= max(count, width))
    seqs = tuple(sequence(runner, place) for place in range(count))
    alone = [decode(runner, sequence(runner, place), n_steps=3).rows[0] for place in range(count)]
    result = runner.run(MicroBatch("decode", seqs, 3, width=width))
    assert (result.counts.steps, result.counts.row_steps) == (3, 3 * bucket)
    assert [row.token_ids for row in result.rows] == [row.token_ids for row in alone]


@pytest.mark.parametrize("n_steps", [1, 3, CHUNK])
def test_one_row_that_always_exits_runs_the_first_segment_only(runner, n_steps):
    result = decode(runner, sequence(runner, early_exit=always()), n_steps=n_steps)
    assert result.counts.steps == n_steps
    assert result.counts.blocks_run == n_steps * EXITS[0]
    assert result.counts.heads_run == n_steps  # the random measure asks no head
    assert result.rows[0].exit_layers == (EXITS[0],) * n_steps


def test_a_head_where_a_row_exits_is_not_run_again(runner):
    result = decode(runner, sequence(runner, early_exit=always("softmax")), n_steps=5)
    assert (result.counts.steps, result.counts.blocks_run, result.counts.heads_run) == (5, 5 * EXITS[0], 5)


def test_heads_where_no_row_exits_are_run_besides_the_last(runner):
    result = decode(runner, sequence(runner, early_exit=NEVER), n_steps=5)
    assert (result.counts.steps, result.counts.blocks_run, result.counts.heads_run) == (
        5,
        5 * DEPTH,
        5 * (len(EXITS) + 1),
    )
    assert set(result.rows[0].exit_layers) == {DEPTH}


@pytest.mark.parametrize("early_exit", [None, EarlyExitParams(1.5), EarlyExitParams(1.5, "random")])
def test_full_depth_runs_every_block_and_one_head(runner, early_exit):
    result = decode(runner, sequence(runner, early_exit=early_exit), n_steps=5)
    assert (result.counts.steps, result.counts.blocks_run, result.counts.heads_run) == (5, 5 * DEPTH, 5)


def test_exits_that_a_request_does_not_use_are_not_asked(runner):
    result = decode(runner, sequence(runner, early_exit=replace(NEVER, exit_layers=EXITS[1:])), n_steps=5)
    assert (result.counts.blocks_run, result.counts.heads_run) == (5 * DEPTH, 5 * 2)
    result = decode(runner, sequence(runner, early_exit=replace(NEVER, min_layers=EXITS[0] + 1)), n_steps=5)
    assert (result.counts.blocks_run, result.counts.heads_run) == (5 * DEPTH, 5 * 2)


@pytest.mark.parametrize(
    ("other", "blocks"), [(always(exit_layers=EXITS[1:]), EXITS[1]), (None, DEPTH), (always(), EXITS[0])]
)
def test_a_step_runs_as_deep_as_its_deepest_row(runner, other, blocks):
    seqs = sequence(runner, 0, early_exit=always()), sequence(runner, 1, early_exit=other)
    result = decode(runner, *seqs, n_steps=4)
    assert (result.counts.steps, result.counts.blocks_run, result.counts.heads_run) == (4, 4 * blocks, 4)
    assert [row.exit_layers for row in result.rows] == [(EXITS[0],) * 4, (blocks,) * 4]


def test_finished_rows_no_longer_count(runner):
    """Once the deep row has spent its budget of two, steps are as shallow as the row still running."""
    seqs = sequence(runner, 0, early_exit=always()), sequence(runner, 1, max_tokens=3)
    result = decode(runner, *seqs, n_steps=6)
    assert [len(row.token_ids) for row in result.rows] == [6, 2]
    assert (result.counts.steps, result.counts.blocks_run) == (6, 2 * DEPTH + 4 * EXITS[0])


# ------------------------------------------------------------------------------------- compaction, fill-in, rebatching


def test_compaction_computes_the_rows_that_go_on(runner, plain):
    early = [sequence(runner, place, early_exit=always()) for place in (0, 1)]
    stays = sequence(runner, 2)
    compact = decode(runner, *early, stays, n_steps=4)
    assert (compact.counts.blocks_run, compact.counts.row_steps) == (4 * DEPTH, 4 * 4)
    # Three of four rows are live, one of them goes on; all three need a head.
    assert compact.counts.row_blocks == 4 * (EXITS[0] * 3 + (DEPTH - EXITS[0]) * 1)
    assert (compact.counts.heads_run, compact.counts.row_heads, compact.counts.fills) == (4, 4 * 3, 0)
    early = [sequence(plain, place, early_exit=always()) for place in (0, 1)]
    everything = decode(plain, *early, sequence(plain, 2), n_steps=4)
    assert everything.counts.row_blocks == 4 * DEPTH * 4
    assert [row.token_ids for row in everything.rows] == [row.token_ids for row in compact.rows]


def test_heads_are_asked_for_the_rows_that_came_to_them(runner):
    """Two rows exit first; the third asks the second exit's head and then the last one's, alone."""
    rows = [sequence(runner, place, early_exit=always("softmax")) for place in (0, 1)]
    result = decode(runner, *rows, sequence(runner, 2, early_exit=NEVER), n_steps=2)
    assert (result.counts.heads_run, result.counts.row_heads) == (2 * 3, 2 * (3 + 1 + 1))


def test_rows_that_have_ended_are_not_computed(runner):
    ends = [sequence(runner, place, max_tokens=2) for place in (0, 1)]
    result = decode(runner, *ends, sequence(runner, 2), n_steps=5)
    assert result.counts.row_blocks == DEPTH * (3 + 4 * 1)


def test_cheap_measures_ask_one_head_a_step(runner):
    rows = [
        sequence(runner, 0, early_exit=EarlyExitParams(0.999, "similarity")),
        sequence(runner, 1, early_exit=EarlyExitParams(0.0, "similarity", exit_layers=EXITS[1:])),
    ]
    result = decode(runner, *rows, n_steps=6)
    assert {layer for row in result.rows for layer in row.exit_layers} == {EXITS[1], DEPTH}
    assert (result.counts.heads_run, result.counts.row_heads) == (6, 6 * 2)


def test_eager_fill_in_is_written_in_every_step(runner):
    result = decode(runner, sequence(runner, early_exit=always()))
    assert (result.counts.fills, result.counts.blocks_run) == (CHUNK * (DEPTH - EXITS[0]), CHUNK * EXITS[0])


def test_by_default_fill_in_waits_where_a_row_is_alone_and_weights_are_large(monkeypatch):
    def fills(*places: int) -> int:
        runner = Runner(config(decode=DecodeConfig()), PARAMS)
        return decode(runner, *[sequence(runner, place, early_exit=always()) for place in places]).counts.fills

    skipped = DEPTH - EXITS[0]
    assert fills(0) == CHUNK * skipped
    monkeypatch.setattr("eejax.device.runner.DEFERRED_KV_BYTES", 1)
    assert fills(0) == CHUNK // WAITING_PER_ROW * skipped
    assert fills(0, 1) == CHUNK * skipped


def test_deferred_fill_in_is_written_for_many_tokens_at_once(runner, deferring):
    expected = decode(runner, sequence(runner, early_exit=always()))
    one = sequence(deferring[0], early_exit=always())
    result = decode(deferring[0], one)
    # When the places of a row are taken, and at the end of the chunk, which is one of these times here.
    assert CHUNK % WAITING_PER_ROW == 0
    assert result.counts.fills == CHUNK // WAITING_PER_ROW * (DEPTH - EXITS[0])
    assert result.rows[0].token_ids == expected.rows[0].token_ids
    # Of a row that ends in the chunk, nothing is written in vain.
    short = sequence(deferring[0], early_exit=always(), max_tokens=WAITING_PER_ROW)
    assert decode(deferring[0], short).counts.fills == 0


def test_waiting_tokens_go_along_with_the_block_that_reads_them(runner, deferring):
    """Every other token goes deep, so what waits never fills the places, and nothing is written apart."""
    # The draws of the `random` measure for tokens 1, 2, ... of seed 0, as the model gives them.
    half = EarlyExitParams(0.5, "random")
    for seed in range(200):
        seq = sequence(runner, early_exit=half, seed=seed)
        expected = decode(runner, seq, n_steps=6)
        depths = expected.rows[0].exit_layers
        if depths[0] == EXITS[0] and depths[-1] == DEPTH and set(depths) == {EXITS[0], DEPTH}:
            break
    assert expected.counts.fills > 0
    result = decode(deferring[0], sequence(deferring[0], early_exit=half, seed=seed), n_steps=6)
    assert (result.rows[0].token_ids, result.rows[0].exit_layers) == (expected.rows[0].token_ids, depths)
    assert (result.counts.fills, result.counts.blocks_run) == (0, expected.counts.blocks_run)


def test_held_rows_let_the_others_go_on(runner):
    def rows() -> list[Sequence]:
        return [sequence(runner, 0, early_exit=always()), sequence(runner, 1, early_exit=always()), sequence(runner, 2)]

    plain = decode(runner, *rows(), n_steps=6)
    held = decode(runner, *rows(), n_steps=6, hold=2)
    assert [len(row.token_ids) for row in plain.rows] == [6, 6, 6]
    # The deep row is held at the exit for two passes and goes on in the next; in the last pass no row is held.
    assert [len(row.token_ids) for row in held.rows] == [6, 6, 2]
    assert held.rows[2].token_ids == plain.rows[2].token_ids[:2]
    assert [row.token_ids for row in held.rows[:2]] == [row.token_ids for row in plain.rows[:2]]
    assert held.counts.blocks_run == 6 * EXITS[0] + 2 * (DEPTH - EXITS[0])


def test_a_segment_runs_as_soon_as_enough_rows_have_gathered(runner):
    rows = [sequence(runner, 0, early_exit=always()), sequence(runner, 1), sequence(runner, 2)]
    result = decode(runner, *rows, n_steps=4, hold=2)
    assert [len(row.token_ids) for row in result.rows] == [4, 4, 4]


# --------------------------------------------------------------------------------------------------- when a chunk ends


def test_budgets_end_rows_inside_a_chunk(runner):
    seqs = sequence(runner, 0, max_tokens=4), sequence(runner, 1, max_tokens=6)
    alone = [decode(runner, sequence(runner, place, max_tokens=20)).rows[0].token_ids for place in (0, 1)]
    result = decode(runner, *seqs)
    assert [row.token_ids for row in result.rows] == [alone[0][:3], alone[1][:5]]
    assert result.counts.steps == 5  # of 8: no row is left


@pytest.mark.parametrize(("yield_on_free", "steps"), [(True, 3), (False, 5)])
def test_a_freed_slot_ends_the_chunk_if_a_request_waits(runner, yield_on_free, steps):
    seqs = sequence(runner, 0, max_tokens=4), sequence(runner, 1, max_tokens=6)
    result = decode(runner, *seqs, yield_on_free=yield_on_free)
    assert result.counts.steps == steps
    assert [len(row.token_ids) for row in result.rows] == [3, steps]


def test_a_stop_token_ends_the_chunk_too(runner):
    plain = decode(runner, sequence(runner)).rows[0].token_ids
    at = next(i for i in range(1, CHUNK) if plain[i] not in plain[:i])
    result = decode(runner, sequence(runner, stop_token_ids=[plain[at]]))
    assert (result.counts.steps, result.rows[0].token_ids) == (at + 1, plain[: at + 1])


def test_more_stop_tokens_than_the_device_tests(engine):
    """The device knows the lowest ids. The host finds the others, and drops what the device went on to write."""
    prompt = random_prompt(MODEL, 6, 1)
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    [plain] = run_all(engine, (prompt, greedy))
    tokens, unused = plain.outputs[0].token_ids, sorted(set(range(MODEL.vocab_size)) - set(plain.outputs[0].token_ids))
    at, stop = next((i, t) for i, t in enumerate(tokens) if i > 1 and t not in tokens[:i] and t > unused[8])
    ids = [*unused[: MAX_DEVICE_STOP_IDS + 1], stop]
    assert sorted(ids).index(stop) >= MAX_DEVICE_STOP_IDS
    before = engine.stats().pages_in_use
    [found] = run_all(engine, (prompt, replace(greedy, stop_token_ids=ids)))
    assert found.outputs[0].token_ids == tokens[: at + 1]
    assert found.outputs[0].finish_reason == "stop"
    assert len(found.outputs[0].exit_layers) == at + 1
    assert engine.stats().pages_in_use == before == 0


# -------------------------------------------------------------------------------------------------------- what is odd


def test_any_top_k_travels_to_the_device(engine):
    """Above 2**31 it still means all tokens."""
    prompt = random_prompt(MODEL, 4)
    plain, huge = (SamplingParams(max_tokens=6, seed=1, top_k=k) for k in (0, 2**40))
    outputs = run_all(engine, (prompt, plain), (prompt, huge))
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_logprobs_of_a_vocabulary_smaller_than_asked_for():
    logits = np.array([[0.5], [2.0], [1.0]], np.float32)
    report = token_logprobs(logits, np.array([0], np.int32))
    found = logprobs_of(report, token=0, row=0, count=20)
    assert {token: one.rank for token, one in found.items()} == {1: 1, 2: 2, 0: 3}
    total = np.log(np.sum(np.exp(logits)))
    for token, one in found.items():
        assert one.logprob == pytest.approx(logits[token, 0] - total, rel=1e-5)
