"""eejax.model against the reference: every option, every kind of exit head, and the dtypes of mixed precision."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax.core import ExitConfig, ModelConfig, RopeScaling
from eejax.core.errors import ConfigError
from eejax.model.dense import exit_features
from eejax.model.transformer import (
    EarlyExitTransformer,
    bind,
    count_params,
    init_params,
    param_shapes,
    rope_frequencies,
)
from pallas_kernels import rope, rotation
from tests.cases import BASE, SHAPES, random_model, random_params, random_prompt, shape_config
from tests.reference import Reference, Seen, confidence, float_tree, generate

# Logits have a standard deviation of about 3. Float32 sums of a few dozen terms, six blocks deep, stay within 1e-5 of
# that; the tolerance leaves a factor of ten.
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


def dense_logits(config: ModelConfig, params: dict, tokens, dtype=None) -> dict[int, np.ndarray]:
    """eejax's logits `[B, T, V]` at every exit point, from its forward over whole rows."""

    @jax.jit
    def run(params, tokens):
        model = bind(config, params)
        features = exit_features(model, tokens, dtype)
        return {layer: model.logits(layer, x) for layer, x in features.items()}

    found = run(params, jnp.asarray(tokens, jnp.int32))
    return {layer: np.moveaxis(np.asarray(x), 0, -1) for layer, x in found.items()}


def two_rows(config: ModelConfig, length: int = 40) -> list[list[int]]:
    return [random_prompt(config, length, seed) for seed in (1, 2)]


def leaf_names(tree: dict) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_forward_equals_reference(shape):
    """Also what the reference itself rests on: two implementations, written apart, agree on every option."""
    config, params = random_model(shape)
    rows = two_rows(config)
    found = dense_logits(config, params, rows)
    assert set(found) == set(config.exit_points)
    for b, row in enumerate(rows):
        expected = Reference(config, params).full_depth(row)
        for layer in config.exit_points:
            np.testing.assert_allclose(found[layer][b], expected[layer], **TOLERANCE, err_msg=f"exit {layer}")


@pytest.mark.parametrize("shape", ["gqa", "norm_tied", "mlp_tied", "block_own", "everything", "everything_else"])
def test_every_parameter_counts(shape):
    """Changing any single leaf changes some logits, in eejax and in the reference alike."""
    config, params = random_model(shape)
    row = random_prompt(config, 12, 3)
    base = Reference(config, params).full_depth(row)

    leaves, tree = jax.tree.flatten(params)
    changed = {}
    for i, name in enumerate(leaf_names(params)):
        if "probe" in name:  # they have no part in logits
            continue
        # Element by element: q/k-norm takes no notice of a factor common to the whole of `wq`.
        factors = np.random.default_rng(i).uniform(0.5, 1.5, leaves[i].shape).astype(np.float32)
        other = jax.tree.unflatten(tree, [*leaves[:i], leaves[i] * factors, *leaves[i + 1 :]])
        changed[name] = other
        logits = Reference(config, other).full_depth(row)
        assert any(np.abs(logits[e] - base[e]).max() > 1e-3 for e in base), f"{name} has no influence"
    # One batch for eejax: a leading axis over the changed trees.
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *changed.values())

    @jax.jit
    def run(stacked):
        def one(params):
            model = bind(config, params)
            found = exit_features(model, jnp.asarray([row], jnp.int32))
            return {e: model.logits(e, x)[:, 0] for e, x in found.items()}

        return jax.vmap(one)(stacked)

    found = run(stacked)
    assert len(changed) == len(leaves) - sum("probe" in name for name in leaf_names(params))
    for i, (name, other) in enumerate(changed.items()):
        expected = Reference(config, other).full_depth(row)
        for e in expected:
            np.testing.assert_allclose(found[e][i].T, expected[e], **TOLERANCE, err_msg=f"{name}, exit {e}")


@pytest.mark.parametrize("shape", ["gqa", "mlp_own", "everything", "window", "block_tied", "everything_else"])
def test_reference_step_by_step_equals_its_dense_pass(shape):
    """The cache-free stepping adds nothing of its own: at full depth it is the dense causal pass."""
    config, params = random_model(shape)
    tokens = random_prompt(config, 20, 5)
    dense = Reference(config, params).full_depth(tokens)
    stepped = Reference(config, params)
    stepped.full_depth(tokens[:8])
    for position in range(8, 20):
        seen = {}
        logits, layer = stepped.step(tokens[position], lambda e, at, seen=seen: seen.update({e: at.logits}))
        assert layer == config.n_layers
        np.testing.assert_allclose(logits, dense[layer][position], atol=1e-10)
        for e in config.exits.layers:
            np.testing.assert_allclose(seen[e], dense[e][position], atol=1e-10)


def test_reference_freezes_what_left():
    """Behind an early token, every higher block saw that token's state at its exit, and this changes later logits."""
    config, params = random_model("deep")
    tokens = random_prompt(config, 9, 6)
    left, stayed = Reference(config, params), Reference(config, params)
    for sequence, leave in ((left, lambda e, _: e == 2), (stayed, lambda e, _: False)):
        sequence.full_depth(tokens)
        sequence.step(5, leave)
    for index in range(config.n_layers):
        same = np.allclose(left.entering[index][-1], stayed.entering[index][-1])
        assert same == (index <= 2)
    for index in range(3, config.n_layers):
        np.testing.assert_array_equal(left.entering[index][-1], left.entering[2][-1])
    assert [len(x) for x in left.entering] == [10] * config.n_layers
    a, b = (s.step(7, lambda e, _: False)[0] for s in (left, stayed))
    assert np.abs(a - b).max() > 1e-2


def test_reference_freezes_what_came_to_later_exits_too():
    """An exit's own block sees the state that a token left with below, and that changes who asks it next."""
    config, params = random_model("block_tied")  # exits after 1 and 3 of 4
    tokens = random_prompt(config, 9, 6)
    left, stayed = Reference(config, params), Reference(config, params)
    for sequence, leave in ((left, lambda e, _: e == 1), (stayed, lambda e, _: False)):
        sequence.full_depth(tokens)
        sequence.step(5, leave)
    assert [len(x) for x in left.at_exit.values()] == [10, 10]
    np.testing.assert_array_equal(left.at_exit[1], stayed.at_exit[1])
    np.testing.assert_array_equal(left.at_exit[3][-1], left.at_exit[1][-1])
    assert not np.allclose(left.at_exit[3][-1], stayed.at_exit[3][-1])
    # Only what exit 3's block keeps of the token is changed, so only its logits are.
    forged = Reference(config, params)
    forged.full_depth(tokens)
    forged.step(5, lambda e, _: False)
    forged.at_exit[3][-1] = left.at_exit[3][-1]
    seen = {}
    for name, sequence in (("stayed", stayed), ("forged", forged)):
        seen[name] = {}
        seen[name][4], _ = sequence.step(7, lambda e, found, at=seen[name]: at.update({e: found.logits}))
    np.testing.assert_array_equal(seen["forged"][1], seen["stayed"][1])
    np.testing.assert_array_equal(seen["forged"][4], seen["stayed"][4])
    assert np.abs(seen["forged"][3] - seen["stayed"][3]).max() > 1e-2


@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_count_the_token_itself(window):
    """In a single block, a token's logits depend on the last `window` tokens and on no other."""
    config, params = random_model("gqa", n_layers=1, exits=ExitConfig(), sliding_window=window)
    tokens = random_prompt(config, 9, 4)
    rows = [tokens] + [[*tokens[:i], (tokens[i] + 1) % config.vocab_size, *tokens[i + 1 :]] for i in range(9)]
    dense = dense_logits(config, params, rows)[1]
    reference = [Reference(config, params).full_depth(row)[1] for row in rows]
    for logits in (dense, reference):
        for i in range(9):
            differs = [np.abs(logits[i + 1][p] - logits[0][p]).max() > 1e-3 for p in range(9)]
            assert differs == [i <= p < i + window for p in range(9)]


def test_reference_picks_the_lowest_of_equal_logits():
    config, params = random_model("gqa")
    params = {**params, "output": np.repeat(params["output"][::2], 2, axis=0)[: config.vocab_size]}
    result = generate(config, params, [3, 1, 4], max_tokens=6)
    assert result.margins.logit == 0
    assert all(token % 2 == 0 for token in result.token_ids)


def test_confidence_measures():
    logits = np.log([0.5, 0.2, 0.3]) + 7.0
    seen = Seen(logits, before=np.array([3.0, 4.0]), behind=np.array([8.0, -6.0]) * 5, probe=np.log(3.0))
    assert confidence("softmax", seen) == pytest.approx(0.5)
    assert confidence("margin", seen) == pytest.approx(0.2)
    assert confidence("similarity", seen) == pytest.approx(0.0)
    assert confidence("similarity", dataclasses.replace(seen, behind=np.array([4.0, 3.0]))) == pytest.approx(24 / 25)
    assert confidence("classifier", seen) == pytest.approx(0.75)


# --------------------------------------------------------------------------------------------------------------- rotary


def test_rope_frequencies_plain():
    np.testing.assert_allclose(rope_frequencies(4, 10000.0, None), [1.0, 0.01], rtol=1e-6)


def test_rope_frequencies_llama3_closed_form():
    """Llama 3.1's own numbers: three bands, continuous at both borders."""
    theta, dim = 500000.0, 128
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    found = np.asarray(rope_frequencies(dim, theta, scaling), np.float64)
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    between = ~short & ~long
    assert short.sum() == 29 and long.sum() == 29 and between.sum() == 6
    np.testing.assert_allclose(found[short], plain[short], rtol=2e-6)
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=2e-6)
    smooth = (8192 / wavelength[between] - 1) / (4 - 1)
    np.testing.assert_allclose(found[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between], rtol=1e-5)
    assert np.all(np.diff(found) < 0)


def test_rope_turns_pairs_by_position():
    """Position 0 is untouched; products of a query and a key depend on their distance only."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 8)).astype(np.float32)
    freq = rope_frequencies(8, 10000.0, None)

    def at(x, position):
        return np.asarray(rope(jnp.asarray(x)[..., None], rotation(jnp.asarray([position]), freq)))[..., 0]

    np.testing.assert_array_equal(at(q, 0), q)
    np.testing.assert_allclose(np.linalg.norm(at(q, 77)), np.linalg.norm(q), rtol=1e-6)
    near, far = at(q, 9) @ at(k, 4).T, at(q, 105) @ at(k, 100).T
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert abs(float((at(q, 9) @ at(k, 5).T - near)[0, 0])) > 1e-3
    # Element i is paired with element i + 4, not with its neighbour.
    one = np.eye(8, dtype=np.float32)[:1]
    np.testing.assert_allclose(at(one, 1)[0, [0, 4]], [math.cos(1.0), math.sin(1.0)], rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- dtypes


def rounded(params: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)


@pytest.mark.parametrize("shape", ["gqa", "everything"])
def test_bf16_weights_with_float32_residual(shape):
    """Logits are float32, and closer to those of exact arithmetic than with a bfloat16 residual stream."""
    config, params = random_model(shape)
    params = rounded(params)
    row = random_prompt(config, 24, 8)
    exact = Reference(config, params).full_depth(row)
    errors = {}
    for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        found = dense_logits(config, params, [row], dtype)
        for layer, logits in found.items():
            assert logits.dtype == np.float32
            # bfloat16 keeps 8 bits: products of rounded activations are off by about 2**-9 each, logits by 0.1 of 3.
            assert np.abs(logits[0] - exact[layer]).max() < 1.0
        depth = config.n_layers
        errors[jnp.dtype(dtype).name] = float(np.sqrt(np.mean((found[depth][0] - exact[depth]) ** 2)))
    assert errors["float32"] < 0.8 * errors["bfloat16"], errors


def test_residual_dtype_follows_embedding_or_argument():
    config, params = random_model("gqa")
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)

    def dtypes(params, dtype):
        found = jax.eval_shape(lambda p: exit_features(bind(config, p), tokens, dtype), params)
        return {x.dtype for x in found.values()}

    assert dtypes(params, None) == {jnp.dtype("float32")}
    assert dtypes(rounded(params), None) == {jnp.dtype("bfloat16")}
    assert dtypes(rounded(params), jnp.dtype("float32")) == {jnp.dtype("float32")}


@pytest.mark.parametrize("shape", ["mlp_own", "everything_else"])
def test_remat_changes_nothing(shape):
    config, params = random_model(shape)
    tokens = jnp.asarray(two_rows(config, 8), jnp.int32)
    a, b = (
        jax.jit(lambda params, remat=remat: exit_features(bind(config, params), tokens, remat=remat))(params)
        for remat in (False, True)
    )
    for layer in a:
        np.testing.assert_allclose(a[layer], b[layer], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("shape", ["gqa", "everything"])
def test_init_params_match_shapes_and_are_seeded(shape):
    config = shape_config(shape)
    params, shapes = init_params(config, seed=3), param_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    again, other = init_params(config, seed=3), init_params(config, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))
    assert not np.array_equal(params["embedding"], other["embedding"])
    assert count_params(params) == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count_params({"embedding": params["embedding"]}) == config.vocab_size * config.hidden_size


def test_optional_parameters_exist_only_where_configured():
    def names(**overrides) -> set[str]:
        return set(leaf_names(param_shapes(ModelConfig(**{**BASE, **overrides}))))

    def in_first_block(found: set[str]) -> set[str]:
        return {name.removeprefix("['blocks'][0]") for name in found if name.startswith("['blocks'][0]")}

    plain = names()
    assert "['output']" in plain and not any("exits" in name for name in plain)
    assert plain - names(tie_embeddings=True) == {"['output']"}
    assert in_first_block(names(attention_bias=True) - plain) == {"['bq']", "['bkv']"}
    assert in_first_block(names(qk_norm=True) - plain) == {"['q_norm']", "['k_norm']"}
    norm = names(exits=ExitConfig((1, 3), "norm")) - plain
    assert norm == {"['exits']['after_1']['norm']", "['exits']['after_3']['norm']"}
    own = names(exits=ExitConfig((1, 3), "norm", tie_output=False)) - plain - norm
    assert own == {"['exits']['after_1']['output']", "['exits']['after_3']['output']"}
    mlp = names(exits=ExitConfig((2,), "mlp")) - plain
    assert mlp == {f"['exits']['after_2']{leaf}" for leaf in ("['norm']", "['mlp']['gate_up']", "['mlp']['down']")}
    assert mlp - names(exits=ExitConfig((2,), "mlp", norm=False)) == {"['exits']['after_2']['norm']"}
    bare = names(exits=ExitConfig((2,), "norm", norm=False, tie_output=False)) - plain
    assert bare == {"['exits']['after_2']['output']"}
    block = names(exits=ExitConfig((2,), "block", norm=False), qk_norm=True) - names(qk_norm=True)
    assert {name.removeprefix("['exits']['after_2']['block']") for name in block} == in_first_block(names(qk_norm=True))
    probes = names(exits=ExitConfig((1, 3), probes=True)) - plain
    assert probes == {f"['exits']['after_{e}']['probe_{leaf}']" for e in (1, 3) for leaf in ("weight", "bias")}
    assert names(exits=ExitConfig((), "block", probes=True)) == plain


def test_bind_keeps_the_configuration():
    config, params = random_model("gqa")
    model = bind(config, params)
    assert isinstance(model, EarlyExitTransformer)
    assert model.config == config


def test_probes_are_linear_in_the_features():
    config, params = random_model("everything_else")
    features = np.random.default_rng(3).standard_normal((config.hidden_size, 2, 3)).astype(np.float32)
    for layer in config.exits.layers:
        own = params["exits"][f"after_{layer}"]
        expected = np.einsum("d,dbt->bt", own["probe_weight"], features) + own["probe_bias"]
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.2)):
            found = bind(config, params).probe_logit(layer, jnp.asarray(features, dtype))
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, atol=tolerance)


def test_a_block_exit_needs_somebody_who_knows_attention():
    config, params = random_model("block_tied")
    x = jnp.zeros((config.hidden_size, 1))
    with pytest.raises(ValueError, match="block exit after block 3 need run_block"):
        bind(config, params).features(3, x, x)
    assert bind(config, params).features(config.n_layers, x, x).shape == x.shape


# ---------------------------------------------------------------------------------------------------------- exit layers


def test_shared_heads_can_stand_after_any_block():
    config, params = random_model("deep")
    moved = config.with_exit_layers([5, 1, 3, 1])
    assert moved.exits.layers == (1, 3, 5)
    assert moved.exit_points == (1, 3, 5, 6)
    assert moved.segments == (range(0, 1), range(1, 3), range(3, 5), range(5, 6))
    assert config.exits.layers == (2, 4, 5), "the original is untouched"
    row = random_prompt(config, 10, 9)
    found = dense_logits(moved, params, [row])
    expected = Reference(moved, params).full_depth(row)
    assert set(found) == {1, 3, 5, 6}
    for layer in found:
        np.testing.assert_allclose(found[layer][0], expected[layer], **TOLERANCE)
    np.testing.assert_allclose(found[6], dense_logits(config, params, [row])[6], **TOLERANCE)


def test_no_exits_is_the_plain_model():
    config, params = random_model("deep")
    plain = config.with_exit_layers(())
    assert plain.exit_points == (6,) and plain.segments == (range(0, 6),)
    row = random_prompt(config, 10, 9)
    np.testing.assert_allclose(
        dense_logits(plain, params, [row])[6], dense_logits(config, params, [row])[6], **TOLERANCE
    )


@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_trained_heads_allow_a_subset_only(head):
    config = shape_config(exits=ExitConfig((1, 3), head))
    assert config.with_exit_layers((3,)).exits == ExitConfig((3,), head)
    with pytest.raises(ConfigError, match=r"\[2\].*\(1, 3\)"):
        config.with_exit_layers((1, 2))


def test_a_subset_of_block_exits_keeps_its_blocks():
    """Their place in the cache follows from the exits that are left."""
    config, params = random_model("block_own")  # exits after 1, 2 and 3 of 4
    model = bind(config, params)
    assert [model.exit_blocks(layer) for layer in range(5)] == [(), (4,), (5,), (6,), ()]
    assert len(model.cached_blocks) == config.n_cached_blocks == 7
    fewer = config.with_exit_layers((2, 3))
    model = bind(fewer, {**params, "exits": {name: params["exits"][name] for name in fewer.exit_names}})
    assert [model.exit_blocks(layer) for layer in range(5)] == [(), (), (4,), (5,), ()]
    for place, name in ((4, "after_2"), (5, "after_3")):
        np.testing.assert_array_equal(model.cached_blocks[place].wq[...], params["exits"][name]["block"]["wq"])


# ----------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, bad, rf"ModelConfig\.{name} .*{bad}") for name in BASE if name != "exits" for bad in (0, -3)),
        ("vocab_size", True, r"vocab_size.*True"),
        ("hidden_size", 32.0, r"hidden_size.*32\.0"),
        ("n_layers", "4", r"n_layers.*'4'"),
        ("n_kv_heads", 3, r"n_heads \(4\).*n_kv_heads \(3\)"),
        ("n_kv_heads", 8, r"n_heads \(4\).*n_kv_heads \(8\)"),
        ("head_dim", 7, r"head_dim.*even.*7"),
        ("rope_theta", 0.0, r"rope_theta.*0\.0"),
        ("rope_theta", -1.0, r"rope_theta.*-1\.0"),
        ("rope_theta", math.nan, r"rope_theta.*nan"),
        ("rope_theta", math.inf, r"rope_theta.*inf"),
        ("norm_eps", 0.0, r"norm_eps.*0\.0"),
        ("norm_eps", 1.0, r"norm_eps.*1\.0"),
        ("norm_eps", math.nan, r"norm_eps.*nan"),
        ("exits", ExitConfig((2, 4)), r"exit layers \[4\].*4 blocks.*1 to 3"),
        ("exits", ExitConfig((9,)), r"exit layers \[9\]"),
    ],
)
def test_model_config_refuses(name, value, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**BASE, name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": (0, 2)}, "layers.*0"),
        ({"layers": (-1,)}, "layers.*-1"),
        ({"layers": (1.5,)}, r"layers.*1\.5"),
        ({"layers": (True,)}, "layers.*True"),
        ({"layers": (3, 1)}, r"ascending.*\(3, 1\)"),
        ({"layers": (2, 2)}, r"ascending.*\(2, 2\)"),
        ({"layers": (1,), "head": "linear"}, "shared, norm, mlp.*'linear'"),
        ({"layers": (1,), "tie_output": False}, "shared.*tie_output"),
    ],
)
def test_exit_config_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        ExitConfig(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, r"factor.*0\.5"),
        ({"factor": math.nan}, "factor.*nan"),
        ({"low_freq_factor": 0.0}, r"low_freq_factor.*0\.0"),
        ({"low_freq_factor": 4.0}, r"4\.0 and 4\.0"),
        ({"high_freq_factor": 0.5}, r"1\.0 and 0\.5"),
        ({"original_max_position": 0}, "original_max_position.*0"),
    ],
)
def test_rope_scaling_refuses(change, message):
    good = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 64}
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**{**good, **change})


@pytest.mark.parametrize("shape", SHAPES)
def test_model_config_survives_a_dictionary(shape):
    import json

    config = shape_config(shape)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 8}, "ModelConfig has no option n_experts; allowed:.*vocab_size"),
        ({"exits": {"layers": [1], "depth": 2}}, "ExitConfig has no option depth; allowed:.*layers"),
        (
            {"rope_scaling": {"factor": 8.0}},
            "RopeScaling needs low_freq_factor, high_freq_factor, original_max_position",
        ),
    ],
)
def test_model_config_from_dict_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**shape_config().to_dict(), **change})


def test_model_config_from_dict_names_what_is_missing():
    values = shape_config().to_dict()
    del values["n_heads"], values["vocab_size"]
    with pytest.raises(ConfigError, match="ModelConfig needs vocab_size, n_heads"):
        ModelConfig.from_dict(values)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape_config().n_layers = 3


def test_random_params_are_those_of_the_model():
    """The tests' own parameters have the tree of the model, so the cases above exercise all of it."""
    for shape in SHAPES:
        config = shape_config(shape)
        found, wanted = random_params(config), param_shapes(config)
        assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, wanted)
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(float_tree(rounded(found))))
