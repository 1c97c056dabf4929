"""OpenVINO GenAI: its continuous batching pipeline (paged attention), float32 throughout."""

# pyright: reportMissingImports=false
from __future__ import annotations

import time

import harness
import numpy as np
import openvino
import openvino_genai

BLOCK = 32
"""Tokens in a block of its cache on CPU."""


class Engine:
    def __init__(self, model: str, threads: int, requests: list[dict], options: dict) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = sum((len(one["prompt"]) + one["max_new"]) // BLOCK + 2 for one in requests)
        scheduler.max_num_seqs = 256
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": threads > 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
        self.versions = {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}
        self.steps = 0
        self.count = 0  # requests so far: each needs an identity of its own

    def answer(self, requests: list[dict]) -> list[harness.Answer]:
        handles = []
        for one in requests:
            wanted = openvino_genai.GenerationConfig()
            wanted.max_new_tokens = one["max_new"]
            wanted.ignore_eos = True
            wanted.do_sample = False
            prompt = openvino.Tensor(np.array([one["prompt"]], np.int64))
            handles.append(self.pipeline.add_request(self.count, prompt, wanted))
            self.count += 1
        answers = [harness.Answer([], 0.0, 0.0) for _ in requests]
        live = set(range(len(requests)))
        self.steps = 0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            self.steps += 1
            now = time.monotonic()
            for i in list(live):
                if handles[i].can_read():
                    for output in handles[i].read().values():
                        answers[i].tokens.extend(output.generated_ids)
                    answers[i].first = answers[i].first or now
                if len(answers[i].tokens) >= requests[i]["max_new"]:
                    answers[i].finish = now
                    live.discard(i)
        return answers

    def facts(self) -> dict:
        return {"steps": self.steps}


if __name__ == "__main__":
    harness.serve(Engine)
