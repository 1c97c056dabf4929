"""eejax against Transformers: configurations, logits, greedy text, and folders written back.

`tests/oracle/make_models.py` wrote the models in `tests/fixtures/models` and what Transformers computes from them, so
that nothing here needs Transformers; what does is skipped where its environment (`make oracle`) is missing.

Logits have a standard deviation of 3, and float32 is off by 1e-5 or so, hence TOLERANCE. Greedy choices of the fixtures
are at least 1e-3 apart, so text has to be equal to the token.
"""

from __future__ import annotations

import functools
import json
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from checkpoints.convert_hf import convert, reverse
from eejax import LLM
from eejax.core import (
    CacheConfig,
    DecodeConfig,
    EarlyExitParams,
    EngineConfig,
    ExitConfig,
    ModelConfig,
    RopeScaling,
    SamplingParams,
    SchedulerConfig,
)
from eejax.core.request import CompletionOutput
from eejax.model.dense import exit_features
from eejax.model.huggingface import load_model, read_config
from eejax.model.transformer import bind
from eejax.model.weights import load_checkpoint
from eejax.model.weights_writer import save_checkpoint
from eejax.serve.engine import Engine
from tests.cases import random_model, random_prompt
from tests.oracle_env import oracle_python

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
SCRIPTS = Path(__file__).parents[1] / "oracle"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
TOLERANCE = 1e-4
EXIT_PROMPT = 2
"""The prompt whose continuations with a fixed exit the fixtures hold."""


@dataclass(frozen=True)
class Oracle:
    """A model saved by Transformers and what Transformers makes of it; make_models.py describes the arrays."""

    folder: Path
    about: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Oracle:
        arrays = load_file(folder.with_name(f"{folder.name}.safetensors"))
        return cls(folder, json.loads(folder.with_name(f"{folder.name}.json").read_text()), arrays)

    @property
    def config(self) -> ModelConfig:
        """The configuration that eejax has to find in the folder."""
        about = self.about
        scaling = about["llama3_rope"]
        return ModelConfig(
            vocab_size=about["vocab_size"],
            hidden_size=about["hidden_size"],
            intermediate_size=about["intermediate_size"],
            n_layers=about["n_layers"],
            n_heads=about["n_heads"],
            n_kv_heads=about["n_kv_heads"],
            head_dim=about["head_dim"] or about["hidden_size"] // about["n_heads"],
            max_position=about["max_position"],
            rope_theta=about["rope_theta"],
            rope_scaling=scaling
            and RopeScaling(
                scaling["factor"],
                scaling["low_freq_factor"],
                scaling["high_freq_factor"],
                scaling["original_max_position_embeddings"],
            ),
            norm_eps=about["norm_eps"],
            tie_embeddings=about["tied"],
            attention_bias=about["family"] == "qwen2",
            qk_norm=about["family"] == "qwen3",
            sliding_window=about["sliding_window"],
            sliding_from=about["sliding_from"],
        )

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """All exits that the model can have."""
        return tuple(range(1, self.config.n_layers))

    @property
    def prompts(self) -> list[list[int]]:
        return [row[row >= 0].tolist() for row in self.arrays["prompts"]]


@functools.cache
def oracle(name: str) -> Oracle:
    """One of the fixtures."""
    return Oracle.read(FIXTURES / name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)`: the fixture's folder converted, its dtypes kept, every block an exit."""
    root = tmp_path_factory.mktemp("converted")

    def converted(name: str) -> Path:
        if not (root / name).exists():
            convert(oracle(name).folder, root / name, exits=ExitConfig(oracle(name).exit_layers))
        return root / name

    return converted


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor in a folder, whichever file it lies in."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "np") as source:
            for name in source.keys():  # noqa: SIM118  (no mapping)
                piece = source.get_slice(name)
                assert name not in found
                found[name] = (piece.get_dtype(), piece.get_shape(), source.get_tensor(name).tobytes())
    return found


def logits_at_exits(config: ModelConfig, params: dict, text: np.ndarray) -> dict[int, np.ndarray]:
    """Logits `[T, V]` after each token of `text [T]` at every exit point, without the engine."""
    model = bind(config, params)
    features = exit_features(model, jnp.asarray(text, jnp.int32)[None])
    return {layer: np.asarray(model.logits(layer, x))[:, 0].T for layer, x in features.items()}


def assert_logits(wanted: Oracle, config: ModelConfig, params: dict) -> None:
    """At full depth, and at every exit those of the model that Transformers cut off there (LayerSkip)."""
    found = logits_at_exits(config, params, wanted.arrays["text"])
    np.testing.assert_allclose(found[config.n_layers], wanted.arrays["logits"], rtol=0, atol=TOLERANCE)
    assert config.exits.layers == wanted.exit_layers
    for layer, logits in zip(wanted.exit_layers, wanted.arrays["exit_logits"], strict=True):
        np.testing.assert_allclose(found[layer][-len(logits) :], logits, rtol=0, atol=TOLERANCE)


def new_engine(config: ModelConfig, params: dict) -> Engine:
    """Two slots, pages of 8, prompts taken 16 tokens at a time."""
    return Engine(
        EngineConfig(
            model=config,
            cache=CacheConfig(num_pages=24, page_size=8),
            scheduler=SchedulerConfig(max_num_seqs=2, max_chunk_steps=8),
            decode=DecodeConfig("never", "eager", "never"),  # the smallest program; others are test_equivalence's
            max_model_len=96,
            prefill_chunk=16,
        ),
        params,
    )


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=32, **options)


def answers(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[CompletionOutput]:
    """All requests at once, answered by an engine that has fewer slots."""
    for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request({"prompt_token_ids": prompt}, one, request_id=str(number))
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    return [done[str(number)] for number in range(len(prompts))]


def assert_text(wanted: Oracle, engine: Engine) -> None:
    """Prompts of several lengths together: greedy text of the whole model, and with a fixed exit, and logprobs."""
    arrays, prompts = wanted.arrays, wanted.prompts
    requests = [(prompt, greedy(logprobs=arrays["top_ids"].shape[-1])) for prompt in prompts]
    requests += [
        (prompts[EXIT_PROMPT], greedy(logprobs=0, early_exit=EarlyExitParams(0.0, exit_layers=(layer,))))
        for layer in wanted.exit_layers
    ]
    found = answers(engine, *zip(*requests, strict=True))
    for number, answer in enumerate(found[: len(prompts)]):
        assert answer.token_ids == tuple(arrays["tokens"][number].tolist()), f"prompt {number}"
        steps = zip(answer.logprobs, arrays["top_ids"][number].tolist(), arrays["top_logprobs"][number], strict=True)
        for reported, ids, logprobs in steps:
            ranked = sorted((one.logprob for one in reported.values()), reverse=True)
            np.testing.assert_allclose(ranked, logprobs, rtol=0, atol=TOLERANCE)
            # The last of them may be another token here, when the next one is as likely.
            named = [reported[token].logprob for token in ids[:-1]]
            np.testing.assert_allclose(named, logprobs[:-1], rtol=0, atol=TOLERANCE)
    for number, (layer, answer) in enumerate(zip(wanted.exit_layers, found[len(prompts) :], strict=True)):
        tokens = arrays["exit_tokens"][number].tolist()
        assert answer.exit_layers == (wanted.config.n_layers, *[layer] * (len(tokens) - 1))
        assert answer.token_ids == tuple(tokens), f"exit {layer}"
        logprobs = [reported[token].logprob for reported, token in zip(answer.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(logprobs, arrays["exit_logprobs"][number], rtol=0, atol=TOLERANCE)


def assert_same_tensors(written: Path, source: Path) -> None:
    """To the bit: names, types, shapes, bytes."""
    found, wanted = tensors(written), tensors(source)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


# ------------------------------------------------------------------------------------------------------------- fixtures


def test_fixtures_stay_small():
    assert sum(file.stat().st_size for file in FIXTURES.parent.rglob("*") if file.is_file()) < 3_000_000


def test_the_fixtures_cover_what_is_promised():
    """Each family, tied and untied, GQA and MHA, with a head size of its own; each dtype; shards; old and new files."""
    found = [oracle(name) for name in NAMES]
    assert {
        (one.about["family"], one.about["tied"], one.about["n_kv_heads"] == one.about["n_heads"])
        for one in found
        if one.config.head_dim * one.config.n_heads != one.config.hidden_size
    } == {(f, t, h) for f in ("llama", "mistral", "qwen2", "qwen3") for t in (True, False) for h in (True, False)}
    assert {next(iter(tensors(one.folder).values()))[0] for one in found} == {"F32", "BF16", "F16"}
    assert all(one.config.vocab_size % 2 for one in found)
    assert any((one.folder / "model.safetensors.index.json").exists() for one in found)
    files = [json.loads((one.folder / "config.json").read_text()) for one in found]
    assert {"rope_theta" in values for values in files} == {True, False}  # beside the others until Transformers 5
    windows = {one.config.sliding_window for one in found} - {None}
    assert windows and all(window < len(found[0].arrays["text"]) // 2 for window in windows)
    for one in found:
        assert one.about["margin"] > 1e-3
        assert min(len(set(row.tolist())) for row in (*one.arrays["tokens"], *one.arrays["exit_tokens"])) > 3


@pytest.mark.parametrize("name", NAMES)
def test_configuration_and_weights(name, checkpoint):
    """Opened directly and converted: the same configuration, the same weights, and Transformers' logits."""
    wanted = oracle(name)
    direct, params = load_model(wanted.folder)
    assert direct == read_config(wanted.folder) == wanted.config
    converted, same_params = load_checkpoint(checkpoint(name))
    assert converted == direct.with_exit_layers(wanted.exit_layers)
    assert jax.tree.structure(params) == jax.tree.structure(same_params)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert_logits(wanted, converted, params)


@pytest.mark.parametrize("name", NAMES)
def test_text_through_the_engine(name, checkpoint):
    assert_text(oracle(name), new_engine(*load_checkpoint(checkpoint(name))))


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, checkpoint, tmp_path):
    """What is written back is what was read, to the bit, whether into one file or into several."""
    source = oracle(name).folder
    for limit, several in ((2**30, False), (10_000, True)):
        target = tmp_path / str(limit)
        reverse(checkpoint(name), target, max_shard_bytes=limit)
        assert_same_tensors(target, source)
        assert read_config(target) == oracle(name).config
        assert (len(list(target.glob("*.safetensors"))) > 1) == several


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversion_rounds_to_the_nearest(dtype, tmp_path):
    """With a dtype, the checkpoint holds each weight of the file rounded once, and so does a model opened directly."""
    source = oracle("llama-tied-gqa").folder
    convert(source, tmp_path / "converted", dtype=dtype)
    reverse(tmp_path / "converted", tmp_path / "back")
    found = tensors(tmp_path / "back")
    for name, (kind, shape, data) in tensors(source).items():
        assert kind == "F32"
        values = np.frombuffer(data, np.float32)
        if dtype == "bfloat16":  # the upper half of the bits, rounded to even
            bits = values.view(np.uint32)
            rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        else:
            rounded = values.astype(np.float16)
        assert found[name] == ({"bfloat16": "BF16", "float16": "F16"}[dtype], shape, rounded.tobytes()), name
    direct = load_model(source, dtype)[1]
    jax.tree.map(np.testing.assert_array_equal, direct, load_checkpoint(tmp_path / "converted", dtype)[1])


@pytest.mark.parametrize("head", ["norm", "mlp"])
def test_new_exit_heads_begin_as_the_shared_one(head, tmp_path):
    wanted = oracle("qwen3-untied-gqa")
    convert(wanted.folder, tmp_path / "out", exits=ExitConfig(wanted.exit_layers, head, tie_output=False))
    config, params = load_checkpoint(tmp_path / "out")
    assert config.exits == ExitConfig(wanted.exit_layers, head, tie_output=False)
    assert_logits(wanted, config, params)


def test_llm_opens_either_folder(checkpoint):
    """The public way in: a Hugging Face folder as it lies there, and the checkpoint made from it."""
    wanted = oracle("mistral-window")
    prompt = {"prompt_token_ids": wanted.prompts[EXIT_PROMPT]}
    expected = [wanted.arrays["tokens"][EXIT_PROMPT], wanted.arrays["exit_tokens"][1]]
    for folder in (wanted.folder, checkpoint("mistral-window")):
        llm = LLM(folder, dtype="float32", page_size=8, max_num_seqs=2, exit_layers=[2])
        assert llm.tokenizer is None
        assert llm.config.model == wanted.config.with_exit_layers((2,))
        outputs = llm.generate([prompt] * 2, [greedy(), greedy(early_exit=EarlyExitParams(0.0))], use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [row.tolist() for row in expected]


# ----------------------------------------------------------------------------------------------------------------- live


live = pytest.mark.skipif(
    oracle_python() is None, reason="needs Transformers: run `make oracle`, or set EEJAX_ORACLE_PYTHON"
)


def run_oracle(script: str, *arguments: object) -> None:
    """Run one of tests/oracle in its own environment."""
    command = [str(oracle_python()), str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@live
def test_models_that_no_fixture_holds(tmp_path):
    """Everything a model can differ in, with new weights and prompts; one of each family through the engine."""
    seed = secrets.randbelow(2**31)
    out = tmp_path / f"seed-{seed}"  # so that a failure names it
    run_oracle("make_models.py", "--out", out, "--full", "--seed", seed)
    models = [Oracle.read(path) for path in sorted(out.iterdir()) if path.is_dir()]
    assert len(models) > 35
    for number, wanted in enumerate(models):
        converted = tmp_path / "converted" / wanted.folder.name
        convert(wanted.folder, converted, exits=ExitConfig(wanted.exit_layers))
        config, params = load_checkpoint(converted)
        assert config == wanted.config.with_exit_layers(wanted.exit_layers), wanted.folder
        assert_logits(wanted, config, params)
        reverse(converted, tmp_path / "back" / wanted.folder.name)
        assert_same_tensors(tmp_path / "back" / wanted.folder.name, wanted.folder)
        if number % (len(models) // 4) == seed % (len(models) // 4):
            assert_text(wanted, new_engine(config, params))


@live
def test_transformers_opens_what_is_written_back(tmp_path):
    """Folders that `reverse` makes of models that never were Hugging Face's: Transformers computes eejax's logits."""
    shapes = ("gqa", "mqa", "bias", "qk_norm", "llama3_rope", "tied_embeddings")
    folders, texts, logits = [], {}, {}
    for shape in shapes:
        config, params = random_model(shape)
        save_checkpoint(tmp_path / "native" / shape, config, params)
        folders.append(tmp_path / shape)
        reverse(tmp_path / "native" / shape, folders[-1], max_shard_bytes=20_000)
        text = np.array(random_prompt(config, 64))
        texts[shape] = text
        logits[shape] = logits_at_exits(config, params, text)[config.n_layers]
    save_file(texts, tmp_path / "texts.safetensors")
    run_oracle("logits.py", tmp_path / "texts.safetensors", tmp_path / "logits.safetensors", *folders)
    found = load_file(tmp_path / "logits.safetensors")
    for shape in shapes:
        np.testing.assert_allclose(found[shape], logits[shape], rtol=0, atol=TOLERANCE, err_msg=shape)
