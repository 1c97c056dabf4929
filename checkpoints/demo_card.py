"""The demo model's card, written from its metrics, so that a retrained model describes itself."""

from __future__ import annotations

from pathlib import Path

from eejax.core import ModelConfig
from eejax.schedule import HEADS_FILE, load_length_heads

ATTRIBUTION = (
    "OpenAssistant Conversations (OASST1), LAION and contributors, Apache-2.0. English text via TurkuNLP/oasst-fi. "
    "Modified: filtered; train prompt/reply pairs inferred.",
    "GSM8K, Copyright (c) 2021 OpenAI, MIT. Modified: calculator marks removed.",
    "Instruction data from LLMs-from-scratch, Sebastian Raschka, Apache-2.0.",
    "tldr-pages, Copyright (c) 2014-present the tldr-pages team and contributors, CC BY 4.0. "
    "Modified: turned into question/answer form.",
)

SETS = {
    "oasst1_en": ("OASST1 English, through TurkuNLP/oasst-fi", "Apache-2.0", "training"),
    "gsm8k": ("openai/grade-school-math", "MIT", "training"),
    "simple_instructions": ("rasbt/LLMs-from-scratch, instruction-data.json", "Apache-2.0", "training"),
    "tldr": ("tldr-pages/tldr, pages/common", "CC BY 4.0", "training"),
    "oasst1_en_messages": (
        "OASST1 English messages as plain text, through TurkuNLP/oasst-fi",
        "Apache-2.0",
        "training",
    ),
    "dolly": ("databricks-dolly-15k, through TurkuNLP/dolly-fi", "CC BY-SA 3.0", "measured only, never trained on"),
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(at: dict[str, float]) -> str:
    return f"{at['agreement']:.1%} of {at['share']:.0%}" if at["share"] else "none"


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _lengths(folder: Path, model: ModelConfig) -> str:
    """What is to be said of length heads, where `eejax train-length` has made some."""
    heads = load_length_heads(folder, model)
    if heads is None:
        return ""
    return f"""## Length heads

`{HEADS_FILE}` predicts how long an answer will be, from the n-grams of the prompt and from its last
hidden state. It was fitted by `eejax train-length` to the lengths of the model's own answers to
{heads.about["training_prompts"]} prompts of the train splits of the instruction sets, sampled at several temperatures.

"""


def _tuning(metrics: dict, points: list[str]) -> str:
    """What is to be said of the tuning, where `checkpoints/tune_demo.py` has been at work."""
    if "tuning" not in metrics:
        return ""
    t = metrics["tuning"]
    stages = [
        [s["name"], f"{s['steps']:,}", f"{s['tokens']:,}", f"{s['minutes']:g}", f"{s['peak_rate']:g}",
         ", ".join(f"{weight:g}" for weight in s["exit_weights"]), f"{s['keep']:.0%}"]
        for s in t["stages"]
    ]  # fmt: skip
    before, after = t["before"], {"evaluation": metrics["evaluation"], "own_answers": t["own_answers"]}
    effect = []
    for name in (*metrics["evaluation"], "own answers"):
        pair = [of["own_answers"] if name == "own answers" else of["evaluation"][name] for of in (before, after)]
        if None not in pair:
            bits = " → ".join(f"{of['exits'][points[-1]]['bits_per_byte']:.3f}" for of in pair)
            agree = [" → ".join(f"{of['exits'][p]['at_0']['agreement']:.1%}" for of in pair) for p in points[:-1]]
            effect.append([name, "" if name == "own answers" else bits, *agree])
    has_own = effect[-1][0] == "own answers"
    own = "; own answers are each model's own to\nquestions of that split" if has_own else ""
    cores = f", {t['cores']} cores" if t["cores"] else ""
    return f"""## Tuning

All weights were then tuned with `checkpoints/tune_demo.py` so that early exit pays. Tokens exited early in the
training's own forward pass, which teaches the blocks above to read K and V of frozen states; and half of the batches
were the model's own greedy answers to {t["answers"]:,} prompts of the train splits, from which the exits learnt what
full depth chooses.

{_table(["stage", "steps", "tokens", "minutes", "peak rate", "exit weights", "share kept"], stages)}

{t["dtype"]} products, on {t["device"]}{cores}. "Share kept": a stage ends with a weighted mean of the weights
that it learnt (this share) and those before tuning (the rest). What tuning changed: bits per byte of the last
block, and how often an exit's most likely token is that of the last block, on the {metrics["split"]} split{own}.

{_table(["set", f"exit {points[-1]}, bits per byte", *(f"exit {p}, agreement" for p in points[:-1])], effect)}

"""


def _quality(metrics: dict, points: list[str]) -> str:
    """Tables of quality at each exit, and of agreement with full depth."""
    script = f"`checkpoints/{'tune' if 'tuning' in metrics else 'train'}_demo.py`"
    evaluation, split, early = metrics["evaluation"], metrics["split"], points[:-1]
    bits = [
        [name, SETS[name][2], *(f"{of['exits'][p]['bits_per_byte']:.3f}" for p in points), f"{of['bytes']:,}"]
        for name, of in evaluation.items()
    ]
    agreement = [
        [name, *(f"{of['exits'][p]['at_0']['agreement']:.1%}" for p in early),
         *(_share(of["exits"][p][f"at_{c}"]) for c in ("0.8", "0.9") for p in early)]
        for name, of in evaluation.items()
    ]  # fmt: skip
    agreement_head = [
        "set",
        *(f"exit {p}" for p in early),
        *(f"exit {p} at {c}" for c in ("0.8", "0.9") for p in early),
    ]
    return f"""## Quality at each exit

Bits per byte on the {split} split, lower is better. Only answers are scored, given their questions; plain text is
scored whole.

{_table(["set", "role", *(f"exit {p}" for p in points), "bytes"], bits)}

## Agreement with full depth

How often the most likely token of an exit is that of the last block; then the same among the tokens whose top
probability at that exit reaches 0.8 and 0.9, and what share of all tokens that is. Teacher-forced, on the {split}
split.

{_table(agreement_head, agreement)}

The figures on quality and agreement were written by {script} from `metrics.json`.
"""


def card(folder: Path, metrics: dict) -> str:
    """Markdown text for the checkpoint in `folder`; `metrics` is what its `metrics.json` holds."""
    m, t = metrics["model"], metrics["training"]
    points = [str(layer) for layer in (*m["exits"]["layers"], m["n_layers"])]
    early = points[:-1]
    sources = [[name, *SETS[name]] for name in metrics["evaluation"]]
    cores = f", {t['cores']} cores" if t["cores"] else ""
    weights = ", ".join(f"{weight:g} after block {p}" for weight, p in zip(t["exit_weights"], points, strict=True))
    tuned = "tuning" in metrics
    origin = "`checkpoints/train_demo.py`" + (", then tuned with `checkpoints/tune_demo.py`," if tuned else "")
    others = ", so that any block can serve as an exit"
    if m["exits"].get("probes"):
        others += ";\nthose listed have a linear probe of their own (`classifier`)"
    unfinished = "" if metrics["finished"] else "\n**Training was not finished when this copy was written.**\n"
    return f"""# eejax demo model
{unfinished}
A language model of {metrics["parameters"] / 1e6:.1f} million parameters whose tokens may exit
after blocks {", ".join(early)} of {m["n_layers"]}. It exists to show and to test early exit in eejax with real, trained
exits. It was trained from scratch with {origin} and knows very little.

## Use

Meant for demonstrations, tests and benchmarks of eejax. **Its answers are often wrong**, made up, or nonsense:
trust neither its arithmetic nor its facts, and run no command that it writes. English only; no safety training.
Prompts follow the chat template in `tokenizer_config.json`; answers end with `</s>`. It was trained on texts of up to
{t["length"]} tokens.

## Architecture

Llama-family decoder: {m["n_layers"]} blocks, hidden size {m["hidden_size"]}, MLP {m["intermediate_size"]},
{m["n_heads"]} query and {m["n_kv_heads"]} key/value heads of {m["head_dim"]}, a vocabulary of {m["vocab_size"]:,}
(sentencepiece BPE with byte fallback), tied embedding. Exits read the model's own final norm and output matrix
(`{m["exits"]["head"]}` head){others}. Weights are bfloat16; weights and tokenizer
together take {_megabytes(folder):.1f} MB.

## Data

{_table(["set", "from", "licence", "used for"], sources)}

Training used the train splits only. Attribution:

{chr(10).join(f"* {line}" for line in ATTRIBUTION)}

## Training

{t["tokens"]:,} tokens in {t["steps"]:,} steps of {t["rows"]} rows of {t["length"]} tokens, {t["minutes"]:g} minutes on
{t["device"]}{cores}, {t["tokens_per_second"]:,} tokens/s; {t["dtype"]} products, float32 parameters. The run stopped in
round {t["rounds"] + 1}; a round is all instruct examples and {t["lm_share"]:.0%} of the plain-text messages. Muon for
the matrices of the blocks, AdamW for the rest; linear warm-up, then a linear decay to zero.

Joint loss over the exits, weighted {weights}. The target of an early exit is partly the next token
and partly, by a weight of {t["distill"]:.0%}, the last exit's distribution, which raises agreement with full depth.
Tokens of questions count {t["prompt_weight"]:g}, tokens of answers and of plain text 1.

{_tuning(metrics, points)}{_lengths(folder, ModelConfig.from_dict(m))}{_quality(metrics, points)}"""


def write_card(folder: Path, metrics: dict) -> None:
    """Write `README.md` beside the weights."""
    (folder / "README.md").write_text(card(folder, metrics))
