"""Hugging Face folders: configurations, safetensors, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eejax.core import ModelConfig, RopeScaling
from eejax.core.errors import CheckpointError, ConfigError
from eejax.model import huggingface
from eejax.model.huggingface import tensors
from eejax.model.huggingface.config import family_of, to_huggingface
from eejax.model.huggingface.tensors import open_folder, write_folder
from eejax.model.param_tree import LazyArray, leaves
from eejax.model.weights import load_checkpoint, load_config
from tests.hf_folders import make_folder, plain_config, shard

SHAPES = ("gqa", "mha", "bias", "qk_norm", "llama3_rope", "tied_embeddings", "odd_sizes")
WINDOWS = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"sliding_window": 16, "sliding_from": 2, "attention_bias": True},
    "qwen3": {"sliding_window": 16, "sliding_from": 0, "qk_norm": True},
}


def same(a: dict, b: dict) -> None:
    left, right = dict(leaves(a)), dict(leaves(b))
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[name]), err_msg=name)
        assert leaf.dtype == right[name].dtype, name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_is_read_into_the_parameters_it_was_made_of(tmp_path: Path, shape: str) -> None:
    config, params = make_folder(tmp_path, plain_config(shape))
    found_config, found = load_checkpoint(tmp_path)
    assert found_config == config == load_config(tmp_path)
    same(found, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_stored_type_is_read_exactly(tmp_path: Path, dtype: str) -> None:
    _, params = make_folder(tmp_path, dtype=dtype)
    same(huggingface.load_model(tmp_path, jnp.dtype(dtype))[1], params)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    same(huggingface.load_model(tmp_path)[1], wide)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_tensors_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """With the last piece shorter than the others, or rows longer than a piece."""
    _, params = make_folder(tmp_path, dtype=dtype)
    for size in (50, 1_000):
        monkeypatch.setattr(tensors, "PIECE_BYTES", size)
        same(huggingface.load_model(tmp_path, jnp.dtype(dtype))[1], params)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere everything is copied to the device")
def test_large_tensors_are_not_copied_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr(tensors, "PIECE_BYTES", 100)
    read = open_folder(tmp_path)["model.norm.weight"].read()
    assert jax.device_put(read).unsafe_buffer_pointer() == read.ctypes.data


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    _, params = make_folder(tmp_path)
    shard(tmp_path, 3)
    same(load_checkpoint(tmp_path)[1], params)


def test_linked_shards_are_read_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    _, params = make_folder(tmp_path / "folder")
    where = shard(tmp_path / "folder", 2)
    for name in set(where.values()):
        (tmp_path / "folder" / name).rename(tmp_path / name)
        (tmp_path / "folder" / name).symlink_to(tmp_path / name)
    same(load_checkpoint(tmp_path / "folder")[1], params)


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_configurations_come_back(tmp_path: Path, family: str) -> None:
    extra = {"llama": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64), "rope_theta": 5e5}, **WINDOWS}[family]
    config = plain_config(head_dim=12, norm_eps=1e-3, tie_embeddings=True, **extra)
    assert family_of(config) == family
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(config)))
    assert huggingface.read_config(tmp_path) == config


def read_with(folder: Path, changes: dict, config: ModelConfig | None = None) -> ModelConfig:
    values = {**to_huggingface(plain_config() if config is None else config), **changes}
    values = {name: value for name, value in values.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return huggingface.read_config(folder)


QWEN2 = plain_config("bias")
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (None, {"num_key_value_heads": "absent"}, {"n_kv_heads": 4}),  # Llama 1 and 2 do without
        (None, {"head_dim": "absent"}, {"head_dim": 8}),
        (None, {"head_dim": None}, {"head_dim": 8}),
        (None, {"rope_theta": "absent"}, {"rope_theta": 10000.0}),
        (None, {"rope_theta": "absent", "rope_parameters": {"rope_theta": 7e5}}, {"rope_theta": 7e5}),
        (None, {"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
        (
            None,
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 2.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0}, "max_position_embeddings": 96},
            {"rope_scaling": RopeScaling(2.0, 1.0, 4.0, 96), "rope_theta": 5e5},
        ),
        (None, {"sliding_window": 8}, {"sliding_window": None}),  # Llama has none, whatever its file says
        (QWEN2, {"use_sliding_window": False, "sliding_window": 8}, {"sliding_window": None}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 9}, {"sliding_window": None}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         {"sliding_window": 8, "sliding_from": 1}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL] * 3 + [SLIDING]},
         {"sliding_window": 8, "sliding_from": 3}),
        (plain_config(sliding_window=8), {"sliding_window": None}, {"sliding_window": None}),
        (plain_config(sliding_window=8), {"sliding_window": "absent"}, {"sliding_window": 4096}),
        (None, {"sliding_window": "absent"}, {"sliding_window": None}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": "absent", "max_window_layers": 1},
         {"sliding_window": 4096, "sliding_from": 1}),
    ],
)  # fmt: skip
def test_what_configurations_leave_out_or_say_otherwise(
    tmp_path: Path, config: ModelConfig | None, changes: dict, expected: dict
) -> None:
    found = read_with(tmp_path, changes, config)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (
            None,
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "gpt2.*not supported.*llama, mistral, qwen2",
        ),
        (None, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (None, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported.*default, llama3"),
        (None, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        (None, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        (None, {"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_parameters"),
        (None, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        (None, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (None, {"attention_bias": True}, "attention_bias True"),
        (None, {"mlp_bias": True}, "mlp_bias True"),
        (None, {"hidden_size": "absent"}, "hidden_size is missing"),
        (None, {"num_hidden_layers": 0}, "n_layers must be an integer of at least 1"),
        (None, {"vocab_size": "many"}, "vocab_size"),
        (None, {"head_dim": None, "hidden_size": 30}, "no multiple"),
        (QWEN2, {"num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
        (plain_config("qk_norm"), {"head_dim": "absent"}, "head_dim is missing"),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING] + [FULL] * 3},
            "layer_types",
        ),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING]}, "4 in all"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "layer_types": 3}, "3|int"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "absent"}, "max_window_layers"),
        (plain_config(sliding_window=8), {"sliding_window": 0}, "sliding_window"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, config: ModelConfig | None, changes: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*{said}"):
        read_with(tmp_path, changes, config)


@pytest.mark.parametrize(
    "overrides", [{"attention_bias": True, "qk_norm": True}, {"sliding_window": 8, "sliding_from": 1}]
)
def test_a_model_of_no_family_cannot_be_written(overrides: dict) -> None:
    with pytest.raises(ConfigError, match="no Hugging Face family"):
        to_huggingface(plain_config(**overrides))


@pytest.mark.parametrize("text", ["", "[]", "{", '"llama"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------- tensors

Q_PROJ = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({Q_PROJ: None}, rf"missing: {Q_PROJ} \(32, 32\)"),
        (
            {"model.layers.9.mlp.gate.weight": np.zeros((3, 2), np.float32)},
            r"extra: model\.layers\.9\.mlp\.gate\.weight",
        ),
        ({Q_PROJ: np.zeros((32, 31), np.float32)}, rf"misshaped: {Q_PROJ}: expected \(32, 32\), found \(32, 31\)"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}, "extra: .*q_proj.bias"),
        (
            {Q_PROJ: np.zeros((32, 32), np.int8)},
            rf"model\.safetensors: {Q_PROJ} is of type I8; supported: F32, F16, BF16",
        ),
        ({Q_PROJ: np.zeros((32, 32), np.float64)}, rf"{Q_PROJ} is of type F64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: dict, said: str) -> None:
    make_folder(tmp_path, tensor_changes=change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path)


def test_rotary_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    _, params = make_folder(
        tmp_path, tensor_changes={"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    )
    same(load_checkpoint(tmp_path)[1], params)


def test_a_tied_model_may_store_its_output_only_if_it_is_the_embedding(tmp_path: Path) -> None:
    _, params = make_folder(tmp_path, plain_config("tied_embeddings"))
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.copy()}, tmp_path / "model.safetensors")
    same(load_checkpoint(tmp_path)[1], params)
    save_file({**tensors, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    make_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load_checkpoint(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load_checkpoint(tmp_path)


def edit_index(folder: Path, **changes) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] |= changes
    index.write_text(json.dumps(values))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b"])
def test_an_index_may_not_lead_out_of_the_folder(tmp_path: Path, file: str) -> None:
    make_folder(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    make_folder(tmp_path / "folder")
    shard(tmp_path / "folder", 2)
    edit_index(tmp_path / "folder", **{Q_PROJ: file})
    with pytest.raises(
        CheckpointError, match=rf"index\.json puts {Q_PROJ} into .*not the name of a file in the folder"
    ):
        load_checkpoint(tmp_path / "folder")


def test_an_index_must_tell_the_truth(tmp_path: Path) -> None:
    make_folder(tmp_path)
    where = shard(tmp_path, 2)
    first, second = sorted(set(where.values()))
    other = second if where[Q_PROJ] == first else first
    edit_index(tmp_path, **{Q_PROJ: other})
    with pytest.raises(CheckpointError, match=rf"{other} does not hold {Q_PROJ}"):
        load_checkpoint(tmp_path)
    edit_index(tmp_path, **{Q_PROJ: where[Q_PROJ]})
    (tmp_path / second).unlink()
    with pytest.raises(CheckpointError, match=rf"{second} is missing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is no safetensors index"):
        load_checkpoint(tmp_path)


def test_a_tensor_may_lie_in_one_file_only(tmp_path: Path) -> None:
    make_folder(tmp_path)
    where = shard(tmp_path, 2)
    other = next(file for file in where.values() if file != where[Q_PROJ])
    both = load_file(tmp_path / other) | {Q_PROJ: np.zeros((32, 32), np.float32)}
    save_file(both, tmp_path / other)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} lies in .* and again in"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------- writing


def test_what_is_written_opens_with_the_safetensors_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(jnp.bfloat16),
        "c.d": rng.standard_normal((2, 3, 4)).astype(np.float16),
    }
    lazy = {n: LazyArray(t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()}
    write_folder(tmp_path, lazy, max_shard_bytes=10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # so that readers may map the data as it lies
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_shards_stay_below_their_limit_and_come_with_an_index(tmp_path: Path) -> None:
    lazy = {f"t{i}": LazyArray((10,), np.dtype(np.float32), lambda i=i: np.full(10, i, np.float32)) for i in range(7)}
    write_folder(tmp_path, lazy, max_shard_bytes=100)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert all(sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 100 for file in files)
    found = open_folder(tmp_path)
    assert all((found[name].read() == lazy[name].read()).all() for name in lazy)
