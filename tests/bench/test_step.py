"""`bench step`: parts of known programs and traces, a trace of a real program, a dry run. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bench import step
from bench.__main__ import main
from bench.shapes import shape
from bench.step import Decoding, Profile
from bench.xla_profile import CONTROL_FLOW, Event, cpu_runs, instructions, module_name, part_of, split, trace
from eejax import ConfigError
from pallas_kernels.native.library import refusal

PROGRAM = """HloModule jit_decode_chunk, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_computation.1 (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  %exponential.1 = f32[4]{0} exponential(%param_0), metadata={op_name="jit(f)/heads/confidence/exp" stack_frame_id=1}
  %negate.1 = f32[4]{0} negate(%exponential.1), metadata={op_name="jit(f)/heads/confidence/neg"}
  %add.1 = f32[4]{0} add(%negate.1, %negate.1), metadata={op_name="jit(f)/heads/add"}
  ROOT %copy.9 = f32[4]{0} copy(%add.1)
}

ENTRY %main.5 (x.1: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0), metadata={op_name="x"}
  %copy.1 = f32[4]{0} copy(%x.1)
  %copy.2 = f32[4]{0} copy(%x.1), metadata={op_name="jit(f)/while/body/attention/transpose"}
  %rooted = f32[4]{0} fusion(%x.1), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(f)/fill/select_n"}
  %unrooted = f32[4]{0} fusion(%x.1), kind=kLoop, calls=%fused_computation.1
  %ffi_call.1 = (f32[4,1]{1,0}, /*index=1*/f32[0]{0}) custom-call(%x.1), custom_call_target="eejax_linear", metadata={op_name="jit(f)/ffi_call"}
  %ffi_call.2 = f32[4]{0} custom-call(%x.1), custom_call_target="eejax_linear", metadata={op_name="jit(f)/heads/ffi_call"}
  %ffi_call.3 = f32[4]{0} custom-call(%x.1), custom_call_target="eejax_paged_attention"
  %while.1 = (s32[], f32[4]{0}) while(%x.1), condition=%c, body=%b, metadata={op_name="jit(f)/products/while"}
  %sine.1 = f32[4]{0} sine(%x.1), metadata={op_name="jit(f)/vmap(fill)/sin"}
  %sine.2 = f32[4]{0} sine(%x.1), metadata={op_name="jit(f)/vmap(jit(attention))/sin"}
  ROOT %sine.3 = f32[4]{0} sine(%x.1)
}
"""  # noqa: E501


def test_the_innermost_scope_names_the_part() -> None:
    found = instructions(PROGRAM)
    assert module_name(PROGRAM) == "jit_decode_chunk"
    expected = {
        "copy.1": "copies",
        "copy.2": "attention",  # the model's own transposition, not one of XLA's making
        "rooted": "fill",
        "unrooted": "confidence",  # two of the three in a scope
        "ffi_call.1": "products",
        "ffi_call.2": "heads",  # a scope says more than a target
        "ffi_call.3": "attention",
        "while.1": CONTROL_FLOW,
        "sine.1": "fill",
        "sine.2": "other",  # a function's name is no scope
        "sine.3": "other",
    }
    assert {name: part_of(found[name]) for name in expected} == expected


def test_a_loop_keeps_what_its_body_leaves() -> None:
    parts = {"while": CONTROL_FLOW, "inner": CONTROL_FLOW, "a": "products", "b": "fill"}
    events = [
        Event("while", 10, 90),
        Event("a", 20, 30),
        Event("inner", 55, 20),
        Event("b", 60, 10),
        Event("a", 110, 10),  # nothing runs from 100 to 110
    ]
    assert split(events, parts) == {"products": 40, "fill": 10, CONTROL_FLOW: 10 + 10 + 30 + 10}
    assert sum(split(events, parts).values()) == 120 - 10


def test_operations_at_once_share_the_time() -> None:
    parts = {"a": "products", "b": "fill", "while": CONTROL_FLOW}
    events = [Event("a", 0, 10), Event("b", 6, 8), Event("while", 0, 14)]
    assert split(events, parts) == {"products": 6 + 2, "fill": 2 + 4}
    assert split([], parts) == {}


def test_a_trace_of_a_real_program(tmp_path: Path) -> None:
    def loops(x: jax.Array, trips: jax.Array) -> jax.Array:
        def body(carry: tuple) -> tuple:
            i, x = carry
            with jax.named_scope("fill"):
                return i + 1, jnp.sort(x)[::-1] * jnp.float32(0.5)

        return jax.lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.int32(0), x))[1]

    x = jnp.arange(64, dtype=jnp.float32)
    program = jax.jit(loops).lower(x, jnp.int32(0)).compile()
    with trace(tmp_path):
        for trips in (3, 5):
            program(x, jnp.int32(trips)).block_until_ready()
    known = instructions(program.as_text() or "")
    first, second = cpu_runs(tmp_path, module_name(program.as_text() or ""))
    assert {one.name for one in (*first, *second)} <= known.keys()
    parts = {name: part_of(one) for name, one in known.items()}
    [sort] = [name for name, one in known.items() if one.opcode == "sort"]
    assert parts[sort] == "fill"
    # XLA may run an instruction in several operations, here a copy and a sort.
    short, long = (sum(one.name == sort for one in run) for run in (first, second))
    assert short >= 3
    assert short * 5 == long * 3
    for run in (first, second):
        [loop] = [one for one in run if known[one.name].opcode == "while"]
        # The loop lasts as long as what it runs, on whichever thread that was.
        assert all(loop.start <= one.start < loop.start + loop.length for one in run if one.name == sort)
        assert sum(split(run, parts).values()) == pytest.approx(
            max(one.start + one.length for one in run) - min(one.start for one in run)
        )
    assert cpu_runs(tmp_path, "another") == []


def test_parts_are_of_the_round_in_the_middle() -> None:
    def round_of(seconds: float) -> Decoding:
        return Decoding(seconds, (2, 2), passes=5, blocks=30, heads=8, compilations=0)

    profiled = [Profile(round_of(s), {"products": s / 4, "host": 3 * s / 4}, 200) for s in (9.0, 2.0, 4.0)]
    found = step.figures([round_of(1.0), round_of(3.0), round_of(2.0)], profiled, steps=4)
    assert (found["step_ms"], found["profiled_step_ms"], found["profiled_over_unprofiled"]) == (500, 1000, 2)
    assert found["parts"] == {"products": {"ms": 250, "share": 0.25}, "host": {"ms": 750, "share": 0.75}}
    assert (found["operations_per_step"], found["passes_per_step"], found["blocks_per_step"]) == (50, 1.25, 7.5)


def test_scopes_are_kept_while_the_bench_runs() -> None:
    before = jax.config.jax_compilation_cache_include_metadata_in_key
    with pytest.raises(KeyError), step.scopes_kept():
        assert jax.config.jax_compilation_cache_include_metadata_in_key is True
        raise KeyError
    assert jax.config.jax_compilation_cache_include_metadata_in_key is before


def parsed(*flags: str):
    return step.parser().parse_args(["--random", "tiny", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--measures", "margin"), "both must be given"),
        (("--thresholds", "0.5"), "both must be given"),
        (("--replay", "0.7,0.2", "--thresholds", "0.5"), "--replay"),
    ],
)
def test_settings_that_cannot_be(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step.modes_of(parsed(*flags), shape("tiny"))


def test_full_depth_stands_beside_every_setting() -> None:
    assert step.modes_of(parsed(), shape("tiny")) == {"full_depth": None}
    assert [*step.modes_of(parsed("--replay", "0.7,0.2"), shape("tiny"))] == ["full_depth", "replay"]
    found = step.modes_of(parsed("--measures", "margin", "--thresholds", "0.6,0.3"), shape("tiny"))
    assert [*found] == ["full_depth", "margin 0.3", "margin 0.6"]


def test_a_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    flags = ("--batch-sizes", "1", "--replay", "0.7,0.2", "--num-iters", "1", "--input-len", "5", "--output-len", "20")
    assert main(["step", "--random", "tiny", *flags, "--output-json", str(file)]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert json.loads(file.read_text()) == found
    assert {"date", "cpu_model", "git_commit", "options"} <= found.keys()
    full, early = found["batches"]["1"]["full_depth"], found["batches"]["1"]["replay"]
    assert (full["blocks_per_step"], full["heads_per_step"], full["passes_per_step"]) == (6, 1, 1)
    assert early["blocks_per_step"] < 6
    for mode in (full, early):
        assert tuple(mode["parts"]) == step.PARTS
        assert sum(part["ms"] for part in mode["parts"].values()) == pytest.approx(mode["profiled_step_ms"], rel=1e-4)
        assert sum(part["share"] for part in mode["parts"].values()) == pytest.approx(1, rel=1e-4)
        assert min(part["ms"] for part in mode["parts"].values()) >= 0
        assert mode["compilations_while_timed"] == 0
        if refusal() is None:
            assert all(mode["parts"][name]["ms"] > 0 for name in ("products", "attention", "kv_write"))
    assert any(f"takes {full['profiled_over_unprofiled']:.2f} (full depth)" in line for line in shown)
