"""Converting: exits, types, what is written and when, memory, and the way back. EE-LLM has a file of its own."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file
from typer.testing import CliRunner

from checkpoints import convert_hf
from checkpoints.convert_hf import convert, reverse
from eejax.core import ExitConfig
from eejax.core.errors import CheckpointError, ConfigError
from eejax.model import weights_writer
from eejax.model.dense import exit_features
from eejax.model.huggingface.tensors import open_folder
from eejax.model.param_tree import LazyArray
from eejax.model.transformer import bind
from eejax.model.weights import load_checkpoint, load_config
from eejax.model.weights_writer import save_checkpoint
from tests.cases import random_model
from tests.hf_folders import make_folder, plain_config, shard
from tests.model.test_huggingface import SHAPES, same


def raw(folder: Path) -> dict[str, tuple[str, bytes]]:
    tensors = open_folder(folder)
    return {name: (tensors[name].dtype.name, tensors[name].read().tobytes()) for name in tensors}


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shape", SHAPES)
def test_a_converted_model_is_the_one_opened_directly(tmp_path: Path, shape: str) -> None:
    config, params = make_folder(tmp_path / "hf", plain_config(shape))
    assert convert(tmp_path / "hf", tmp_path / "eejax") == config
    found_config, found = load_checkpoint(tmp_path / "eejax")
    assert found_config == config
    same(found, params)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_way_back_gives_identical_tensors(tmp_path: Path, shape: str, dtype: str) -> None:
    config, _ = make_folder(tmp_path / "hf", plain_config(shape), dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "eejax", exits=ExitConfig((1, 2)))
    reverse(tmp_path / "eejax", tmp_path / "back")
    assert raw(tmp_path / "back") == raw(tmp_path / "hf")
    assert load_config(tmp_path / "back") == config
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype


def test_shards_there_and_back(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    before = raw(tmp_path / "hf")
    shard(tmp_path / "hf", 3)
    convert(tmp_path / "hf", tmp_path / "eejax")
    reverse(tmp_path / "eejax", tmp_path / "back", max_shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert raw(tmp_path / "back") == before


def test_another_type_is_the_rounded_value(tmp_path: Path) -> None:
    _, params = make_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "eejax", dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    same(load_checkpoint(tmp_path / "eejax", jnp.bfloat16)[1], rounded)
    same(load_checkpoint(tmp_path / "eejax")[1], jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))
    reverse(tmp_path / "eejax", tmp_path / "back", dtype="float32")
    assert {dtype for dtype, _ in raw(tmp_path / "back").values()} == {"float32"}


def test_values_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    make_folder(tmp_path / "hf")
    values = load_file(tmp_path / "hf" / "model.safetensors")[name]
    values[0, 0] = 70_000.0
    make_folder(tmp_path / "hf", tensor_changes={name: values})
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.mlp\.down has values that float16 cannot hold \(up to 7e\+04"
    ):
        convert(tmp_path / "hf", tmp_path / "eejax", dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    convert(tmp_path / "hf", tmp_path / "eejax", dtype="bfloat16")


def test_parts_stored_in_different_types_are_joined_without_loss(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    config, params = make_folder(tmp_path / "hf", dtype="bfloat16")
    values = load_file(tmp_path / "hf" / "model.safetensors")[name].astype(np.float32) + np.float32(1e-4)
    make_folder(tmp_path / "hf", dtype="bfloat16", tensor_changes={name: values})
    convert(tmp_path / "hf", tmp_path / "eejax")
    wkv = load_checkpoint(tmp_path / "eejax")[1]["blocks"][0]["wkv"]
    half = config.n_kv_heads * config.head_dim
    np.testing.assert_array_equal(wkv[half:], values)
    np.testing.assert_array_equal(wkv[:half], params["blocks"][0]["wkv"][:half].astype(np.float32))


def test_tokenizer_files_go_along_and_come_back(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / "hf" / name).write_text("{}")
    (tmp_path / "hf" / "training_args.bin").write_bytes(b"no business of ours")
    convert(tmp_path / "hf", tmp_path / "eejax")
    reverse(tmp_path / "eejax", tmp_path / "back")
    for folder in ("eejax", "back"):
        assert (tmp_path / folder / "generation_config.json").read_text() == "{}"
        assert not (tmp_path / folder / "training_args.bin").exists()


# --------------------------------------------------------------------------------------------------------------- exits


@pytest.mark.parametrize(("head", "tie"), [("shared", True), *((h, t) for h in ("norm", "mlp") for t in (True, False))])
@pytest.mark.parametrize("shape", ["gqa", "tied_embeddings"])
def test_added_exits_equal_the_shared_head(tmp_path: Path, shape: str, head: str, tie: bool) -> None:
    make_folder(tmp_path / "hf", plain_config(shape))
    config = convert(tmp_path / "hf", tmp_path / "eejax", exits=ExitConfig((1, 3), head, tie_output=tie))
    assert config.exits == ExitConfig((1, 3), head, tie_output=tie)
    plain, params = load_checkpoint(tmp_path / "hf")
    shared = bind(dataclasses.replace(plain, exits=ExitConfig((1, 3))), params)
    model = bind(*load_checkpoint(tmp_path / "eejax"))
    tokens = jnp.arange(12)[None] % config.vocab_size
    found, expected = exit_features(model, tokens), exit_features(shared, tokens)
    for layer in config.exit_points:
        a, b = model.logits(layer, found[layer]), shared.logits(layer, expected[layer])
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exits": {"layers": (0,)}}, "at least 1"),
        ({"exits": {"layers": (4,)}}, r"exit layers \[4\] do not exist.*blocks 1 to 3"),
        ({"exits": {"layers": (2, 9)}}, r"exit layers \[9\]"),
        ({"exits": {"layers": (2, 2)}}, "ascending"),
        ({"exits": {"layers": (1,), "head": "linear"}}, "shared, norm, mlp"),
        ({"exits": {"layers": (1,), "head": "block"}}, "'block'"),
        ({"exits": {"head": "norm"}}, "needs exit layers"),
        ({"exits": {"layers": (1,), "tie_output": False}}, "shared head has no output"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"format": "gguf"}, "huggingface, megatron-ee"),
        ({"format": "megatron-ee", "exits": {"head": "mlp"}}, "brings its exit heads"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(tmp_path: Path, options: dict, said: str) -> None:
    make_folder(tmp_path / "hf")
    with pytest.raises(ConfigError, match=said):
        exits = {"exits": ExitConfig(**options["exits"])} if "exits" in options else {}
        convert(tmp_path / "hf", tmp_path / "eejax", **options | exits)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


# ------------------------------------------------------------------------------------------- what is written, and when


@pytest.mark.parametrize("after", [0, 3, 20])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch, after: int, error: type) -> None:
    make_folder(tmp_path / "hf")
    calls = []

    def failing(leaf: LazyArray) -> LazyArray:
        def broken() -> np.ndarray:
            calls.append(1)
            if len(calls) > after:
                raise error("interrupted")
            return leaf.read()

        return LazyArray(leaf.shape, leaf.dtype, broken)

    monkeypatch.setattr(convert_hf, "_cast", lambda params, dtype: jax.tree.map(failing, params))
    with pytest.raises(error):
        convert(tmp_path / "hf", tmp_path / "eejax")
    assert len(calls) == after + 1
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_a_target_that_exists_is_replaced_only_on_demand(tmp_path: Path) -> None:
    _, params = make_folder(tmp_path / "hf")
    save_checkpoint(tmp_path / "eejax", *random_model("mqa"))
    with pytest.raises(ConfigError, match="exists; give another folder, or say overwrite"):
        convert(tmp_path / "hf", tmp_path / "eejax")
    assert load_config(tmp_path / "eejax") == random_model("mqa")[0]
    convert(tmp_path / "hf", tmp_path / "eejax", overwrite=True)
    same(load_checkpoint(tmp_path / "eejax")[1], params)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark and stormy night.")
    with pytest.raises(ConfigError, match="is no checkpoint; it is left as it is"):
        convert(tmp_path / "hf", tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "hf", tmp_path / "empty")


@pytest.mark.parametrize(
    ("target", "said"), [("hf", "same folder"), ("hf/eejax", "inside the source"), (".", "inside the")]
)
def test_source_and_target_lie_apart(tmp_path: Path, target: str, said: str) -> None:
    make_folder(tmp_path / "hf")
    with pytest.raises(ConfigError, match=said):
        convert(tmp_path / "hf", tmp_path / target, overwrite=True)


def test_a_broken_source_writes_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", tensor_changes={"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        convert(tmp_path / "hf", tmp_path / "eejax")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_few_tensors_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each array that is read is watched until it is collected."""
    make_folder(tmp_path / "hf", plain_config(n_layers=12))
    alive, most = [0], [0]

    def release(size: int) -> None:
        alive[0] -= size

    def watching(leaf: LazyArray) -> LazyArray:
        def watched() -> np.ndarray:
            array = leaf.read()
            alive[0] += array.nbytes
            most[0] = max(most[0], alive[0])
            weakref.finalize(array, release, array.nbytes)
            return array

        return LazyArray(leaf.shape, leaf.dtype, watched)

    monkeypatch.setattr(convert_hf, "_cast", lambda params, dtype: jax.tree.map(watching, params))
    monkeypatch.setattr(weights_writer, "BATCH_BYTES", 10_000)
    convert(tmp_path / "hf", tmp_path / "eejax")
    largest = 4 * max(leaf.size for leaf in jax.tree.leaves(load_checkpoint(tmp_path / "eejax")[1]))
    total = sum(len(data) for _, data in raw(tmp_path / "hf").values())
    assert 0 < most[0] <= 2 * max(largest, 10_000) < total / 4


# ------------------------------------------------------------------------------------------------------------- reverse


def test_trained_exits_are_dropped_only_on_demand(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "eejax", *random_model("norm_own"))
    with pytest.raises(ConfigError, match="drop_exits"):
        reverse(tmp_path / "eejax", tmp_path / "hf")
    reverse(tmp_path / "eejax", tmp_path / "hf", drop_exits=True)
    config, params = random_model("norm_own")
    found_config, found = load_checkpoint(tmp_path / "hf")
    assert found_config == dataclasses.replace(config, exits=ExitConfig())
    same(found, {name: tree for name, tree in params.items() if name != "exits"})


def test_the_demo_model_becomes_a_hugging_face_folder(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "checkpoints" / "demo"
    reverse(demo, tmp_path / "hf", drop_exits=True)  # its probes
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (demo / "tokenizer.model").read_bytes()
    kept = {name: part for name, part in load_checkpoint(demo)[1].items() if name != "exits"}
    same(load_checkpoint(tmp_path / "hf")[1], kept)


@pytest.mark.parametrize(
    ("options", "said"), [({"max_shard_bytes": 0}, "positive"), ({"dtype": "float8"}, "dtype must be one of")]
)
def test_bad_options_of_the_way_back(tmp_path: Path, options: dict, said: str) -> None:
    save_checkpoint(tmp_path / "eejax", *random_model("gqa"))
    with pytest.raises(ConfigError, match=said):
        reverse(tmp_path / "eejax", tmp_path / "hf", **options)
    assert not (tmp_path / "hf").exists()


def test_a_hugging_face_folder_cannot_be_reversed(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    with pytest.raises(ConfigError, match="Hugging Face folder already"):
        reverse(tmp_path / "hf", tmp_path / "back")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(convert_hf.main)
    return app


def test_the_command_line_there_and_back(tmp_path: Path, app: typer.Typer) -> None:
    make_folder(tmp_path / "hf")
    source, target, back = (str(tmp_path / name) for name in ("hf", "eejax", "back"))
    done = CliRunner().invoke(app, [source, target, "--exit-layers", "1,3", "--exit-head", "norm", "--untie-output"])
    assert done.exit_code == 0, done.stderr
    assert "4 blocks, exits after 1, 3 (norm)" in done.stderr
    assert load_config(target).exits == ExitConfig((1, 3), "norm", tie_output=False)
    refused = CliRunner().invoke(app, [target, back, "--reverse"])
    assert refused.exit_code == 2
    assert "drop_exits" in refused.stderr
    done = CliRunner().invoke(app, [target, back, "--reverse", "--drop-exits", "--max-shard-bytes", "30000"])
    assert done.exit_code == 0, done.stderr
    assert "those after 1, 3 are left out" in done.stderr
    assert raw(tmp_path / "back") == raw(tmp_path / "hf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--exit-layers", "1;2"], "--exit-layers must be integers"),
        (["--exit-layers", "0"], "at least 1"),
        (["--reverse", "--exit-layers", "1"], "do not go with --reverse"),
        (["--dtype", "fp8"], "dtype must be one of"),
    ],
)
def test_the_command_line_reports_errors(tmp_path: Path, app: typer.Typer, options: list[str], said: str) -> None:
    make_folder(tmp_path / "hf")
    done = CliRunner().invoke(app, [str(tmp_path / "hf"), str(tmp_path / "eejax"), *options])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "eejax").exists()
