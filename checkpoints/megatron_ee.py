"""Models from EE-LLM (arXiv 2312.04916, a Megatron-LM), tensor-parallel size 1, any number of pipeline stages.

EE-LLM saves pickles, which are not opened here: unpickling runs whatever code they contain. Where they are trusted,
this turns one iteration's folder into what is read here (with torch, safetensors and EE-LLM's `megatron` at hand):

    def flat(tree, prefix=""):
        for name, value in tree.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    for stage in sorted(source.glob("mp_rank_00*")):  # mp_rank_00, or mp_rank_00_000, mp_rank_00_001, ...
        state = torch.load(stage / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        tensors = {name: value.contiguous() for name, value in flat(state["model"]) if torch.is_tensor(value)}
        (target / stage.name).mkdir(parents=True)
        safetensors.torch.save_file(tensors, target / stage.name / "model.safetensors")
        arguments = {n: v for n, v in vars(state["args"]).items() if isinstance(v, (int, float, str, list, type(None)))}
        (target / "args.json").write_text(json.dumps(arguments))

So the folder holds `args.json` and, for each stage, a folder with `model.safetensors`. A tokenizer may lie beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eejax.core import CheckpointError, ConfigError, ExitConfig, ExitHeadKind, ModelConfig, require
from eejax.model import LazyArray, compare, param_shapes, rebuild
from eejax.model.huggingface import SINGLE_FILE, TensorFiles, nothing_in, read_json

ARGUMENTS_FILE = "args.json"
PREFIXES = ("model.", "language_model.")
EMBEDDING, EMBEDDING_COPY = "embedding.word_embeddings.weight", "word_embeddings_for_head.weight"
"""Later stages of a model whose output is tied carry a copy of the embedding."""
IGNORED = "inv_freq"

MUST_SAY: Mapping[str, tuple[object, ...]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
}
MAY_SAY: Mapping[str, tuple[object, ...]] = {
    "tensor_model_parallel_size": (1,),
    "rotary_percent": (1,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "num_experts": (None,),
    "num_layers_per_virtual_pipeline_stage": (None,),
    "qk_layernorm": (False,),
}
"""Megatron's arguments that change the model, and the values that are supported."""


@dataclass(frozen=True, slots=True)
class Exit:
    """An exit: how many blocks run before it, and which block (from 0) its tensors are stored with."""

    after: int
    stored_at: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: a tensor of a stage, and what to take of it."""

    stage: int
    tensor: str
    shape: tuple[int, ...]
    take: Callable[[np.ndarray], np.ndarray] | None = None


def load_lazily(path: Path, exit_layers: tuple[int, ...] | None = None) -> tuple[ModelConfig, dict]:
    """The model of such a folder; its parameters are a tree of `LazyArray` in the dtypes stored.

    Args:
        exit_layers: the exits to keep, as numbers of blocks that run before them; all when None. EE-LLM's exit
            after the last block is in the place of the final head, and is left out.

    Raises:
        CheckpointError: the model is not supported, or files or tensors are not as they must be; they are named.
        ConfigError: `exit_layers` are not exits of this model.
    """
    file = path / ARGUMENTS_FILE
    arguments = read_json(file)
    stages = [_without_prefixes(TensorFiles([one])) for one in _stage_files(path)]
    try:
        config, exits = _parse(arguments)
        wanted = arguments.get("pipeline_model_parallel_size", len(stages))
        require(wanted == len(stages), f"pipeline_model_parallel_size is {wanted}, yet there are {len(stages)} stages")
        require(
            config.n_layers % len(stages) == 0,
            f"num_layers {config.n_layers} cannot be spread over {len(stages)} stages evenly",
        )
    except (ConfigError, TypeError) as error:  # TypeError: an argument of another type than Megatron's
        raise CheckpointError(f"{file}: {error}") from error
    sources = dict(_sources(config, exits, arguments["padded_vocab_size"], len(stages)))
    for number, tensors in enumerate(stages):
        of_stage = {source.tensor: source.shape for source in sources.values() if source.stage == number}
        found = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(IGNORED)}
        if config.tie_embeddings and number and found.get(EMBEDDING_COPY) == stages[0][EMBEDDING].shape:
            del found[EMBEDDING_COPY]
            if not np.array_equal(tensors[EMBEDDING_COPY].read(), stages[0][EMBEDDING].read()):
                raise CheckpointError(f"{EMBEDDING_COPY} of stage {number} in {path} differs from {EMBEDDING}")
        compare(f"stage {number} of {path}", of_stage, found)
    shapes = param_shapes(config)
    leaves = {leaf: _read(stages[source.stage][source.tensor], source) for leaf, source in sources.items()}
    params = rebuild(shapes, leaves)
    if exit_layers is not None:
        config = config.with_exit_layers(exit_layers)
        params = rebuild(param_shapes(config), leaves)
    return config, params


def _stage_files(path: Path) -> list[Path]:
    folders = sorted(one.name for one in path.glob("mp_rank_*"))
    stages = [name for name in folders if name == "mp_rank_00" or name.startswith("mp_rank_00_")]
    if folders != stages:
        other = next(name for name in folders if name not in stages)
        raise CheckpointError(f"{path} holds {other}: tensor-parallel models are not supported; merge them to size 1")
    expected = [f"mp_rank_00_{number:03d}" for number in range(len(stages))]
    if stages not in (["mp_rank_00"], expected) or not stages:
        raise CheckpointError(f"{path} must hold mp_rank_00, or mp_rank_00_000 and so on; found {folders or 'neither'}")
    for name in stages:
        if not (path / name / SINGLE_FILE).exists():
            raise CheckpointError(nothing_in(path / name))
    return [path / name / SINGLE_FILE for name in stages]


def _without_prefixes(tensors: TensorFiles) -> dict[str, LazyArray]:
    found = {}
    for name in tensors:
        short = name
        for prefix in PREFIXES:
            short = short.removeprefix(prefix)
        found[short] = tensors[name]
    return found


def _parse(arguments: dict[str, Any]) -> tuple[ModelConfig, list[Exit]]:
    def need(name: str) -> Any:
        require(arguments.get(name) is not None, f"{name} is missing")
        return arguments[name]

    for name, allowed in (*MUST_SAY.items(), *MAY_SAY.items()):
        value = need(name) if name in MUST_SAY else arguments.get(name, allowed[0])
        require(value in allowed, f"{name} {value!r} is not supported; supported: {' or '.join(map(repr, allowed))}")
    temperatures = arguments.get("exit_layer_temperature") or []
    require(
        all(one == 1 for one in temperatures), f"exit_layer_temperature {temperatures} is not supported; supported: 1"
    )
    n_layers, n_heads, hidden_size = need("num_layers"), need("num_attention_heads"), need("hidden_size")
    grouped = arguments.get("group_query_attention", False)
    vocab_size, padded = arguments.get("vocab_size"), need("padded_vocab_size")
    require(vocab_size is None or vocab_size <= padded, f"vocab_size {vocab_size} is above padded_vocab_size {padded}")
    exits = _parse_exits(arguments, n_layers)
    mlp, block = arguments.get("use_exit_mlp", False), arguments.get("use_exit_block", False)
    require(not (mlp and block), "use_exit_mlp together with use_exit_block is not supported")
    require(
        not (mlp and arguments.get("pre_exit", False)),
        "use_exit_mlp with pre_exit is not supported: EE-LLM itself does not use the branch then",
    )
    head: ExitHeadKind = "mlp" if mlp else "block" if block else "norm"
    config = ModelConfig(
        vocab_size=padded if vocab_size is None else vocab_size,
        hidden_size=hidden_size,
        intermediate_size=need("ffn_hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=need("num_query_groups") if grouped else n_heads,
        head_dim=arguments.get("kv_channels") or hidden_size // n_heads,
        max_position=need("max_position_embeddings"),
        rope_theta=arguments.get("rotary_base", 10000),
        norm_eps=need("norm_epsilon"),
        tie_embeddings=not arguments.get("untie_embeddings_and_output_weights", False),
        exits=ExitConfig(
            tuple(one.after for one in exits if one.after < n_layers),
            head,
            norm=arguments.get("use_exit_norm", False),
            tie_output=not arguments.get("untie_exit_output_weights", False),
        ),
    )
    return config, exits


def _parse_exits(arguments: dict[str, Any], n_layers: int) -> list[Exit]:
    """EE-LLM counts layers from 1; an exit follows its layer, or precedes it with `pre_exit`."""
    numbers = sorted(arguments.get("exit_layer_nums") or [])
    before = bool(arguments.get("pre_exit", False))
    exits = [Exit(after=number - before, stored_at=number - 1) for number in numbers]
    bad = [number for number, one in zip(numbers, exits, strict=True) if not (one.after > 0 and number <= n_layers)]
    require(not bad, f"exit_layer_nums {bad} do not exist in a model of {n_layers} layers (pre_exit {before})")
    return exits


def _sources(config: ModelConfig, exits: list[Exit], padded: int, n_stages: int) -> Iterator[tuple[str, Source]]:
    """Every parameter and where it comes from. Layers are counted anew in each stage, exits' outputs as well."""
    hidden, per_stage = config.hidden_size, config.n_layers // n_stages
    last, outputs = n_stages - 1, [0] * n_stages

    def vocabulary(stage: int, tensor: str) -> Source:
        return Source(stage, tensor, (padded, hidden), lambda array: array[: config.vocab_size])

    yield "embedding", vocabulary(0, EMBEDDING)
    yield "norm", Source(last, "encoder.final_norm.weight", (hidden,))
    if not config.tie_embeddings:
        yield "output", vocabulary(last, "output_layer.weight")
    branching = {one.stored_at for one in exits} if config.exits.head == "mlp" else set()
    for number in range(config.n_layers):
        stage, layer = divmod(number, per_stage)
        mlp = "mlp.trunk" if number in branching else "mlp"
        yield from _block_sources(config, f"blocks.{number}", stage, f"encoder.layers.{layer}", mlp)
    for one in exits:
        stage, layer = divmod(one.stored_at, per_stage)
        leaf, tensor = f"exits.after_{one.after}", f"encoder.layers.{layer}"
        if config.exits.norm:
            yield f"{leaf}.norm", Source(stage, f"{tensor}.exit_norm.weight", (hidden,))
        if config.exits.head == "mlp":
            yield from _mlp_sources(config, f"{leaf}.mlp", stage, f"{tensor}.mlp.branch")
        if config.exits.head == "block":
            yield from _block_sources(config, f"{leaf}.block", stage, f"{tensor}.exit_block", "mlp")
        if not config.exits.tie_output:
            yield f"{leaf}.output", vocabulary(stage, f"exit_output_layer.{outputs[stage]}.weight")
            outputs[stage] += 1


def _block_sources(config: ModelConfig, leaf: str, stage: int, tensor: str, mlp: str) -> Iterator[tuple[str, Source]]:
    hidden, dim, groups = config.hidden_size, config.head_dim, config.n_kv_heads
    queries = config.n_heads // groups  # per group: so many heads of Q, then one of K and one of V
    fused = (groups * (queries + 2) * dim, hidden)

    def heads(start: int, end: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda array: array.reshape(groups, queries + 2, dim, hidden)[:, start:end].reshape(-1, hidden)

    def keys_then_values(array: np.ndarray) -> np.ndarray:
        return np.concatenate([heads(queries, queries + 1)(array), heads(queries + 1, queries + 2)(array)])

    yield f"{leaf}.attn_norm", Source(stage, f"{tensor}.input_norm.weight", (hidden,))
    yield f"{leaf}.wq", Source(stage, f"{tensor}.self_attention.query_key_value.weight", fused, heads(0, queries))
    yield f"{leaf}.wkv", Source(stage, f"{tensor}.self_attention.query_key_value.weight", fused, keys_then_values)
    yield f"{leaf}.wo", Source(stage, f"{tensor}.self_attention.dense.weight", (hidden, config.n_heads * dim))
    yield f"{leaf}.mlp_norm", Source(stage, f"{tensor}.post_attention_norm.weight", (hidden,))
    yield from _mlp_sources(config, f"{leaf}.mlp", stage, f"{tensor}.{mlp}")


def _mlp_sources(config: ModelConfig, leaf: str, stage: int, tensor: str) -> Iterator[tuple[str, Source]]:
    hidden, size = config.hidden_size, config.intermediate_size
    yield f"{leaf}.gate_up", Source(stage, f"{tensor}.dense_h_to_4h.weight", (2 * size, hidden))
    yield f"{leaf}.down", Source(stage, f"{tensor}.dense_4h_to_h.weight", (hidden, size))


def _read(tensor: LazyArray, source: Source) -> LazyArray:
    take = source.take
    if take is None:
        return tensor
    shape = take(np.broadcast_to(np.zeros((), np.int8), tensor.shape)).shape
    return LazyArray(shape, tensor.dtype, lambda: np.ascontiguousarray(take(tensor.read())))
