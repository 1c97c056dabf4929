"""What a start says of itself, and programs that a second one finds as files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from rich.progress import Progress
from rich.status import Status

from eejax import LLM, SamplingParams
from eejax.cli import terminal as command_line
from eejax.cli.terminal import begun, status, summary
from eejax.core import CacheConfig, EngineConfig, Stage, announce, heard
from eejax.device import programs
from eejax.device.programs import Compiled, ProgramFiles, use_compilation_cache
from tests.cases import random_model

PROMPT = {"prompt_token_ids": [1, 2, 3]}


def lowering(factor: float) -> Callable[[], jax.stages.Lowered]:
    return lambda: jax.jit(lambda x: {"out": x * factor}, donate_argnums=0).lower(jnp.zeros(3))


def never() -> jax.stages.Lowered:
    raise AssertionError("traced")


def files(folder: Path, model: str = "m") -> ProgramFiles:
    return ProgramFiles(folder, model, jax.devices()[0])


def of(compiled: Compiled, lower: Callable[[], jax.stages.Lowered]) -> tuple[list[str], jax.stages.Compiled]:
    """What was said while a program was made ready, without the times, and the program."""
    said: list[Stage] = []
    with heard(said.append):
        program = compiled.get("decode", 32, lower)
    return [str(stage).split(" in ")[0] for stage in said], program


COMPILED = ["compiling decode for 32 rows", "decode for 32 rows: compiled"]
KNOWN = ["compiling decode for 32 rows", "decode for 32 rows: from the cache"]  # known when its text is
FILE = ["loading decode for 32 rows", "decode for 32 rows: from the cache"]


def test_programs_say_where_they_come_from(tmp_path: Path) -> None:
    use_compilation_cache()
    first, second = Compiled(), Compiled()
    assert of(first, lowering(1.25))[0] == COMPILED
    assert of(first, never)[0] == []
    assert of(second, lowering(1.25))[0] == KNOWN
    assert (first.compilations, second.compilations) == (1, 0)
    assert of(Compiled(files(tmp_path)), lowering(1.25))[0] == KNOWN
    assert list(tmp_path.iterdir()) == []  # what JAX's cache gave cannot be written again
    assert of(Compiled(files(tmp_path)), lowering(1.75))[0] == COMPILED
    # Other sources that come to the same program: it is found by its text, and then without.
    assert of(Compiled(files(tmp_path, "other")), lowering(1.75))[0] == KNOWN
    said, program = of(Compiled(files(tmp_path, "other")), never)
    x = jnp.arange(3.0)
    assert program(x)["out"].tolist() == [0, 1.75, 3.5]
    assert x.is_deleted()  # donated, as it was compiled
    assert said == FILE


def test_files_are_for_what_they_were_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = files(tmp_path)
    found = {
        one.path(("decode", 4, "")),
        one.path(("decode", 8, "")),
        one.path(("prefill", 4, "")),
        files(tmp_path, "n").path(("decode", 4, "")),
    }
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    found.add(one.path(("decode", 4, "")))
    with jax.default_matmul_precision("highest"):
        found.add(one.path(("decode", 4, "")))
    assert len(found) == 6
    model, params = random_model("mqa", n_layers=2)
    params = jax.tree.map(jnp.asarray, params)
    config = EngineConfig(model=model, cache=CacheConfig(num_pages=2, page_size=8), max_model_len=16)
    made = [ProgramFiles.of(config, params, kernels) for kernels in ("a", "a", "b")]
    wider = ProgramFiles.of(config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), "a")
    assert made[0] == made[1]
    assert len({one and one.model for one in (*made, wider)}) == 3
    monkeypatch.setenv("EEJAX_CACHE_DIR", "off")
    assert ProgramFiles.of(config, params, "a") is None


def test_a_program_is_for_the_shapes_of_arguments_that_it_does_not_read(tmp_path: Path) -> None:
    """Its text does not show them: a model without exits and one with two have the same prefill, say."""
    use_compilation_cache()

    def lower(unread: int) -> Callable[[], jax.stages.Lowered]:
        arguments = jnp.zeros((unread, 4)), jnp.zeros(3)
        return lambda: jax.jit(lambda _, x: {"out": x * 7.75}).lower(*arguments)

    assert of(Compiled(files(tmp_path, "none")), lower(0))[0] == COMPILED
    _, program = of(Compiled(files(tmp_path, "two")), lower(2))
    program(jnp.zeros((2, 4)), jnp.zeros(3))
    _, program = of(Compiled(files(tmp_path, "two")), lower(2))
    program(jnp.zeros((2, 4)), jnp.zeros(3))


def test_unused_memory_goes_back_to_the_system_after_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(programs, "_malloc_trim", lambda: trims.append)
    compiled = Compiled(files(tmp_path))
    for _ in range(3):
        compiled.get("decode", 1, lowering(2))
    assert trims == [0]
    Compiled(files(tmp_path)).get("decode", 1, never)
    assert trims == [0, 0]


def test_a_damaged_file_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    use_compilation_cache()
    of(Compiled(files(tmp_path)), lowering(1.5))
    file = files(tmp_path).path(("decode", 32, ""))
    for one in tmp_path.iterdir():
        one.write_bytes(one.read_bytes()[:-40])
    assert of(Compiled(files(tmp_path)), lowering(2.5))[0] == [FILE[0], *COMPILED]
    assert str(file) in caplog.text
    assert of(Compiled(files(tmp_path)), never)[0] == FILE
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
    blocked = tmp_path / "no folder"
    blocked.write_text("")
    assert of(Compiled(files(blocked)), lowering(3.5))[0] == COMPILED  # what cannot be written is used all the same


def test_stages_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    stages = [
        Stage("weights", 0.62, program=False),
        Stage("decode for 1 row", 2.0, compiled=True),
        Stage("prefill", 1.04),
    ]
    assert summary(stages) == "weights 0.6 s, programs 3.0 s (1 compiled, 1 from the cache)"
    assert summary([Stage("weights", program=False)]) == ""
    with caplog.at_level(logging.INFO, "eejax"):
        announce(stages[1])
    assert caplog.messages == ["decode for 1 row: compiled in 2.00 s"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What status lines and progress bars were told to show."""
    texts: list[str] = []
    update, advance = Status.update, Progress.update

    def of_status(self: Status, text: str) -> None:
        texts.append(text)
        update(self, text)

    def of_bar(self: Progress, task, **fields) -> None:
        texts.extend([fields["description"]] if "description" in fields else [])
        advance(self, task, **fields)

    monkeypatch.setattr(Status, "update", of_status)
    monkeypatch.setattr(Progress, "update", of_bar)
    return texts


def tiny() -> LLM:
    model, params = random_model("mqa", n_layers=2)
    return LLM.from_params(model, params, max_model_len=16, max_num_seqs=2, page_size=8)


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_said_but_to_a_terminal(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "Console", functools.partial(Console, force_terminal=terminal))
    with status("at work") as done:
        announce(Stage("decode for 2 rows", compiled=True))
        announce(Stage("decode for 2 rows", 1.0, compiled=True))
        announce(Stage("weights", program=False))
    assert [str(stage) for stage in done] == ["decode for 2 rows: compiled in 1.00 s"]
    found = capsys.readouterr()
    assert found.out == ""
    assert ("loading weights" in found.err) == terminal
    assert bool(found.err) == terminal


def test_a_stream_compiles_before_its_first_text(shown: list[str]) -> None:
    llm, stages = tiny(), []
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=5))
    deltas = begun(stream, lambda: llm.engine.runner.decode_program(1), stages)
    assert [stage.what for stage in stages] == ["decode for 1 row", "prefill for 16 tokens"]
    assert [text.partition(" ")[2] for text in shown[::2]] == [stage.what for stage in stages]
    later: list[Stage] = []
    with heard(later.append):
        tokens = [token for delta in deltas for token in delta.token_ids]
    assert later == []
    assert len(tokens) == 5


def test_the_progress_bar_says_what_is_waited_for(shown: list[str]) -> None:
    tiny().generate([PROMPT] * 2, SamplingParams(max_tokens=2), use_tqdm=True)
    assert [text.partition(" ")[2] for text in shown[::2]] == ["prefill for 16 tokens", "decode for 2 rows"]
    assert set(shown[1::2]) == {"answering"}
