"""What a token is, written down a second time: the reference that eejax is judged by.

NumPy, one token at a time, one sequence at a time, no KV cache, no batch. It shares nothing with the package but the
configuration objects and the layout of the parameter tree; every formula is written out here again.

The whole state of a sequence is one matrix per block: the hidden states that entered this block, one row per position.
Whenever a block runs, it makes the keys and values of *all* positions anew from those. A token that left early enters
every higher block with the state it had when it left (CALM state propagation, arXiv 2207.07061): that is all there is
to "KV fill-in" here, so nothing can be filled in late, twice or not at all. An exit that owns a whole block (EE-LLM,
arXiv 2312.04916) has one matrix more: the states that came to it, or, of tokens that had left before, their last.

Computed in float64 unless asked otherwise, so that `Margins` are those of exact arithmetic: where they exceed 1e-4, a
float32 implementation has to make the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eejax.core import DecayingThreshold, EarlyExitParams, ModelConfig


@dataclass(frozen=True)
class Margins:
    """How far the closest decision of a run was from going the other way.

    logit: smallest difference of the two largest logits a token was chosen from.
    confidence: smallest distance of a confidence from the threshold it was held against.
    """

    logit: float = math.inf
    confidence: float = math.inf

    @property
    def smallest(self) -> float:
        return min(self.logit, self.confidence)


@dataclass(frozen=True)
class ReferenceResult:
    """An answer; `logprobs` are the natural log-probabilities of its tokens."""

    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    finish_reason: str
    margins: Margins
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Seen:
    """What a confidence is computed from, for the newest tokens at one exit point, one row each.

    before, behind: the states that entered the block before the exit, and that it put out; probe: log-odds.
    """

    logits: np.ndarray
    before: np.ndarray
    behind: np.ndarray
    probe: np.ndarray | None = None

    def at(self, row: int) -> Seen:
        return Seen(
            self.logits[row], self.before[row], self.behind[row], None if self.probe is None else self.probe[row]
        )


def float_tree(tree, dtype=np.float64):
    """The parameter tree with every leaf as a NumPy array of `dtype` (bfloat16 widens exactly)."""
    if isinstance(tree, dict):
        return {key: float_tree(value, dtype) for key, value in tree.items()}
    return np.asarray(tree).astype(dtype)


def rms_norm(weight, x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1.0 + np.exp(-x))


def swiglu(mlp, x):
    gate, up = np.split(x @ mlp["gate_up"].T, 2, axis=-1)
    return (silu(gate) * up) @ mlp["down"].T


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def frequencies(config: ModelConfig):
    """Rotary frequencies; with scaling, the three cases of Llama 3's own `apply_scaling`."""
    scaling, found = config.rope_scaling, []
    for i in range(config.head_dim // 2):
        freq = config.rope_theta ** (-2 * i / config.head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / freq
            if wavelength > scaling.original_max_position / scaling.low_freq_factor:
                freq = freq / scaling.factor
            elif wavelength >= scaling.original_max_position / scaling.high_freq_factor:
                smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                freq = (1 - smooth) * freq / scaling.factor + smooth * freq
        found.append(freq)
    return np.array(found)


def rotate(config: ModelConfig, x, positions):
    """Rotary embedding of `x [positions, heads, head_dim]` as a product of complex numbers; halves are the pairs."""
    half = config.head_dim // 2
    turn = np.exp(1j * np.outer(positions, frequencies(config)))[:, None, :]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype)


class Reference:
    """One sequence on its way through the model."""

    def __init__(self, config: ModelConfig, params: dict, dtype=np.float64) -> None:
        self.config = config
        self.params = float_tree(params, dtype)
        self.entering = [np.zeros((0, config.hidden_size), dtype) for _ in range(config.n_layers)]
        self.at_exit = {layer: np.zeros((0, config.hidden_size), dtype) for layer in config.exits.layers}

    @property
    def length(self) -> int:
        return len(self.entering[0])

    def queries(self, block, x, positions):
        config = self.config
        q = rms_norm(block["attn_norm"], x, config.norm_eps) @ block["wq"].T
        if config.attention_bias:
            q = q + block["bq"]
        q = q.reshape(len(x), config.n_heads, config.head_dim)
        if config.qk_norm:
            q = rms_norm(block["q_norm"], q, config.norm_eps)
        return rotate(config, q, positions)

    def keys_values(self, block, x):
        """K and V of positions 0, 1, … from the hidden states that entered this block there."""
        config = self.config
        kv = rms_norm(block["attn_norm"], x, config.norm_eps) @ block["wkv"].T
        if config.attention_bias:
            kv = kv + block["bkv"]
        kv = kv.reshape(len(x), 2, config.n_kv_heads, config.head_dim)
        k, v = kv[:, 0], kv[:, 1]
        if config.qk_norm:
            k = rms_norm(block["k_norm"], k, config.norm_eps)
        return rotate(config, k, np.arange(len(x))), v

    def run_block(self, index: int, x):
        """Block `index` on the newest positions `x [new, D]`. Returns its output and the residual before its MLP."""
        self.entering[index] = np.concatenate([self.entering[index], x])
        slides = self.config.sliding_window is not None and index >= self.config.sliding_from
        window = self.config.sliding_window if slides else math.inf
        return self.transform(self.params["blocks"][index], self.entering[index], len(x), window)

    def transform(self, block, states, new: int, window: float = math.inf):
        """A whole transformer layer on the last `new` of the states that entered it; each sees `window` positions."""
        config, x = self.config, states[len(states) - new :]
        k, v = self.keys_values(block, states)
        positions = np.arange(len(k) - new, len(k))
        q = self.queries(block, x, positions)
        distance = positions[:, None] - np.arange(len(k))
        group = config.n_heads // config.n_kv_heads
        heads = []
        for h in range(config.n_heads):
            scores = q[:, h] @ k[:, h // group].T / math.sqrt(config.head_dim)
            scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
            heads.append(softmax(scores) @ v[:, h // group])
        middle = x + np.concatenate(heads, axis=-1) @ block["wo"].T
        return middle + swiglu(block["mlp"], rms_norm(block["mlp_norm"], middle, config.norm_eps)), middle

    def see(self, layer: int, before, behind, middle) -> Seen:
        """After block `layer`, given what entered it, what came out, and the residual before its MLP."""
        config, params, x = self.config, self.params, behind
        output = params["embedding"] if config.tie_embeddings else params["output"]
        norm = params["norm"]
        if layer < config.n_layers and config.exits.head != "shared":
            head = params.get("exits", {}).get(f"after_{layer}", {})  # tied and without a norm, it owns nothing
            norm = head["norm"] if config.exits.norm else None
            if not config.exits.tie_output:
                output = head["output"]
            if config.exits.head == "mlp":
                mlp_norm = params["blocks"][layer - 1]["mlp_norm"]
                x = middle + swiglu(head["mlp"], rms_norm(mlp_norm, middle, config.norm_eps))
            if config.exits.head == "block":
                x, _ = self.transform(head["block"], self.at_exit[layer], len(x))
        features = x if norm is None else rms_norm(norm, x, config.norm_eps)
        probe = None
        if layer < config.n_layers and config.exits.probes:
            head = params["exits"][f"after_{layer}"]
            probe = features @ head["probe_weight"] + head["probe_bias"]
        return Seen(features @ output.T, before, behind, probe)

    def full_depth(self, token_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Run tokens through every block. Returns logits `[tokens, V]` at every exit point."""
        return {layer: seen.logits for layer, seen in self.watch(token_ids).items()}

    def watch(self, token_ids: Sequence[int]) -> dict[int, Seen]:
        """The same, with all there is to see at every exit point."""
        x = self.params["embedding"][np.asarray(token_ids, int)]
        found = {}
        for index in range(self.config.n_layers):
            before = x
            x, middle = self.run_block(index, x)
            self.arrive(index + 1, x)
            if index + 1 in self.config.exit_points:
                found[index + 1] = self.see(index + 1, before, x, middle)
        return found

    def arrive(self, layer: int, x) -> None:
        """States `x` come out of block `layer`, or would have, had they not left before."""
        if layer in self.at_exit:
            self.at_exit[layer] = np.concatenate([self.at_exit[layer], x])

    def step(self, token_id: int, leave) -> tuple[np.ndarray, int]:
        """Run one token until `leave(exit_layer, seen)` says so. Returns its logits `[V]` and the exit layer."""
        config = self.config
        x = self.params["embedding"][[token_id]]
        for index in range(config.n_layers):
            before = x
            x, middle = self.run_block(index, x)
            layer = index + 1
            self.arrive(layer, x)
            if layer == config.n_layers:
                return self.see(layer, before, x, middle).logits[0], layer
            if layer in config.exits.layers:
                seen = self.see(layer, before, x, middle).at(0)
                if leave(layer, seen):
                    for above in range(layer, config.n_layers):
                        self.entering[above] = np.concatenate([self.entering[above], x])
                        self.arrive(above + 1, x)
                    return seen.logits, layer
        raise AssertionError("a model has at least one block")


def confidence(measure: str, seen: Seen) -> float:
    """Top probability (`softmax`), or top minus second probability (`margin`), both over the exit's distribution;
    cosine of the states on both sides of the exit's block (`similarity`); what the probe says (`classifier`)."""
    if measure == "similarity":
        lengths = np.linalg.norm(seen.before) * np.linalg.norm(seen.behind)
        return float(seen.before @ seen.behind / lengths)
    if measure == "classifier":
        return float(1 / (1 + np.exp(-seen.probe)))
    second, first = np.sort(softmax(seen.logits))[-2:]
    if measure == "softmax":
        return float(first)
    assert measure == "margin", f"the reference has no measure {measure!r}"
    return float(first - second)


def threshold_at(early_exit: EarlyExitParams, config: ModelConfig, layer: int, t: int, max_tokens: int) -> float:
    """What the confidence at exit `layer` has to reach for answer token `t`; infinite where the token may not leave."""
    used = config.exits.layers if early_exit.exit_layers is None else tuple(sorted(early_exit.exit_layers))
    if layer not in used or layer < early_exit.min_layers:
        return math.inf
    decaying = isinstance(early_exit.threshold, DecayingThreshold)
    value = early_exit.threshold.value if decaying else early_exit.threshold
    if isinstance(value, tuple):
        value = value[used.index(layer)]
    if value > 1:
        return math.inf  # no confidence exceeds 1
    if decaying:
        value = 0.9 * value + 0.1 * math.exp(-early_exit.threshold.tau * t / max_tokens)
        value = min(max(value, 0.0), 1.0)
    return value


def generate(
    config: ModelConfig,
    params: dict,
    prompt_token_ids: Sequence[int],
    *,
    max_tokens: int,
    early_exit: EarlyExitParams | None = None,
    stop_token_ids: Sequence[int] = (),
    eos_id: int | None = None,
    threshold_at=threshold_at,
    dtype=np.float64,
) -> ReferenceResult:
    """Answer one prompt greedily, each token leaving at the first exit whose confidence reaches its threshold.

    `threshold_at` can be replaced by a wrong one, to show that a case tells the difference.
    """
    sequence = Reference(config, params, dtype)
    stops = {*stop_token_ids, *(() if eos_id is None else (eos_id,))}
    tokens: list[int] = []
    exit_layers: list[int] = []
    logprobs: list[float] = []
    logit_margin = confidence_margin = math.inf

    def leave(layer: int, seen: Seen) -> bool:
        nonlocal confidence_margin
        if early_exit is None:
            return False
        threshold = threshold_at(early_exit, config, layer, len(tokens), max_tokens)
        if math.isinf(threshold):
            return False
        if early_exit.gate:
            probe = confidence("classifier", seen)
            confidence_margin = min(confidence_margin, abs(probe - early_exit.gate))
            if probe < early_exit.gate:
                return False
        found = confidence(early_exit.measure, seen)
        if threshold > 0:  # every confidence reaches 0, however it is rounded
            confidence_margin = min(confidence_margin, abs(found - threshold))
        return found >= threshold

    logits, layer = sequence.full_depth(prompt_token_ids)[config.n_layers][-1], config.n_layers
    while True:
        second, first = np.sort(logits)[-2:]
        logit_margin = min(logit_margin, float(first - second))
        tokens.append(int(np.argmax(logits)))  # the first, hence lowest, of equals
        exit_layers.append(layer)
        logprobs.append(float(np.log(softmax(logits)[tokens[-1]])))
        if tokens[-1] in stops or len(tokens) == max_tokens:
            reason = "stop" if tokens[-1] in stops else "length"
            margins = Margins(logit_margin, confidence_margin)
            return ReferenceResult(tuple(tokens), tuple(exit_layers), reason, margins, tuple(logprobs))
        logits, layer = sequence.step(tokens[-1], leave)


def replay(
    config: ModelConfig,
    params: dict,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    exit_layers: Sequence[int],
    dtype=np.float64,
) -> np.ndarray:
    """Logits `[answer tokens, V]` from which each token of a given answer was drawn, had they left where they did.

    For runs whose choices the reference does not make itself: sampled tokens, exits drawn at random.
    """
    sequence = Reference(config, params, dtype)
    rows = [sequence.full_depth(prompt_token_ids)[config.n_layers][-1]]
    for token, layer in zip(token_ids[:-1], exit_layers[1:], strict=True):
        logits, reached = sequence.step(token, lambda exit_layer, _, layer=layer: exit_layer == layer)
        assert reached == layer, f"the model has no exit after block {layer}"
        rows.append(logits)
    return np.stack(rows)
