"""Hugging Face Transformers: static batches of up to 32, padded on the left, until the longest answer ends."""

# pyright: reportMissingImports=false
from __future__ import annotations

import time

import harness
import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria

BATCH = 32


class Clock(StoppingCriteria):
    """Notes when each step's tokens are known; never stops a request."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **more):
        del scores, more
        self.times.append(time.monotonic())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Engine:
    def __init__(self, model: str, threads: int, requests: list[dict], options: dict) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def answer(self, requests: list[dict]) -> list[harness.Answer]:
        answers = []
        for start in range(0, len(requests), BATCH):
            batch = requests[start : start + BATCH]
            width, steps = max(len(one["prompt"]) for one in batch), max(one["max_new"] for one in batch)
            pads = [width - len(one["prompt"]) for one in batch]
            ids = torch.tensor([[0] * pad + one["prompt"] for pad, one in zip(pads, batch, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
            clock = Clock()
            found = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
            for row, one in zip(found[:, width:], batch, strict=True):
                count = one["max_new"]
                answers.append(harness.Answer(row[:count].tolist(), clock.times[0], clock.times[count - 1]))
        return answers

    def facts(self) -> dict:
        return {"batching": f"static, up to {BATCH}, padded"}

    @torch.inference_mode()
    def gaps(self, requests: list[dict], answers: list[list[int]]) -> list[list[float]]:
        """How far the likeliest token's logit is above the second's, at each token of each answer."""
        found = []
        for one, tokens in zip(requests, answers, strict=True):
            ids = torch.tensor([one["prompt"] + tokens[:-1]])
            logits = self.model(ids, logits_to_keep=len(tokens)).logits[0]
            top = logits.topk(2, dim=-1).values
            found.append((top[:, 0] - top[:, 1]).tolist())
        return found


if __name__ == "__main__":
    harness.serve(Engine)
