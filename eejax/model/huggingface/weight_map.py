"""Which tensors of a Hugging Face model make up which parameter: one table per family, read in both directions.

A parameter is its tensors concatenated along axis 0, all of the same size: K above V, gate above up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eejax.core import CheckpointError, ModelConfig
from eejax.model.huggingface.config import family_of
from eejax.model.huggingface.tensors import TensorFiles
from eejax.model.param_tree import LazyArray, compare, shapes
from eejax.model.transformer import param_shapes

type Table = Mapping[str, tuple[str, ...]]
"""Tensor names by parameter; `{}` stands for a block's number, from 0."""

LAYER = "model.layers.{}."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

LLAMA: Table = {
    "embedding": (EMBEDDING,),
    "blocks.{}.attn_norm": (LAYER + "input_layernorm.weight",),
    "blocks.{}.wq": (LAYER + "self_attn.q_proj.weight",),
    "blocks.{}.wkv": (LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"),
    "blocks.{}.wo": (LAYER + "self_attn.o_proj.weight",),
    "blocks.{}.mlp_norm": (LAYER + "post_attention_layernorm.weight",),
    "blocks.{}.mlp.gate_up": (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
    "blocks.{}.mlp.down": (LAYER + "mlp.down_proj.weight",),
    "norm": ("model.norm.weight",),
    "output": (OUTPUT,),
}
BIASES: Table = {
    "blocks.{}.bq": (LAYER + "self_attn.q_proj.bias",),
    "blocks.{}.bkv": (LAYER + "self_attn.k_proj.bias", LAYER + "self_attn.v_proj.bias"),
}
QK_NORMS: Table = {
    "blocks.{}.q_norm": (LAYER + "self_attn.q_norm.weight",),
    "blocks.{}.k_norm": (LAYER + "self_attn.k_norm.weight",),
}
FAMILIES: Mapping[str, Table] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": {**LLAMA, **BIASES},
    "qwen3": {**LLAMA, **QK_NORMS},
}
IGNORED = "rotary_emb.inv_freq"
"""Old Llama files store the rotary frequencies, which follow from the configuration."""


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Tensors of each parameter of the model without its exits."""
    table = FAMILIES[family_of(config)]
    found: dict[str, tuple[str, ...]] = {}
    for leaf, tensors in table.items():
        for number in range(config.n_layers) if "{}" in leaf else (0,):
            found[leaf.format(number)] = tuple(tensor.format(number) for tensor in tensors)
    if config.tie_embeddings:
        del found["output"]
    return found


def read_leaves(config: ModelConfig, tensors: TensorFiles, where: str) -> dict[str, LazyArray]:
    """The parameters of a model without exits, by dotted name, each put together from its tensors when it is read.

    Args:
        where: what holds the tensors, for messages.

    Raises:
        CheckpointError: tensors are missing, extra or misshaped, or a tied model has an output matrix of its own; they
            are named.
    """
    names = tensor_names(config)
    wanted = {
        tensor: _part(shape, len(names[leaf]))
        for leaf, shape in shapes(param_shapes(config)).items()
        for tensor in names[leaf]
    }
    found = {name: shape for name, shape in tensors.shapes().items() if not name.endswith(IGNORED)}
    if config.tie_embeddings and OUTPUT in found and EMBEDDING in found:
        _check_tied(tensors)
        del found[OUTPUT]
    compare(where, wanted, found, {name: file.name for name, file in tensors.files.items()})
    return {leaf: stacked([tensors[name] for name in parts]) for leaf, parts in names.items()}


def write_leaves(config: ModelConfig, leaves: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Inverse of `read_leaves`: the tensors of the parameters, in the order of a Hugging Face model."""
    found: dict[str, LazyArray] = {}
    for leaf, names in tensor_names(config).items():
        shape = _part(leaves[leaf].shape, len(names))
        for number, name in enumerate(names):
            found[name] = _rows(leaves[leaf], number * shape[0], shape)
    return found


def stacked(parts: list[LazyArray]) -> LazyArray:
    """Arrays concatenated along axis 0; float32 where they differ in dtype."""
    if len(parts) == 1:
        return parts[0]
    same = len({part.dtype for part in parts}) == 1
    dtype = parts[0].dtype if same else np.dtype(np.float32)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyArray(shape, dtype, lambda: np.concatenate([part.read().astype(dtype, copy=False) for part in parts]))


def _rows(array: LazyArray, start: int, shape: tuple[int, ...]) -> LazyArray:
    return LazyArray(shape, array.dtype, lambda: array.read()[start : start + shape[0]])


def _part(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    return (shape[0] // count, *shape[1:])


def _check_tied(tensors: TensorFiles) -> None:
    a, b = tensors[EMBEDDING], tensors[OUTPUT]
    if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(a.read().view(np.uint8), b.read().view(np.uint8)):
        raise CheckpointError(
            f"{tensors.files[OUTPUT]}: {OUTPUT} differs from {EMBEDDING}, yet config.json says tie_word_embeddings"
        )
