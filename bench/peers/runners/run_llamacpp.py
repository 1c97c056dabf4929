"""llama.cpp through the C API that llama-cpp-python binds: one `llama_decode` a step, over the tokens of all rows.

Float32 keys and values, no flash attention. The binding's own classes answer one request at a time, so the loop is
ours: prompts join whole as soon as a slot is free.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
import time
from collections import deque
from dataclasses import dataclass

import harness
import llama_cpp
import numpy as np

SLOTS = 32
BATCH_TOKENS = 2048
FLOAT32 = 0
"""Its number among ggml's types."""


@dataclass
class Row:
    """A request in a slot: `tokens` of it are in the cache, `waiting` go in next."""

    number: int
    slot: int
    tokens: int
    waiting: list[int]


class Engine:
    def __init__(self, model: str, threads: int, requests: list[dict], options: dict) -> None:
        llama_cpp.llama_backend_init()
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds on to it
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        self.slots = min(SLOTS, len(requests))
        longest = max(len(one["prompt"]) + one["max_new"] for one in requests)
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = self.slots * (longest + 8)
        wanted.n_batch = BATCH_TOKENS
        wanted.n_seq_max = self.slots
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = FLOAT32
        wanted.flash_attn_type = 0
        wanted.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {model}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.steps = 0

    def answer(self, requests: list[dict]) -> list[harness.Answer]:
        answers = [harness.Answer([], 0.0, 0.0) for _ in requests]
        queue, free, rows = deque(range(len(requests))), list(range(self.slots)), []
        self.steps = 0
        while queue or rows:
            room = BATCH_TOKENS - len(rows)
            while queue and free and len(requests[queue[0]]["prompt"]) <= room:
                prompt = requests[queue[0]]["prompt"]
                rows.append(Row(queue.popleft(), free.pop(), 0, prompt))
                room -= len(prompt)
            if not rows:
                raise RuntimeError(f"request {queue[0]} does not fit into a batch of {BATCH_TOKENS} tokens")
            places = self._decode(rows)
            now = time.monotonic()
            for row, place in zip(list(rows), places, strict=True):
                logits = llama_cpp.llama_get_logits_ith(self.context, place)
                token = int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
                answer = answers[row.number]
                answer.tokens.append(token)
                answer.first = answer.first or now
                row.waiting = [token]
                if len(answer.tokens) == requests[row.number]["max_new"]:
                    answer.finish = now
                    llama_cpp.llama_memory_seq_rm(self.memory, row.slot, -1, -1)
                    free.append(row.slot)
                    rows.remove(row)
        return answers

    def _decode(self, rows: list[Row]) -> list[int]:
        """Put all waiting tokens through the model. Returns the place in the batch of each row's last token."""
        batch, count, places = self.batch, 0, []
        for row in rows:
            for token in row.waiting:
                batch.token[count] = token
                batch.pos[count] = row.tokens
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = row.slot
                batch.logits[count] = 0
                row.tokens += 1
                count += 1
            batch.logits[count - 1] = 1
            places.append(count - 1)
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.steps += 1
        return places

    def facts(self) -> dict:
        return {"steps": self.steps}


if __name__ == "__main__":
    harness.serve(Engine)
