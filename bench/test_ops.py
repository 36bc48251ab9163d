"""Every op on its largest example, by implementation, under pytest-benchmark: `make bench` and `make gpu` run it."""

import pytest
import torch

from sv3d_fast.info import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = [(op, i.name, i.run, i.why_not) for op in ops().values() for i in op.implementations]
CALLS += [(op, "reference", op.reference, lambda *arguments: []) for op in ops().values()]


def elements(arguments: tuple) -> int:
    return sum(a.numel() for a in arguments if isinstance(a, torch.Tensor))


@pytest.mark.parametrize(("op", "name", "run", "why_not"), CALLS, ids=[f"{op.name}-{name}" for op, name, *_ in CALLS])
def test_op(op, name, run, why_not, benchmark):
    examples = [arguments for arguments in op.examples(DEVICE) if not why_not(*arguments)]
    if not examples:
        pytest.skip(f"{name} can't run here")
    arguments = max(examples, key=elements)

    def once() -> None:
        run(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op.name
    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
