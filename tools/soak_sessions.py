"""Save, kill, load, resume, again and again: not one byte may differ, not one file may be torn.

    python tools/soak_sessions.py [--model FOLDER] [--cycles 500] [--budget 64] [--policy hashevict] [--seed 0]

First every token is drawn without a break, and once more in steps, saving after each: the digests of those files are
the truth.  Then children (forks: POSIX only) go on from the file that they find, cut the way differently, save, and are
killed (SIGKILL) at random moments.  After every kill the file must be, byte for byte, one of the true ones, and not an
earlier one than before; every tenth time it is loaded, and must go on with the true tokens.  Where a child has reached
the end, the next begins another session, with another seed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from hashlib import sha256
from pathlib import Path

import torch

from minillm import LLM
from minillm.hub import EMBEDDED
from minillm.session import Session

PROMPT = "Once upon a time there was a little cat who liked to sleep in the sun, and a big dog said hello to her. "
STEP = 5  # tokens between two saves
LONGEST = 4  # steps until a child is killed, at most


class Life:
    """One session from its beginning to its end, and what its file is at every stage."""

    def __init__(self, llm: LLM, file: Path, *, tokens: int, seed: int) -> None:
        self.llm, self.file, self.tokens, self.seed = llm, file, tokens, seed
        self.ids = self.begin().generate(max_tokens=tokens).finish().token_ids
        self.stage = {}  # digest of the file -> tokens drawn
        session, ids = self.begin(), []
        self.prompt = session.seen + len(session.pending)
        begin = time.perf_counter()
        for drawn in range(STEP, tokens + 1, STEP):
            ids += session.generate(max_tokens=STEP).finish().token_ids
            session.save(file)
            self.stage[digest(file)] = drawn
        self.step_s = (time.perf_counter() - begin) / len(self.stage)
        assert ids == self.ids, "drawn in steps, the tokens are others"
        assert len(self.stage) == tokens // STEP, "two stages have the same file"
        file.unlink()

    def begin(self) -> Session:
        """A session that has read the prompt."""
        rules = {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.1, "frequency_penalty": 0.1}
        session = self.llm.session(**rules, seed=self.seed, ignore_eos=True)
        session.append(PROMPT)
        return session

    def resume(self) -> tuple[Session, int]:
        """The session in the file, or one that begins, and how many tokens it has drawn."""
        session = self.begin()
        if self.file.exists():
            session.load(self.file)
        return session, session.seen + len(session.pending) - self.prompt

    def go_on(self, draw: random.Random, ready: int) -> None:
        """What a child does, as long as it lives; it says through the pipe `ready` when it has loaded the file."""
        session, drawn = self.resume()
        os.write(ready, b".")
        while drawn < self.tokens:
            first = draw.randrange(STEP)
            for count in (first, STEP - first):
                if count:
                    session.generate(max_tokens=count).finish()
            drawn += STEP
            session.save(self.file)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


def soak(llm: LLM, folder: Path, *, cycles: int, tokens: int = 400, seed: int = 0) -> dict[str, int]:
    """Run so many kills; returns counts of what was met.  AssertionError at the first difference or torn file."""
    draw, file = random.Random(seed), folder / "soak.session"
    met = {"cycles": 0, "lives": 0, "killed while saving": 0, "stages": 0, "resumed and compared": 0}
    life, before = None, 0
    for cycle in range(cycles):
        if life is None or before == tokens:
            file.unlink(missing_ok=True)
            life, before = Life(llm, file, tokens=tokens, seed=seed + cycle), 0
            met["lives"] += 1
        listen, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                life.go_on(random.Random(cycle), ready)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(ready)
        if cycle % 5:  # else it may die while it loads
            os.read(listen, 1)
        os.close(listen)
        time.sleep(draw.uniform(0, LONGEST * life.step_s))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"a child failed in cycle {cycle}"
        met["cycles"] += 1
        met["killed while saving"] += any(path.suffix == ".tmp" for path in folder.iterdir())
        if not file.exists():
            continue
        stage = life.stage.get(digest(file))
        assert stage is not None, f"{file} is not what it should be at any stage (cycle {cycle})"
        assert stage >= before, f"{file} went back from {before} tokens to {stage}"
        met["stages"] += stage > before
        before = stage
        if cycle % 10 == 0:
            session, drawn = life.resume()
            assert drawn == stage
            more = session.generate(max_tokens=STEP).finish().token_ids
            assert more[: tokens - drawn] == life.ids[drawn : drawn + STEP]
            met["resumed and compared"] += 1
    return met


def main() -> int:
    """Parse the options, soak, and print what was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=400, help="length of one session")
    parser.add_argument("--budget", default="64")
    parser.add_argument("--policy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM.load(args.model, budget=args.budget, policy=args.policy, dtype=args.dtype)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        met = soak(llm, Path(folder), cycles=args.cycles, tokens=args.tokens, seed=args.seed)
    facts = ", ".join(f"{count:,} {what}" for what, count in met.items())
    size = llm.session().nbytes
    print(f"{facts}; no difference, no torn file; {size:,} bytes a file; {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
