"""vLLM on CPU, in this process, eager."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os

import harness

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when it is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, the least it takes

SLOTS = 32


class Engine:
    def __init__(self, model: str, threads: int, requests: list[dict], options: dict) -> None:
        os.environ.setdefault(
            "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        )
        import torch
        import vllm

        longest = max(len(one["prompt"]) + one["max_new"] for one in requests)
        self.params = vllm.SamplingParams
        self.llm = vllm.LLM(
            model,
            dtype="float32",
            max_model_len=longest,
            max_num_seqs=SLOTS,
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=False,
        )
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}

    def answer(self, requests: list[dict]) -> list[harness.Answer]:
        wanted = [
            self.params(temperature=0, max_tokens=one["max_new"], ignore_eos=True, detokenize=False) for one in requests
        ]
        prompts = [{"prompt_token_ids": one["prompt"]} for one in requests]
        answers = []
        for output in self.llm.generate(prompts, wanted, use_tqdm=False):
            times = output.metrics
            answers.append(harness.Answer(list(output.outputs[0].token_ids), times.first_token_ts, times.last_token_ts))
        return answers

    def facts(self) -> dict:
        return {}


if __name__ == "__main__":
    harness.serve(Engine)
