"""The command line, over a tiny random checkpoint: what it prints, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.cli import app as cli
from eejax.cli import demo
from eejax.core import EngineOptions, ExitConfig, ModelConfig
from eejax.core.request import CompletionOutput
from eejax.model.transformer import init_params
from eejax.model.weights import WEIGHTS_DIR
from eejax.model.weights_writer import save_checkpoint
from eejax.text.prompts import read_prompts
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE
from tests.tokenizer_cases import train_sentencepiece

LAYERS = 4
EXITS = (1, 3)
PROMPT = "list the files"
TEMPLATE = "{{ bos_token }}{% for message in messages %}<q>{{ message['content'] }}<a>{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a sentencepiece tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tokenizer, vocabulary = train_sentencepiece(
        ["list the files in a folder", "how do I copy one file", "three plus four is seven"] * 9,
        320,
        user_defined_symbols=["<q>", "<a>"],
    )
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        n_layers=LAYERS,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_position=128,
        exits=ExitConfig(EXITS),
    )
    # Far above the usual scale: the exits disagree, and their confidences spread over (0, 1).
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, init_params(config, seed=3))
    params["output"] *= 3
    save_checkpoint(folder, config, params)
    (folder / MODEL_FILE).write_bytes(tokenizer)
    (folder / CONFIG_FILE).write_text(
        json.dumps({"chat_template": TEMPLATE, "additional_special_tokens": ["<q>", "<a>"]})
    )
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, max_num_seqs=2)


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], input=stdin)


def answers(*arguments: object, stdin: str | None = None) -> list[dict]:
    """The lines of `generate --json`."""
    result = run("generate", *arguments, "--json", "--max-num-seqs", 2, stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def templated(llm: LLM, text: str) -> str:
    assert llm.tokenizer is not None
    return llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])


def test_help_does_not_import_jax() -> None:
    code = "import sys, eejax.cli.app; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for command in ("generate", "info", "demo"):
        assert run(command, "--help").exit_code == 0


def test_flags_carry_the_names_of_the_fields() -> None:
    flags = set(inspect.signature(cli.generate).parameters)
    sampling = {field.name for field in dataclasses.fields(SamplingParams)} - {"early_exit"}
    exits = {field.name for field in dataclasses.fields(EarlyExitParams)}
    engine = {field.name for field in dataclasses.fields(EngineOptions)} - {"length_predictor"}  # an object
    assert sampling | exits | engine <= flags


def test_answers_are_those_of_the_library(checkpoint: Path, llm: LLM) -> None:
    [found] = answers(checkpoint, PROMPT, "--max-tokens", 12, "--threshold", 0.5)
    params = SamplingParams(temperature=0.0, max_tokens=12, early_exit=EarlyExitParams(threshold=0.5))
    output = llm.generate([templated(llm, PROMPT)], params, use_tqdm=False)[0]
    assert found["prompt"] == PROMPT
    assert tuple(found["prompt_token_ids"]) == output.prompt_token_ids
    [one] = found["outputs"]
    assert (one["text"], tuple(one["token_ids"])) == (output.outputs[0].text, output.outputs[0].token_ids)
    assert tuple(one["exit_layers"]) == output.outputs[0].exit_layers
    assert len(set(one["exit_layers"])) > 1
    assert one["finish_reason"] == output.outputs[0].finish_reason
    plain = run("generate", checkpoint, PROMPT, "--max-tokens", 12, "--threshold", 0.5, "--max-num-seqs", 2)
    assert plain.stdout == output.outputs[0].text + "\n"
    [summary] = plain.stderr.splitlines()
    assert f"{len(one['token_ids'])} tokens" in summary
    assert re.search(r"programs \d+\.\d s \(0 compiled, 2 from the cache\)", summary)  # as before


def test_a_terminal_is_told_what_loading_took(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "Console", functools.partial(Console, force_terminal=True))
    result = run("generate", checkpoint, PROMPT, "--max-tokens", 1, "--max-num-seqs", 2)
    assert re.search(r"loaded in \d+\.\d s: weights \d+\.\d s, kernels and KV cache \d+\.\d s", result.stderr)
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        (["--threshold", "0"], {EXITS[0]}),
        (["--threshold", "2,0"], {EXITS[1]}),
        (["--threshold", "2"], {LAYERS}),
        (["--full-depth"], {LAYERS}),
        (["--threshold", "0", "--min-layers", "2"], {EXITS[1]}),
        (["--threshold", "0", "--exit-layers", "2"], {2}),
        (["--threshold", "0", "--measure", "margin"], {EXITS[0]}),
    ],
)
def test_exit_flags(checkpoint: Path, flags: list[str], layers: set[int]) -> None:
    [found] = answers(checkpoint, PROMPT, "--max-tokens", 8, "--ignore-eos", *flags)
    first, *others = found["outputs"][0]["exit_layers"]
    assert first == LAYERS
    assert set(others) == layers


def test_tau_makes_the_threshold_decay() -> None:
    found = cli.early_exit_params({"threshold": "0.8,0.6", "measure": "margin", "tau": 2.0, "min_layers": 3})
    assert found is not None
    assert (found.threshold.value, found.threshold.tau) == ((0.8, 0.6), 2.0)  # pyright: ignore[reportAttributeAccessIssue]
    assert (found.measure, found.min_layers) == ("margin", 3)


def test_sampling_flags_reach_the_request(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []
    generate = LLM.generate

    def spy(self: LLM, prompts: list[str], params: SamplingParams, **options: bool) -> list:
        seen.append(params)
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", spy)
    flags = ["--n", 2, "--temperature", 0.7, "--top-p", 0.9, "--top-k", 5, "--min-p", 0.01, "--max-tokens", 3]
    flags += ["--stop", "x", "--stop", "yz", "--stop-token-ids", "7,9", "--ignore-eos", "--seed", 11, "--logprobs", 2]
    [found] = answers(checkpoint, PROMPT, *flags)
    assert seen == [
        SamplingParams(2, 0.7, 0.9, 5, 0.01, 3, ("x", "yz"), (7, 9), True, 11, 2, early_exit=EarlyExitParams())
    ]
    assert len(found["outputs"]) == 2
    assert all(len(step) >= 2 for one in found["outputs"] for step in one["logprobs"])


def test_prompts_from_file_and_stdin(checkpoint: Path, tmp_path: Path) -> None:
    texts, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    texts.write_text("one\n\ntwo\n")
    objects.write_text('{"prompt": "one"}\n{"instruction": "two", "input": "more"}\n')
    few = ("--max-tokens", 2)
    assert [one["prompt"] for one in answers(checkpoint, "--file", texts, *few)] == ["one", "two"]
    assert [one["prompt"] for one in answers(checkpoint, "--file", objects, *few)] == ["one", "two\n\nmore"]
    assert [one["prompt"] for one in answers(checkpoint, *few, stdin="one\ntwo\n")] == ["one\ntwo"]


def test_raw_leaves_the_template_out(checkpoint: Path, llm: LLM) -> None:
    [raw], [chat] = (answers(checkpoint, PROMPT, "--max-tokens", 1, *flags) for flags in (["--raw"], []))
    assert llm.tokenizer is not None
    assert raw["prompt_token_ids"] == llm.tokenizer.encode(PROMPT)
    assert chat["prompt_token_ids"] == llm.tokenizer.encode(f"<q>{PROMPT}<a>")


def test_stream_says_the_same(checkpoint: Path) -> None:
    flags = (checkpoint, PROMPT, "--max-tokens", 40, "--threshold", 0.4)
    [whole] = answers(*flags)
    streamed = run("generate", *flags, "--stream")
    assert streamed.exit_code == 0
    assert streamed.stdout == whole["outputs"][0]["text"] + "\n"
    deltas = [json.loads(line) for line in run("generate", *flags, "--stream", "--json").stdout.splitlines()]
    assert len(deltas) > 1
    assert [token for delta in deltas for token in delta["token_ids"]] == whole["outputs"][0]["token_ids"]
    assert [layer for delta in deltas for layer in delta["exit_layers"]] == whole["outputs"][0]["exit_layers"]
    assert deltas[-1]["finish_reason"] == whole["outputs"][0]["finish_reason"]


def refused(result: Result, *parts: str) -> None:
    """One line on stderr that names what was wrong, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--threshold", "0.5,0.6,0.7"], ["3 thresholds", "[1, 3]"]),
        (["--threshold", "high"], ["--threshold", "'high'"]),
        (["--threshold", "nan"], ["threshold", "nan"]),
        (["--threshold", "-1"], ["threshold", "-1"]),
        (["--measure", "guess"], ["measure", "softmax", "'guess'"]),
        (["--exit-layers", "1,9"], ["9", "1 to 3"]),
        (["--exit-layers", "one"], ["--exit-layers", "'one'"]),
        (["--min-layers", "5"], ["min_layers 5", "4 blocks"]),
        (["--full-depth", "--threshold", "0.5", "--tau", "1"], ["--full-depth", "--threshold, --tau"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-p", "0"], ["top_p", "0"]),
        (["--max-tokens", "0"], ["max_tokens", "0"]),
        (["--stop-token-ids", "5,x"], ["--stop-token-ids", "'5,x'"]),
        (["--stop-token-ids", "99999"], ["99999", "vocabulary"]),
        (["--dtype", "int8"], ["dtype", "'int8'", "float32"]),
        (["--max-model-len", "4096"], ["4096", "128"]),
        (["--page-size", "0"], ["page_size", "0"]),
        (["--num-pages", "1"], ["pages", "1"]),
        (["--stream", "--n", "2"], ["--n", "2"]),
        (["--logprobs", "2"], ["--logprobs", "--json"]),
        (["--file", "no/such/file"], ["--file"]),
    ],
)
def test_bad_flags(checkpoint: Path, flags: list[str], parts: list[str]) -> None:
    refused(run("generate", checkpoint, PROMPT, *flags), *parts)


def test_bad_prompt_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    refused(run("generate", checkpoint, "--file", file), f"{file}, line 2", '{"text": "two"}')
    file.write_text("\n")
    refused(run("generate", checkpoint, "--file", file), "0 prompts")
    refused(run("generate", checkpoint, "--file", tmp_path / "none.txt"), "none.txt")
    refused(run("generate", checkpoint, stdin=" \n"), "stdin")


def test_unknown_option_names_it() -> None:
    result = run("generate", "somewhere", "--treshold", "0.5")
    assert result.exit_code == 2
    assert "--treshold" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["generate", "info", "demo"])
def test_unusable_checkpoints(command: str, broken: Path) -> None:
    more = [PROMPT] if command == "generate" else []
    refused(run(command, broken.with_name("nowhere"), *more), "nowhere")
    (broken / MODEL_FILE).write_bytes(b"not a model")
    refused(run(command, broken, *more), MODEL_FILE, "sentencepiece")
    (broken / MODEL_FILE).unlink()
    refused(run(command, broken, *more), MODEL_FILE)


def test_info_names_leaves_that_are_missing(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "n_layers": LAYERS + 1}))
    refused(run("info", broken), "missing", "blocks.4")
    (broken / "config.json").write_text(json.dumps({**config, "layers": 7}))
    refused(run("info", broken), "config.json", "no option layers")
    (broken / "config.json").write_text(json.dumps(config))
    shutil.rmtree(broken / WEIGHTS_DIR)
    refused(run("info", broken), WEIGHTS_DIR)


def test_a_bad_prompt_leaves_the_others_unharmed(checkpoint: Path, tmp_path: Path) -> None:
    long = "files " * 200
    result = run("generate", checkpoint, PROMPT, long, "--max-tokens", 4, "--json")
    assert result.exit_code == 2
    good, bad = (json.loads(line) for line in result.stdout.splitlines())
    assert len(good["outputs"][0]["token_ids"]) == 4
    assert good["error"] is None
    assert (bad["outputs"], "128" in bad["error"]) == ([], True)
    assert result.stderr.splitlines()[0].startswith("error: prompt 2: the prompt has")
    assert "4 tokens" in result.stderr.splitlines()[1]
    streamed = run("generate", checkpoint, long, PROMPT, "--max-tokens", 4, "--stream")
    assert streamed.exit_code == 2
    assert streamed.stderr.splitlines()[0].startswith("error: prompt 1: the prompt has")
    assert "--- prompt 2" in streamed.stdout


def test_interruption_is_quiet(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    result = run("generate", checkpoint, PROMPT)
    assert (result.exit_code, result.stderr.strip()) == (130, "interrupted")


def test_info(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("info", checkpoint, "--json", "--page-size", 16, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["exit_layers"] == list(EXITS)
    assert found["exit_head"] == "shared"
    # A block: 2 norms, Q, O, K and V, an MLP of three matrices; asking an exit: the final norm and the output matrix.
    model = found["model"]
    hidden, queries = model["hidden_size"], model["n_heads"] * model["head_dim"]
    kv = 2 * model["n_kv_heads"] * model["head_dim"]
    block = hidden * (2 + 2 * queries + kv + 3 * model["intermediate_size"])
    assert found["exit_costs"] == [
        {
            "layer": layer,
            "blocks": pytest.approx(hidden * (model["vocab_size"] + 1) / block),
            "blocks_without_logits": pytest.approx(hidden / block),
        }
        for layer in EXITS
    ]
    assert found["parameters"] == sum(found["parameters_by_part"].values()) + 32  # and the last norm
    assert (found["stored_dtype"], found["served_dtype"]) == ("float32", "bfloat16")
    assert found["served_bytes"] == 2 * found["parameters"]
    # K and V, 4 blocks, 2 heads of 8, 16 tokens, 2 bytes each
    assert found["kv_page"]["bytes"] == 2 * 4 * 2 * 8 * 16 * 2
    assert found["kv_page"]["bytes_longest_sequence"] == 8 * found["kv_page"]["bytes"]
    assert found["tokenizer"]["chat_template"] is True
    assert {name: choice["implementation"] for name, choice in found["kernels"].items()} == {
        "paged_attention": "xla",
        "kv_fill": "xla",
    }
    table = run("info", checkpoint)
    assert table.exit_code == 0
    assert "1, 3, shared heads" in table.stdout
    assert f"{hidden * (model['vocab_size'] + 1) / block:.2f} after 1" in table.stdout
    refused(run("info", checkpoint, "--dtype", "int4"), "int4")
    refused(run("info", checkpoint, "--page-size", "0"), "page_size")
    monkeypatch.setenv("EEJAX_KERNELS", "cuda")
    refused(run("info", checkpoint), "EEJAX_KERNELS", "auto, mosaic, native, xla", "'cuda'")
    refused(run("generate", checkpoint, PROMPT), "EEJAX_KERNELS", "auto, mosaic, native, xla", "'cuda'")


def completion(*tokens: int) -> CompletionOutput:
    return CompletionOutput(0, "", tokens, None, tuple(LAYERS for _ in tokens), "stop")


def test_agreement_on_known_answers() -> None:
    full = [completion(1, 2, 3, 4), completion(5, 6)]
    early = [completion(1, 9, 3, 4, 7), completion(5, 6)]
    found = demo.agreement(full, early)
    assert found.same_place == pytest.approx(5 / 7)
    assert found.before_first_difference == pytest.approx(3 / 6)
    assert found.whole == 0.5
    assert demo.agreement(full, full) == demo.Agreement(1.0, 1.0, 1.0)
    # An answer that ends too early has lost the rest of the other.
    assert demo.agreement(full[:1], [completion(1, 2)]) == demo.Agreement(0.5, 0.5, 0.0)


def test_every_depth_has_its_own_shade() -> None:
    for exits in ((), (2,), (1, 2, 3)):
        model = ModelConfig(8, 8, 8, LAYERS, 1, 1, 8, exits=ExitConfig(exits))
        styles = demo.shades(model)
        assert set(styles) == {*exits, LAYERS}
        assert len({str(style) for style in styles.values()}) == len(exits) + 1


@pytest.mark.parametrize("colours", ["truecolor", None])
def test_shaded_stream_is_the_answer(llm: LLM, colours: str | None) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, early_exit=EarlyExitParams(threshold=0.4), ignore_eos=True)
    answer = llm.generate([templated(llm, PROMPT)], params, use_tqdm=False)[0].outputs[0]
    assert len(set(answer.exit_layers)) > 1
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=colours, width=40)  # pyright: ignore[reportArgumentType]
    layers = demo.stream_shaded(console, llm, templated(llm, PROMPT), params)
    assert tuple(layers) == answer.exit_layers
    shown = screen.getvalue()
    assert ("\x1b[" in shown) == (colours is not None)
    if colours is None:
        assert shown == answer.text + "\n"
    else:
        red, green, blue = demo.FIRST_SHADE
        assert f"48;2;{red};{green};{blue}m" in shown


def rows_of(stdout: str) -> dict[str, Sequence[str]]:
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if line.startswith("│")]
    return {name: values for name, *values in cells}


@pytest.mark.parametrize(("threshold", "skipped", "equal"), [("2", "0.0%", True), ("0", "75.0%", False)])
def test_demo_table(checkpoint: Path, tmp_path: Path, threshold: str, skipped: str, equal: bool) -> None:
    file = tmp_path / "p.txt"
    file.write_text("list the files\nthree plus four\n")
    flags = ("--file", file, "--threshold", threshold, "--max-tokens", 6, "--repeats", 1)
    result = run("demo", checkpoint, *flags)
    assert result.exit_code == 0, result.output
    assert "> three plus four" in result.stdout
    assert "\x1b[" not in result.stdout
    rows = rows_of(result.stdout)
    assert rows["share of blocks skipped"] == ["0.0%", skipped]
    assert (rows["tokens equal to full depth, by position"][1] == "100.0%") == equal
    assert rows["blocks run"][0] == str(LAYERS * int(rows["tokens decoded"][0]))


def test_demo_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "eejax" / "cli" / "demo.py"))
    refused(run("demo"), str(tmp_path / "checkpoints" / "demo"))


def test_the_projects_prompts() -> None:
    prompts = read_prompts(demo.DEMO_PROMPTS)
    assert len(prompts) == 12
    assert len(set(prompts)) == 12
