"""Damaged uploads and checkpoint headers through the readers: crashes, hangs and great allocations among 10,000 each.

A case passes if the reader returns, or raises one line of a ValueError, within 20 s and 1 GiB of memory.

python -m bench.fuzz [--cases 10000] [--seed 0]
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from sv3d_fast.stages import PeakMemory

from .mutations import EDITS, Edit, Sample, checkpoints, mutated, uploads
from .results import record

ISSUE = "production"
SECONDS = 20  # that a reader may take for a file of a few kilobytes
MEMORY = 2**30  # bytes that it may use; a picture of 100 megapixels, which is allowed, takes 0.8 GiB as RGB and RGBA
KINDS: dict[str, Callable[[Path], list[Sample]]] = {"uploads": uploads, "checkpoint headers": checkpoints}


def case(samples: list[Sample], seed: int, number: int) -> tuple[Sample, bytes]:
    """The file of a case, by seed and number alone; but for addresses that torch's older pickle holds."""
    random = np.random.default_rng([seed, number])
    edits = []
    for _ in range(random.integers(1, 5)):
        kind, where, value = str(random.choice(EDITS)), random.uniform(-1, 1), random.bytes(int(random.integers(1, 9)))
        edits.append(Edit(kind, where, value, int(random.integers(300))))
    sample, donor = samples[number % len(samples)], samples[random.integers(len(samples))]
    return sample, mutated(sample.data, donor.data, edits, repair=bool(random.integers(2)))


def judge(sample: Sample) -> str:
    """What is wrong with how the file at the sample's place is read; nothing if all is well."""
    memory = PeakMemory(torch.device("cpu"))
    before, wrong = memory.read(), ""
    try:
        sample.read(sample.path)
    except ValueError as error:
        if len(str(error).splitlines()) != 1:
            wrong = f"not one line: {str(error)!r}"
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})"
    used = memory.read() - before
    return wrong or (f"took {used / 2**30:.1f} GiB" if used > MEMORY else "")


def work(pipe: Connection, kind: str, folder: Path, seed: int, first: int, cases: int) -> None:
    """Tells of each case from `first` on what is wrong with it."""
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # decoders complain there of every damaged file
    folder.mkdir()
    samples = KINDS[kind](folder)
    for number in range(first, cases):
        sample, data = case(samples, seed, number)
        sample.path.write_bytes(data)
        pipe.send(f"{sample.name}: {wrong}" if (wrong := judge(sample)) else "")
        sample.path.write_bytes(sample.data)


def crashes(kind: str, cases: int, seed: int, scratch: Path) -> int:
    """How many cases went wrong; a process that dies or hangs is one, and another goes on after it."""
    context, number, bad = multiprocessing.get_context("spawn"), 0, 0
    while number < cases:
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, kind, scratch / f"{kind} {number}", seed, number, cases)
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        patience = 6 * SECONDS  # the first case waits for the imports
        with contextlib.closing(ours):
            while number < cases:
                wrong = f"no answer in {SECONDS} s"
                with contextlib.suppress(EOFError):
                    answered = ours.poll(patience)
                    if answered:
                        wrong = "the process died"
                        wrong = ours.recv()
                number, patience = number + 1, SECONDS
                if wrong:
                    bad += 1
                    print(f"{kind}, case {number - 1}: {wrong}", flush=True)
                if wrong in ("the process died", f"no answer in {SECONDS} s"):
                    break
        process.kill()
        process.join()
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            bad = crashes(kind, args.cases, args.seed, Path(scratch))
        record(ISSUE, f"crashes in {args.cases:,} mutated {kind}", bad, "crashes", "<= 0")


if __name__ == "__main__":
    main()
