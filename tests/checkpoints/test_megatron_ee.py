"""EE-LLM's state dicts: every layout of exits, one or several pipeline stages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.convert_hf import convert
from eejax.core import ExitConfig, ModelConfig
from eejax.core.errors import CheckpointError, ConfigError
from eejax.model.weights import load_checkpoint
from tests.cases import random_params, shape_config
from tests.model.test_huggingface import same

PADDING = 3
"""Megatron pads vocabularies; what it adds means nothing."""


def mlp_tensors(mlp: dict) -> dict[str, np.ndarray]:
    return {"dense_h_to_4h.weight": mlp["gate_up"], "dense_4h_to_h.weight": mlp["down"]}


def layer_tensors(config: ModelConfig, block: dict, mlp_name: str = "mlp") -> dict[str, np.ndarray]:
    """Megatron's names; its Q, K and V lie together, one group of heads after the other."""
    dim, groups = config.head_dim, config.n_kv_heads
    queries = np.split(block["wq"], groups)
    keys, values = (np.split(half, groups) for half in np.split(block["wkv"], 2))
    qkv = np.concatenate([part for group in zip(queries, keys, values, strict=True) for part in group])
    assert qkv.shape == ((config.n_heads + 2 * groups) * dim, config.hidden_size)
    return {
        "input_norm.weight": block["attn_norm"],
        "self_attention.query_key_value.weight": qkv,
        "self_attention.dense.weight": block["wo"],
        "post_attention_norm.weight": block["mlp_norm"],
        **{f"{mlp_name}.{name}": tensor for name, tensor in mlp_tensors(block["mlp"]).items()},
    }


def padded(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, np.full((PADDING, matrix.shape[1]), 1e6, matrix.dtype)])


def make_folder(
    folder: Path, config: ModelConfig, *, n_stages: int = 1, pre_exit: bool = False, last_exit: bool = False, **changes
) -> dict:
    """Write a model as EE-LLM does; returns its parameters. `last_exit` adds an exit behind the last layer."""
    params = random_params(config, 5)
    exits, per_stage = config.exits, config.n_layers // n_stages
    heads = {layer: params.get("exits", {}).get(f"after_{layer}", {}) for layer in exits.layers}
    if last_exit:
        heads[config.n_layers] = heads[exits.layers[-1]]
    stored_at = {layer: layer if pre_exit else layer - 1 for layer in heads}
    stages: list[dict[str, np.ndarray]] = [{} for _ in range(n_stages)]
    stages[0]["embedding.word_embeddings.weight"] = padded(params["embedding"])
    stages[-1]["encoder.final_norm.weight"] = params["norm"]
    if not config.tie_embeddings:
        stages[-1]["output_layer.weight"] = padded(params["output"])
    elif n_stages > 1:
        stages[-1]["word_embeddings_for_head.weight"] = padded(params["embedding"])
    for number, block in params["blocks"].items():
        stage, layer = divmod(number, per_stage)
        mlp = "mlp.trunk" if exits.head == "mlp" and number in stored_at.values() else "mlp"
        for name, tensor in layer_tensors(config, block, mlp).items():
            stages[stage][f"encoder.layers.{layer}.{name}"] = tensor
    outputs = [0] * n_stages
    for after, head in heads.items():
        stage, layer = divmod(stored_at[after], per_stage)
        prefix = f"encoder.layers.{layer}"
        if exits.norm:
            stages[stage][f"{prefix}.exit_norm.weight"] = head["norm"]
        if exits.head == "mlp":
            for name, tensor in mlp_tensors(head["mlp"]).items():
                stages[stage][f"{prefix}.mlp.branch.{name}"] = tensor
        if exits.head == "block":
            for name, tensor in layer_tensors(config, head["block"]).items():
                stages[stage][f"{prefix}.exit_block.{name}"] = tensor
        if not exits.tie_output:
            stages[stage][f"exit_output_layer.{outputs[stage]}.weight"] = padded(head["output"])
            outputs[stage] += 1
    for number, tensors in enumerate(stages):
        name = "mp_rank_00" if n_stages == 1 else f"mp_rank_00_{number:03d}"
        (folder / name).mkdir(parents=True)
        named = {f"language_model.{tensor}": np.ascontiguousarray(array) for tensor, array in tensors.items()}
        save_file(named, folder / name / "model.safetensors")
    arguments = {
        "num_layers": config.n_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.n_heads,
        "group_query_attention": config.n_kv_heads != config.n_heads,
        "num_query_groups": config.n_kv_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position,
        "padded_vocab_size": config.vocab_size + PADDING,
        "vocab_size": config.vocab_size,
        "norm_epsilon": config.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "exit_layer_nums": [layer + pre_exit for layer in heads],
        "exit_layer_temperature": [1.0 for _ in heads],
        "pre_exit": pre_exit,
        "use_exit_norm": exits.norm,
        "use_exit_mlp": exits.head == "mlp",
        "use_exit_block": exits.head == "block",
        "untie_exit_output_weights": not exits.tie_output,
        "pipeline_model_parallel_size": n_stages,
        "tensor_model_parallel_size": 1,
        "hidden_dropout": 0.1,  # and a hundred more that do not matter here
    }
    arguments = {name: value for name, value in {**arguments, **changes}.items() if value != "absent"}
    (folder / "args.json").write_text(json.dumps(arguments))
    return params


def layout(head: str = "norm", norm: bool = True, tie: bool = False, **overrides) -> ModelConfig:
    return shape_config("gqa", exits=ExitConfig((1, 3), head, norm=norm, tie_output=tie), **overrides)  # pyright: ignore


@pytest.mark.parametrize("n_stages", [1, 2, 4])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_every_layout_and_any_number_of_stages(tmp_path: Path, head: str, norm: bool, tie: bool, n_stages: int) -> None:
    config = layout(head, norm, tie, tie_embeddings=tie)
    params = make_folder(tmp_path / "ee", config, n_stages=n_stages)
    assert convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee") == config
    found_config, found = load_checkpoint(tmp_path / "eejax")
    assert found_config == config
    same(found, params)


@pytest.mark.parametrize("head", ["norm", "block"])
def test_exits_before_a_layer_are_those_behind_the_one_below(tmp_path: Path, head: str) -> None:
    config = layout(head)
    params = make_folder(tmp_path / "ee", config, n_stages=2, pre_exit=True)
    assert convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee") == config
    same(load_checkpoint(tmp_path / "eejax")[1], params)


@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_an_exit_behind_the_last_layer_is_left_out(tmp_path: Path, head: str) -> None:
    config = layout(head)
    params = make_folder(tmp_path / "ee", config, last_exit=True)
    assert convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee") == config
    same(load_checkpoint(tmp_path / "eejax")[1], params)


def test_heads_without_grouping_and_without_a_tokenizer_size(tmp_path: Path) -> None:
    config = layout(n_kv_heads=4)
    make_folder(tmp_path / "ee", config, vocab_size="absent")
    found = convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")
    assert (found.n_kv_heads, found.vocab_size) == (4, config.vocab_size + PADDING)


def test_a_subset_of_the_exits(tmp_path: Path) -> None:
    params = make_folder(tmp_path / "ee", layout("mlp"))
    config = convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee", exits=ExitConfig((3,)))
    assert config.exits.layers == (3,)
    same(load_checkpoint(tmp_path / "eejax")[1]["exits"], {"after_3": params["exits"]["after_3"]})
    with pytest.raises(ConfigError, match=r"no 'mlp' exit head after blocks \[2\]"):
        convert(tmp_path / "ee", tmp_path / "other", format="megatron-ee", exits=ExitConfig((2,)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu": False}, "swiglu False"),
        ({"swiglu": "absent"}, "swiglu is missing"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"add_bias_linear": True}, "add_bias_linear True"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size 2"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is 2, yet there are 1 stages"),
        ({"exit_layer_nums": [0, 3]}, r"exit_layer_nums \[0\] do not exist"),
        ({"exit_layer_nums": [1, 5]}, r"exit_layer_nums \[5\]"),
        ({"exit_layer_nums": 3}, "int"),
        ({"exit_layer_nums": [1, 3], "pre_exit": True}, r"exit_layer_nums \[1\]"),
        ({"exit_layer_temperature": [1.0, 2.0]}, "exit_layer_temperature"),
        ({"use_exit_mlp": True, "use_exit_block": True}, "use_exit_mlp together with use_exit_block"),
        ({"use_exit_mlp": True, "pre_exit": True, "exit_layer_nums": [2, 4]}, "use_exit_mlp with pre_exit"),
        ({"vocab_size": 1000}, "vocab_size 1000 is above padded_vocab_size 64"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
    ],
)
def test_models_that_are_not_supported(tmp_path: Path, changes: dict, said: str) -> None:
    make_folder(tmp_path / "ee", layout(), **changes)
    with pytest.raises(CheckpointError, match=rf"args\.json: .*{said}"):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")
    assert not (tmp_path / "eejax").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "encoder.layers.0.exit_norm.weight",
            None,
            r"stage 0 of .*missing: encoder\.layers\.0\.exit_norm\.weight \(32,\)",
        ),
        (
            "exit_output_layer.0.weight",
            np.zeros((3, 32), np.float32),
            r"exit_output_layer\.0\.weight: expected \(64, 32\)",
        ),
        ("encoder.layers.1.mlp.branch.dense_4h_to_h.weight", np.zeros((2, 2), np.float32), "extra: .*branch"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_stage(tmp_path: Path, name: str, value, said: str) -> None:
    make_folder(tmp_path / "ee", layout(), n_stages=2)
    file = tmp_path / "ee" / "mp_rank_00_000" / "model.safetensors"
    tensors = {**load_file(file), f"language_model.{name}": value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")


def test_a_copy_of_the_embedding_must_be_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "ee", layout(tie=True, tie_embeddings=True), n_stages=2)
    file = tmp_path / "ee" / "mp_rank_00_001" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.word_embeddings_for_head.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"of stage 1 in .* differs"):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")


def test_folders_that_are_no_stages(tmp_path: Path) -> None:
    make_folder(tmp_path / "ee", layout(), n_stages=2)
    stage = tmp_path / "ee" / "mp_rank_00_001"
    (stage / "model.safetensors").rename(stage / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(model_optim_rng\.pt\)"):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")
    stage.rename(tmp_path / "ee" / "mp_rank_00_002")
    with pytest.raises(CheckpointError, match="mp_rank_00_000 and so on; found"):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")
    (tmp_path / "ee" / "mp_rank_00_002").rename(tmp_path / "ee" / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match="holds mp_rank_01_000: tensor-parallel"):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")
    (tmp_path / "ee" / "args.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*args\.json"):
        convert(tmp_path / "ee", tmp_path / "eejax", format="megatron-ee")
