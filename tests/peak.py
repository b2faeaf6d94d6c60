"""What a fresh process, or each of several, had planned to hold and held at most: a prompt, then eight tokens drawn.

Run as a module, alone or as tests/ranks.py starts several; the one argument is folder, dtype, tokens of the prompt in
each row, options of `Checkpoint.open`, those of `Checkpoint.plan`, and perhaps tokens of a chunk, as JSON.  Python,
libraries, tokenizer and allocator are all in the peak, so nothing may be imported here that a run would not import.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from minillm.checkpoint import Checkpoint
from minillm.generate import feed
from minillm.llm import LLM
from minillm.sampling import Sampler, SamplingParams
from minillm.shard import ALONE, Team

DRAWN = 8


def measured(
    team: Team, folder: str, dtype: str, tokens: int, opening: Any, options: Any, chunk: int = 256
) -> dict[str, Any]:
    """Bytes: planned and peak of this process, parts of the plan, and the cache as it is (`held`) and as planned."""
    checkpoint = Checkpoint.open(folder, dtype=dtype, team=team, **opening)
    plan = checkpoint.plan(**options)
    memory = checkpoint.memory_plan(plan, chunk=chunk, logit_rows=1)
    llm = LLM(checkpoint, checkpoint.load_model(), plan, chunk=chunk, memory=memory)
    prompt = torch.arange(plan.rows * tokens).view(plan.rows, -1) * 7 % checkpoint.config.vocab_size
    vocabulary, device = llm.real_vocab, llm.cache.device
    samplers = [
        Sampler(SamplingParams(temperature=0.8, top_p=0.9, seed=row), vocabulary, vocabulary, (), device)
        for row in range(plan.rows)
    ]
    with torch.inference_mode():
        for _, hidden in feed(llm.model, llm.cache, prompt, llm.chunk):
            last = hidden[:, -1]
        for _ in range(DRAWN):
            logits = llm.model.logits(last)
            drawn = [[sampler.sample(logits[row]).token_id] for row, sampler in enumerate(samplers)]
            last = llm.model(torch.tensor(drawn), llm.cache.append(1), llm.cache)[:, -1]
    return {**memory.to_dict(), "parts": memory.parts, "held": llm.cache.nbytes, "cache": plan.nbytes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        from minillm.parallel import connected

        with connected() as ranks:
            found = measured(ranks, *asked)
    else:
        found = measured(ALONE, *asked)
    print(json.dumps(found))
