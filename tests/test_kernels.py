"""Every registered op: each implementation that can run here against the op's reference, on the op's examples."""

import importlib
import pkgutil

import pytest
import torch

import sv3d_fast.kernels
from sv3d_fast.kernels.op import registry

for module in pkgutil.iter_modules(sv3d_fast.kernels.__path__):
    importlib.import_module(f"sv3d_fast.kernels.{module.name}")

PAIRS = [(op, implementation.name) for op in registry.values() for implementation in op.implementations]

ROUNDING = 1e-3  # of 16-bit results, two of which are compared


def outputs(result) -> list[torch.Tensor]:
    """The tensors that an op returned."""
    values = result if isinstance(result, list | tuple) else [result]
    return [value for value in values if isinstance(value, torch.Tensor)]


def compare(op, name: str, device: str) -> int:
    """Checks one implementation on every example that it can run; returns how many that were."""
    ran = 0
    implementation = next(i for i in op.implementations if i.name == name)
    for index, arguments in enumerate(op.examples(device)):
        if implementation.why_not(*arguments):
            continue
        ran += 1
        expected, got = outputs(op.reference(*arguments)), outputs(implementation.run(*arguments))
        assert len(got) == len(expected) > 0
        for place, (a, b) in enumerate(zip(got, expected, strict=True)):
            where = f"{op.name}: {name}, example {index}, output {place}"
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), where
            if not a.is_floating_point() and a.dtype != torch.uint8:  # indices and flags; bytes are pixels
                assert torch.equal(a, b), where
                continue
            assert torch.equal(a.isfinite(), b.isfinite()), where
            limit = op.tolerance if a.dtype in (torch.float32, torch.float64) else max(op.tolerance, ROUNDING)
            finite = b.isfinite()
            a, b = a[finite].double(), b[finite].double()
            assert (a - b).norm() <= limit * b.norm() + 1e-12, where
    return ran


@pytest.mark.parametrize(("op", "name"), PAIRS, ids=[f"{op.name}-{name}" for op, name in PAIRS])
def test_implementation_agrees_with_the_reference(op, name):
    compare(op, name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name"), PAIRS, ids=[f"{op.name}-{name}" for op, name in PAIRS])
def test_implementation_agrees_with_the_reference_on_cuda(op, name):
    compare(op, name, "cuda")


@pytest.mark.parametrize("op", registry.values(), ids=list(registry))
def test_op_runs_here_and_has_examples_of_odd_and_single_size(op):
    examples = list(op.examples("cpu"))
    sizes = [size for arguments in examples for t in outputs(arguments) for size in t.shape]
    assert 1 in sizes, "no example has a dimension of size 1"
    assert any(size % 2 and size > 1 for size in sizes), "no example has an odd dimension"
    for arguments in examples:
        assert not op.choose(*arguments).why_not(*arguments)


def test_a_compiled_cpu_implementation_ran_somewhere():
    assert any(compare(op, name, "cpu") for op, name in PAIRS if name == "csrc")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_blend_can_take_the_place_of_what_is_normalised(device):
    op = registry["blended_layer_norm"]
    for x, *others in op.examples(device):
        apart = op(x.clone(), *others)
        blend, y = op(x, *others, inplace=True)
        assert blend.data_ptr() == x.data_ptr()
        torch.testing.assert_close((x, y), apart, rtol=0, atol=0)
