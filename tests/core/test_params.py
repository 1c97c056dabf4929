"""What users and checkpoints may ask for: every bad value is refused by name."""

import dataclasses
import functools
import json
import math

import pytest

from eejax.core import (
    CacheConfig,
    DecayingThreshold,
    EarlyExitParams,
    EngineConfig,
    EngineOptions,
    ExitConfig,
    ModelConfig,
    RopeScaling,
    SamplingParams,
    SchedulerConfig,
)
from eejax.core.checks import from_mapping, help_of
from eejax.core.errors import ConfigError, EejaxError, InvalidRequestError

NAN, INF = math.nan, math.inf
INTEGERS = [0, -1, 1.5, True, "3", None]


def model(**changes):
    shape = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "n_layers": 6,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 4,
        "max_position": 64,
        "exits": ExitConfig((2, 4)),
    }
    return ModelConfig(**{**shape, **changes})


def engine(**changes):
    return EngineConfig(**{"model": model(), "cache": CacheConfig(8, 16), "max_model_len": 64, **changes})


def refused(make, name, value, also=""):
    """`make(name=value)` raises a `ConfigError` that names option and value, and says `also`."""
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    message = str(caught.value)
    assert name in message
    assert str(value) in message
    assert also in message
    assert isinstance(caught.value, ValueError)


def cases(**values):
    return pytest.mark.parametrize(
        ("name", "value"), [pytest.param(n, v, id=f"{n}={v!r}") for n, vs in values.items() for v in vs]
    )


# ------------------------------------------------------------------------------------------------------------ sampling


@cases(
    n=INTEGERS,
    temperature=[-0.1, 1001, NAN, INF, "1", None, True],
    top_p=[0, -0.1, 1.01, NAN, "1", None],
    top_k=[-2, 1.5, True, "3", None],
    min_p=[-0.1, 1.1, NAN, "0"],
    max_tokens=[0, -1, 1.5, True, "3"],
    stop=["", ["a", ""], [1], 7, None],
    stop_token_ids=[[-1], ["1"], [1.0], 5, None],
    ignore_eos=[1, None, "no"],
    seed=[-1, 2**32, 1.5, True, "0"],
    logprobs=[-1, 21, 1.5, True, "0"],
    early_exit=[0.9, {"threshold": 0.9}, True],
)
def test_sampling_values_that_are_not_allowed(name, value):
    refused(SamplingParams, name, value, also="SamplingParams.")


def test_sampling_values_at_the_border_and_their_normal_forms():
    params = SamplingParams(
        n=1,
        temperature=0,
        top_p=1,
        top_k=-1,
        min_p=1,
        max_tokens=1,
        stop="x",
        stop_token_ids=[0, 7],
        seed=0,
        logprobs=0,
    )
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ("x",), (0, 7))
    params = SamplingParams(
        temperature=1000.0, top_p=1e-9, min_p=0, max_tokens=None, stop=["a", "b"], seed=2**32 - 1, logprobs=20
    )
    assert (params.stop, params.early_exit) == (("a", "b"), None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


@pytest.mark.parametrize("options", [SamplingParams, EarlyExitParams, EngineOptions])
def test_unknown_options_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=rf"{options.__name__} has no option temprature; allowed: .*\w+, \w+"):
        options(temprature=1)


@pytest.mark.parametrize("options", [SamplingParams, EngineOptions])
def test_help_describes_every_option(options):
    named = {field.name for field in dataclasses.fields(options)} - {"early_exit"}
    assert set(help_of(options)) == named
    assert all(f"    {name} (" in options.__doc__ for name in named)


# ---------------------------------------------------------------------------------------------------------- early exit


@cases(
    threshold=[-0.1, NAN, "0.5", None, True, [0.5, NAN], [0.5, "1"], (0.5, -1)],
    measure=["entropy", "", None, 1],
    exit_layers=[[0], [-1], [1.5], [True], ["2"], 2],
    min_layers=[-1, 1.5, True, None, "1"],
)
def test_early_exit_values_that_are_not_allowed(name, value):
    shown = value[0] if name == "exit_layers" and isinstance(value, list) else value
    with pytest.raises(ConfigError) as caught:
        EarlyExitParams(**{name: value})
    assert f"EarlyExitParams.{name}" in str(caught.value)
    assert str(shown) in str(caught.value)


@cases(value=[-0.1, NAN, None, [NAN]], tau=[-1, NAN, INF, "4", None])
def test_decaying_thresholds_that_are_not_allowed(name, value):
    refused(lambda **kw: DecayingThreshold(**{"value": 0.5, **kw}), name, value, also="DecayingThreshold.")


def test_thresholds_for_gives_one_threshold_per_exit():
    def thresholds(**kw):
        return EarlyExitParams(**kw).thresholds_for(model())

    assert thresholds() == (0.9, 0.9)
    assert thresholds(threshold=0) == (0.0, 0.0)
    assert thresholds(threshold=1) == (1.0, 1.0)
    assert thresholds(threshold=[0.5, 0.7]) == (0.5, 0.7)
    assert thresholds(threshold=DecayingThreshold(0.8)) == (0.8, 0.8)
    assert thresholds(threshold=DecayingThreshold([0.8, 0.6], tau=0)) == (0.8, 0.6)
    assert EarlyExitParams().thresholds_for(model(exits=ExitConfig())) == ()


def test_thresholds_are_infinite_where_a_request_may_not_leave():
    def thresholds(**kw):
        return EarlyExitParams(**kw).thresholds_for(model())

    assert thresholds(threshold=1.0001) == (INF, INF)
    assert thresholds(threshold=INF) == (INF, INF)
    assert thresholds(threshold=[0.5, 2]) == (0.5, INF)
    assert thresholds(threshold=DecayingThreshold(1.5)) == (INF, INF)
    assert thresholds(exit_layers=[4]) == (INF, 0.9)
    assert thresholds(exit_layers=[4, 2, 4], threshold=[0.5, 0.7]) == (0.5, 0.7)  # in ascending order, once each
    assert thresholds(exit_layers=[]) == (INF, INF)
    assert thresholds(exit_layers=[4], threshold=[0.5]) == (INF, 0.5)
    assert thresholds(min_layers=2) == (0.9, 0.9)
    assert thresholds(min_layers=3) == (INF, 0.9)
    assert thresholds(min_layers=6) == (INF, INF)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layers": [3]}, r"exit_layers \[3\] are not exits of this model; it has \[2, 4\]"),
        ({"exit_layers": [2, 6]}, r"\[6\]"),
        ({"min_layers": 7}, "min_layers 7 is above the model's 6 blocks"),
        ({"threshold": [0.5]}, r"1 thresholds \[0.5\] for 2 exits \[2, 4\]"),
        ({"threshold": [0.5, 0.5, 0.5]}, "3 thresholds"),
        ({"threshold": []}, r"0 thresholds \[\] for 2 exits"),
        ({"threshold": [0.5, 0.5], "exit_layers": [2]}, r"2 thresholds \[0.5, 0.5\] for 1 exits \[2\]"),
        ({"threshold": DecayingThreshold([0.5])}, "1 thresholds"),
    ],
)
def test_thresholds_that_do_not_fit_the_model(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        EarlyExitParams(**options).thresholds_for(model())


def test_a_classifier_needs_probes_and_other_measures_none():
    with pytest.raises(InvalidRequestError, match=r"'classifier' needs a probe at each of the exits .2, 4.*tune-exits"):
        EarlyExitParams(0.5, "classifier").thresholds_for(model())
    probed = model(exits=ExitConfig((2, 4), probes=True))
    assert EarlyExitParams(0.5, "classifier").thresholds_for(probed) == (0.5, 0.5)
    for measure in ("softmax", "margin", "similarity", "random"):
        assert EarlyExitParams(0.5, measure).thresholds_for(model()) == (0.5, 0.5)


# --------------------------------------------------------------------------------------------------------------- model


@cases(
    vocab_size=INTEGERS,
    hidden_size=INTEGERS,
    intermediate_size=INTEGERS,
    n_layers=INTEGERS,
    n_heads=[*INTEGERS, 3],  # two KV heads
    n_kv_heads=[*INTEGERS, 3],
    head_dim=[*INTEGERS, 3],
    max_position=INTEGERS,
    rope_theta=[0, -1.0, NAN, INF],
    norm_eps=[0, 1, -1e-5, NAN],
    sliding_window=[value for value in INTEGERS if value is not None],
)
def test_model_values_that_are_not_allowed(name, value):
    refused(model, name, value, also="ModelConfig.")


@cases(sliding_from=[-1, 6, 1.5, True, None, "1"])
def test_blocks_that_a_window_cannot_begin_with(name, value):
    refused(functools.partial(model, sliding_window=8), name, value, also="ModelConfig.")


def test_a_window_begins_with_some_block():
    assert [model().window_of(block) for block in range(6)] == [None] * 6
    assert [model(sliding_window=8).window_of(block) for block in range(6)] == [8] * 6
    above = model(sliding_window=8, sliding_from=4, exits=ExitConfig((2, 4), "block"))
    assert [above.window_of(block) for block in range(8)] == [None] * 4 + [8] * 2 + [None] * 2  # two are exits' own
    with pytest.raises(ConfigError, match=r"sliding_from must lie in 0\.\.5, and be 0 without a sliding_window, got 2"):
        model(sliding_from=2)


@pytest.mark.parametrize("layers", [[6], [2, 7]])
def test_exits_behind_the_last_block_do_not_exist(layers):
    with pytest.raises(ConfigError, match=rf"exit layers \[{layers[-1]}\] .* blocks 1 to 5"):
        model(exits=ExitConfig(tuple(layers)))


@cases(
    layers=[(0,), (-1,), (1.5,), (True,), ("2",), (4, 2), (2, 2)],
    head=["mixed", None, ""],
    norm=[0, None, "yes"],
    tie_output=[1, None, "no"],
    probes=[0, None, 0.5],
)
def test_exit_values_that_are_not_allowed(name, value):
    shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    with pytest.raises(ConfigError) as caught:
        ExitConfig(**{name: value})
    assert f"ExitConfig.{name}" in str(caught.value)
    assert str(shown) in str(caught.value)


def test_a_shared_head_has_no_output_matrix_of_its_own():
    with pytest.raises(ConfigError, match="tie_output"):
        ExitConfig((2,), head="shared", tie_output=False)
    assert not ExitConfig((2,), head="mlp", tie_output=False).tie_output


def test_a_shared_head_reads_the_final_norm():
    with pytest.raises(ConfigError, match="norm must be true"):
        ExitConfig((2,), head="shared", norm=False)
    for head in ("norm", "mlp", "block"):
        assert not ExitConfig((2,), head, norm=False).norm


def test_blocks_of_exits_are_cached_behind_the_network_s():
    assert model().n_cached_blocks == model(exits=ExitConfig((2, 4), "mlp")).n_cached_blocks == 6
    assert model(exits=ExitConfig((2, 4), "block")).n_cached_blocks == 8
    assert model(exits=ExitConfig((), "block")).n_cached_blocks == 6
    assert model(exits=ExitConfig((2, 4), "block")).exit_names == ("after_2", "after_4")


@cases(
    factor=[0.5, NAN], original_max_position=INTEGERS, low_freq_factor=[0, -1.0, 4.0, NAN], high_freq_factor=[1.0, NAN]
)
def test_rope_scaling_that_is_not_allowed(name, value):
    good = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
    RopeScaling(**good)
    refused(lambda **kw: RopeScaling(**{**good, **kw}), name, value, also="RopeScaling")


def test_exit_points_and_segments():
    assert model().exit_points == (2, 4, 6)
    assert model().segments == (range(0, 2), range(2, 4), range(4, 6))
    assert model(exits=ExitConfig()).segments == (range(0, 6),)


def test_other_exits_only_where_the_head_is_shared():
    assert model().with_exit_layers([5, 1, 5]).exits.layers == (1, 5)
    assert model().with_exit_layers([]).exits.layers == ()
    with pytest.raises(ConfigError, match=r"\[6\]"):
        model().with_exit_layers([6])
    own = model(exits=ExitConfig((2, 4), head="norm"))
    assert own.with_exit_layers((4,)).exits == ExitConfig((4,), head="norm")
    with pytest.raises(ConfigError, match=r"no 'norm' exit head after blocks \[3\]; .*\(2, 4\)"):
        own.with_exit_layers((3, 4))
    probed = model(exits=ExitConfig((2, 4), probes=True))
    assert probed.with_exit_layers((2,)).exits == ExitConfig((2,), probes=True)
    assert probed.with_exit_layers((2, 5)).exits == ExitConfig((2, 5))  # a shared head reads anywhere, a probe does not


def test_a_model_survives_json():
    rope = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32)
    for config in (
        model(),
        model(rope_scaling=rope, exits=ExitConfig((1, 5), "mlp", False), qk_norm=True),
        model(
            sliding_window=8,
            sliding_from=2,
            exits=ExitConfig((1, 5), "block", tie_output=False, norm=False, probes=True),
        ),
    ):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 6}, r"ModelConfig has no option n_layer; allowed: .*n_layers"),
        ({"exits": {"layer": [2]}}, "ExitConfig has no option layer"),
        (
            {"rope_scaling": {"factor": 8.0}},
            "RopeScaling needs low_freq_factor, high_freq_factor, original_max_position",
        ),
        ({"hidden_size": None}, "ModelConfig.hidden_size must be an integer of at least 1, got None"),
    ],
)
def test_a_model_from_a_mapping_names_what_is_wrong(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**model().to_dict(), **change})


def test_a_mapping_must_name_what_has_no_default():
    with pytest.raises(ConfigError, match="CacheConfig needs num_pages"):
        from_mapping(CacheConfig, {"page_size": 4})
    assert from_mapping(CacheConfig, {"num_pages": 4}) == CacheConfig(4, 64)


# -------------------------------------------------------------------------------------------- cache, scheduler, engine


@cases(num_pages=INTEGERS, page_size=INTEGERS)
def test_cache_values_that_are_not_allowed(name, value):
    refused(lambda **kw: CacheConfig(**{"num_pages": 1, **kw}), name, value, also="CacheConfig.")


@cases(max_num_seqs=INTEGERS, max_chunk_steps=INTEGERS, max_prefill_tokens=INTEGERS)
def test_scheduler_values_that_are_not_allowed(name, value):
    refused(SchedulerConfig, name, value, also="SchedulerConfig.")


@cases(max_model_len=[*INTEGERS, 65], prefill_chunk=[*INTEGERS, 8, 24, 1000], seed=[-1, 2**32, 1.5, True, None])
def test_engine_values_that_are_not_allowed(name, value):
    refused(engine, name, value)


def test_a_page_table_is_as_wide_as_the_longest_sequence():
    assert [engine(max_model_len=n).pages_per_seq for n in (1, 16, 17, 64)] == [1, 1, 2, 4]
    assert engine(max_model_len=64, prefill_chunk=16, seed=2**32 - 1).prefill_chunk == 16


def test_errors_are_both_ours_and_value_errors():
    for error in (ConfigError, InvalidRequestError):
        assert issubclass(error, EejaxError)
        assert issubclass(error, ValueError)
