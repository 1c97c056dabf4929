"""`config.json` of a Hugging Face folder, read into a `ModelConfig` and written from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eejax.core import CheckpointError, ConfigError, ModelConfig, RopeScaling

CONFIG_FILE = "config.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
QWEN = ("qwen2", "qwen3")
ROPE_TYPES = ("default", "llama3")
DEFAULT_THETA = 10000.0
DEFAULT_WINDOW = 4096
"""What Transformers takes where nothing is said: the base for all four families, the window for those that have one."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` naming the file."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder, without exits.

    Raises:
        CheckpointError: the architecture, its rotary embedding, quantisation or another option is not supported, or an
            option is missing or invalid; the message names the file and the option.
    """
    file = Path(path) / CONFIG_FILE
    values = read_json(file)
    family = _family(file, values)
    try:
        return _parse(family, values)
    except (ConfigError, TypeError) as error:  # TypeError: an option of another type than any that is known
        raise CheckpointError(f"{file}: {error}") from error


def _family(file: Path, values: dict[str, Any]) -> str:
    architectures = values.get("architectures") or []
    for family, architecture in ARCHITECTURES.items():
        if values.get("model_type") == family and architectures in ([], [architecture]):
            return family
    found = f"{values.get('model_type')} {architectures}"
    raise CheckpointError(f"{file}: architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}")


def _parse(family: str, values: dict[str, Any]) -> ModelConfig:
    def need(name: str) -> Any:
        if values.get(name) is None:
            raise ConfigError(f"{name} is missing")
        return values[name]

    def refuse(name: str, *allowed: object) -> None:
        if values.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{name} {values[name]!r} is not supported; supported: {' or '.join(map(repr, allowed))}")

    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ConfigError(
            f"quantised weights (quantization_config: {method}) are not supported; use the full-precision model"
        )
    refuse("hidden_act", "silu", "swish")
    refuse("mlp_bias", False, None)
    if family != "qwen2":  # which has biases on q, k and v whatever the option says, and none elsewhere
        refuse("attention_bias", False, None)
    n_layers, n_heads, hidden_size = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    n_kv_heads = values.get("num_key_value_heads")
    if n_kv_heads is None:
        n_kv_heads = n_heads if family == "llama" else need("num_key_value_heads")
    head_dim = values.get("head_dim")
    if head_dim is None:
        if family == "qwen3":
            need("head_dim")  # Transformers' default for it is 128, whatever the hidden size
        if not (
            isinstance(hidden_size, int) and isinstance(n_heads, int) and n_heads > 0 and hidden_size % n_heads == 0
        ):
            raise ConfigError(f"hidden_size {hidden_size!r} is no multiple of num_attention_heads {n_heads!r}")
        head_dim = hidden_size // n_heads
    theta, scaling = _rope(values)
    window, window_from = _window(family, values, n_layers)
    return ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=need("intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        max_position=need("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=need("rms_norm_eps"),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
        sliding_from=window_from,
    )


def _rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ConfigError(f"rope_parameters {given!r} are not supported: one set for all layers is")
    theta = given.get("rope_theta", values.get("rope_theta"))
    theta = DEFAULT_THETA if theta is None else theta
    for options in (given, values):
        if options.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"partial_rotary_factor {options['partial_rotary_factor']!r} is not supported; supported: 1"
            )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    missing = [name for name in ("factor", "low_freq_factor", "high_freq_factor") if name not in given]
    if missing:
        raise ConfigError(f"rope type llama3 needs {', '.join(missing)}")
    places = (values, "original_"), (given, "original_"), (values, "")  # in the order in which Transformers looks
    lengths = [options.get(f"{prefix}max_position_embeddings") for options, prefix in places]
    original = next((length for length in lengths if length is not None), 0)
    return theta, RopeScaling(
        factor=given["factor"],
        low_freq_factor=given["low_freq_factor"],
        high_freq_factor=given["high_freq_factor"],
        original_max_position=original,
    )


def _window(family: str, values: dict[str, Any], n_layers: Any) -> tuple[int | None, int]:
    """Sliding window and the first block that it holds for."""
    window = values.get("sliding_window", DEFAULT_WINDOW)
    if family == "llama" or window is None or (family in QWEN and not values.get("use_sliding_window", False)):
        return None, 0
    first = 0
    if family in QWEN:
        if values.get("layer_types") is None and values.get("max_window_layers") is None:
            raise ConfigError("use_sliding_window needs layer_types or max_window_layers")
        first = values.get("max_window_layers") or 0
    kinds = values.get("layer_types")
    if kinds is not None:
        first = sum(kind == "full_attention" for kind in kinds)
        if (
            list(kinds) != ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first)
            or len(kinds) != n_layers
        ):
            raise ConfigError(
                f"layer_types {kinds} are not supported; supported: full_attention in the first blocks, "
                f"sliding_attention in the others, {n_layers} in all"
            )
        if family == "mistral" and first:
            raise ConfigError("layer_types with full_attention are not supported for mistral")
    return (None, 0) if first >= n_layers else (window, first)


def family_of(config: ModelConfig) -> str:
    """The family whose models have this configuration. Raises `ConfigError` when there is none."""
    if config.attention_bias and config.qk_norm:
        raise ConfigError("no Hugging Face family has both attention_bias and qk_norm")
    if config.attention_bias or config.qk_norm:
        return "qwen2" if config.attention_bias else "qwen3"
    if config.sliding_from:
        raise ConfigError("no Hugging Face family has sliding_from with neither attention_bias nor qk_norm")
    return "llama" if config.sliding_window is None else "mistral"


def write_config(folder: Path, config: ModelConfig, **more: Any) -> None:
    """Write `config.json` for this model, with `more` options. Raises `ConfigError` when no family has such a model."""
    (folder / CONFIG_FILE).write_text(json.dumps({**to_huggingface(config), **more}, indent=1) + "\n")


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` for this model, in the form that Transformers 4 and 5 read.

    Raises:
        ConfigError: no family has such a model.
    """
    family = family_of(config)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    if family == "mistral":
        values["sliding_window"] = config.sliding_window
    if family in QWEN:
        values["use_sliding_window"] = config.sliding_window is not None
        values["sliding_window"] = config.sliding_window
        values["max_window_layers"] = config.sliding_from if config.sliding_window is not None else config.n_layers
    return values
