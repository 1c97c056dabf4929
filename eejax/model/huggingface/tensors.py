"""Tensors of safetensors files, read one at a time; pickled files are refused, never opened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from eejax.core import CheckpointError
from eejax.model.param_tree import LazyArray

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ALIGNMENT = 8
JAX_ALIGNMENT = 64
"""Alignment of an array in memory that JAX on CPU need not copy."""
PIECE_BYTES = 16 * 2**20
"""Bytes of a file that are mapped at a time."""


class TensorFiles:
    """Named tensors in safetensors files. Opening reads the headers only.

    Attributes:
        files: file of each tensor, by tensor name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: dict[str, Path] = {}
        self._arrays: dict[str, LazyArray] = {}
        for file in files:
            with _opened(file) as source:
                for name in source.keys():  # noqa: SIM118  (no mapping)
                    if name in self.files:
                        raise CheckpointError(f"{name} lies in {self.files[name]} and again in {file}")
                    self.files[name] = file
                    self._arrays[name] = _lazy(file, name, source.get_slice(name))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __getitem__(self, name: str) -> LazyArray:
        return self._arrays[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: array.shape for name, array in self._arrays.items()}


def open_folder(folder: Path) -> TensorFiles:
    """The tensors of a Hugging Face folder: one file, or those that its index names.

    Raises:
        CheckpointError: there are none, or only pickled ones; a file is missing, truncated or corrupt; the index names
            a file outside the folder, or another file than the one where a tensor lies.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(nothing_in(folder))
        return TensorFiles([folder / SINGLE_FILE])
    try:
        named = json.loads(index.read_bytes())["weight_map"]
        pairs = {str(tensor): str(file) for tensor, file in named.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no safetensors index with a weight_map: {error!r}") from error
    for tensor, file in pairs.items():
        # The hub's cache links files elsewhere, so a link is fine, and a path is not.
        if not file or file in (".", "..") or any(mark in file for mark in ("/", "\\", "\0")):
            raise CheckpointError(f"{index} puts {tensor} into {file!r}, which is not the name of a file in the folder")
    files = {name: folder / name for name in sorted(set(pairs.values()))}
    for name, file in files.items():
        if not file.exists():
            tensor = next(tensor for tensor, where in pairs.items() if where == name)
            raise CheckpointError(f"{file} is missing; {index.name} puts {tensor} there")
    tensors = TensorFiles(files.values())
    for tensor, file in pairs.items():
        if tensor not in tensors or tensors.files[tensor] != files[file]:
            raise CheckpointError(f"{files[file]} does not hold {tensor}, which {index.name} puts there")
    return tensors


def nothing_in(folder: Path) -> str:
    """The error message for a folder without safetensors."""
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds pickled weights only ({', '.join(pickled[:3])}): they are not opened, since unpickling "
            "runs whatever code they contain; save them as safetensors"
        )
    return f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def _lazy(file: Path, name: str, piece: Any) -> LazyArray:
    code = piece.get_dtype()
    if code not in DTYPES:
        raise CheckpointError(f"{file}: {name} is of type {code}; supported: {', '.join(DTYPES)}")
    shape, dtype = tuple(piece.get_shape()), DTYPES[code]

    def read() -> np.ndarray:
        # The file is mapped anew each time: what has been read of it does not stay resident.
        if math.prod(shape) * dtype.itemsize <= PIECE_BYTES:
            with _opened(file) as source:
                return source.get_tensor(name)
        whole = _aligned(shape, dtype)
        rows = max(1, PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        for start in range(0, shape[0], rows):
            here = slice(start, min(start + rows, shape[0]))
            with _opened(file) as source:
                whole[here] = source.get_slice(name)[here]
        return whole

    return LazyArray(shape, dtype, read)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX on CPU takes as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + JAX_ALIGNMENT, np.uint8)
    start = -room.ctypes.data % JAX_ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, "np") as source:
            yield source
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def write_file(path: Path, tensors: Mapping[str, LazyArray]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer wants them all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            np.ascontiguousarray(tensor.read()).view(np.uint8).tofile(file)


def write_folder(folder: Path, tensors: Mapping[str, LazyArray], max_shard_bytes: int) -> None:
    """Write tensors to one file, or to several of at most `max_shard_bytes` each (or one tensor) with an index."""
    shards: list[dict[str, LazyArray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0])
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
