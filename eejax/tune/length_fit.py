"""Length heads fitted to lengths, and errors of predictions. NumPy suffices: a thousand prompts take seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eejax.core import LEVELS
from eejax.schedule import LengthHeads, hidden_features, prompt_features

STEPS, RATE, DECAY, SOFTNESS = 300, 0.02, 0.3, 0.02
"""Of the descent: steps, learning rate, weight decay, and how far from zero the loss is a parabola."""
PROMPT_SCALE, ESTIMATE_SCALE = 20.0, 3.0
"""What n-grams, and logarithms of quantiles, are multiplied by before weights decay. Hidden states get deviation 1."""
FOLDS = 5


def fit_heads(
    prompts: Sequence[Sequence[int]], hidden: np.ndarray, lengths: np.ndarray, max_tokens: int
) -> LengthHeads:
    """Heads that predict the lengths of answers to prompts.

    Args:
        prompts: token ids, P of them.
        hidden: `[P, hidden_size]`, their last tokens' hidden states.
        lengths: `[P, S]`, of S answers to each prompt, in tokens.
        max_tokens: where the answers were cut off.
    """
    targets = np.log(lengths.astype(np.float64))
    grams = np.stack([prompt_features(ids) for ids in prompts]).astype(np.float64)
    prompt = fit_quantiles(grams, PROMPT_SCALE, targets)
    # The hidden state's head reads the prompt head's estimate, here as in use from a head not fitted to that prompt.
    before = np.empty((len(grams), len(LEVELS)))
    fold = np.arange(len(grams)) % FOLDS
    for i in range(FOLDS):
        part = fit_quantiles(grams[fold != i], PROMPT_SCALE, targets[fold != i])
        before[fold == i] = grams[fold == i] @ part[:-1] + part[-1]
    quantiles = np.clip(np.sort(np.exp(before), axis=1), 1, max_tokens)
    features = hidden_features(hidden, quantiles).astype(np.float64)
    scale = 1 / np.maximum(np.std(features, axis=0), 1e-3)
    scale[-len(LEVELS) :] = ESTIMATE_SCALE
    marginal = np.quantile(targets, LEVELS).astype(np.float32)
    return LengthHeads(marginal, prompt, fit_quantiles(features, scale, targets))


def fit_quantiles(features: np.ndarray, scale: np.ndarray | float, targets: np.ndarray) -> np.ndarray:
    """Linear quantile regression: pinball loss, weights decayed, the whole set at every step of Adam.

    Args:
        features: `[P, F]`.
        scale: of each feature (or all), larger for features whose weights decay less.
        targets: `[P, S]`, samples of what is predicted.

    Returns:
        `[F + 1, Q]` float32, the bias last.
    """
    levels = np.array(LEVELS)
    mean = features.mean(axis=0)
    x = (features - mean) * scale
    params = [np.zeros((x.shape[1], len(levels))), np.quantile(targets, levels)]
    first, second = ([np.zeros_like(one) for one in params] for _ in range(2))
    for step in range(1, STEPS + 1):
        error = targets[:, :, None] - (x @ params[0] + params[1])[:, None, :]
        # The derivative jumps from q - 1 to q at zero; a steep line there lets the descent settle.
        slope = -np.clip(levels + (error / SOFTNESS - 1) / 2, levels - 1, levels).mean(axis=1) / len(x)
        rate = RATE * min(1.0, 2 * (1 - step / STEPS))
        for i, gradient in enumerate((x.T @ slope + DECAY * params[0], slope.sum(axis=0))):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.99 * second[i] + 0.01 * gradient**2
            unit = np.sqrt(second[i] / (1 - 0.99**step)) + 1e-8
            params[i] = params[i] - rate * first[i] / (1 - 0.9**step) / unit
    weight = params[0] * (np.zeros((x.shape[1], 1)) + np.reshape(scale, (-1, 1)))
    return np.concatenate([weight, [params[1] - mean @ weight]]).astype(np.float32)


def scores(quantiles: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Errors of predictions; `eejax.tune.length_training.train_length` describes the figures.

    Args:
        quantiles: `[..., Q]`, in tokens.
        truth: `[...]`, in tokens.
    """
    quantiles, truth = quantiles.reshape(-1, len(LEVELS)).astype(np.float64), truth.reshape(-1).astype(np.float64)
    median, levels = quantiles[:, LEVELS.index(0.5)], np.array(LEVELS)
    off = np.abs(median - truth)
    error = np.log(truth)[:, None] - np.log(quantiles)
    ranks = [_ranks(median), _ranks(truth)]
    telling = all(np.ptp(rank) > 0 for rank in ranks)
    return {
        "mean_error": float(off.mean()),
        "acc_50": float(np.mean(off <= 50)),
        "acc_100": float(np.mean(off <= 100)),
        "within_2x": float(np.mean(np.abs(np.log(truth / median)) <= np.log(2) + 1e-9)),
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if telling else None,
        "pinball": float(np.mean(np.maximum(levels * error, (levels - 1) * error))),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; of equal values their mean."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2
