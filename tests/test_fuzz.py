"""Damaged uploads and checkpoints: whatever the bytes, a reader returns a value or one line of a ValueError."""

import pytest

from bench.mutations import EDITS, Edit, checkpoints, mutated, uploads

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EDIT = st.builds(
    Edit,
    kind=st.sampled_from(EDITS),
    where=st.floats(-1, 1, exclude_min=True, exclude_max=True),
    value=st.binary(min_size=1, max_size=8),
    size=st.integers(0, 300),
)
MUTATION = {"edits": st.lists(EDIT, min_size=1, max_size=4), "repair": st.booleans(), "which": st.integers(0, 99),
            "donor": st.integers(0, 99)}  # fmt: skip
FEW = hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def upload_samples(tmp_path_factory):
    return uploads(tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="module")
def checkpoint_samples(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


def read_mutated(samples, which, donor, edits, repair):
    sample = samples[which % len(samples)]
    sample.path.write_bytes(mutated(sample.data, samples[donor % len(samples)].data, edits, repair))
    message = "read"
    try:
        sample.read(sample.path)
    except ValueError as error:
        message = str(error)
    finally:
        sample.path.write_bytes(sample.data)
    assert len(message.splitlines()) == 1


@FEW
@hypothesis.given(**MUTATION)
def test_mutated_uploads(upload_samples, which, donor, edits, repair):
    read_mutated(upload_samples, which, donor, edits, repair)


@FEW
@hypothesis.given(**MUTATION)
def test_mutated_checkpoints(checkpoint_samples, which, donor, edits, repair):
    read_mutated(checkpoint_samples, which, donor, edits, repair)


def test_the_samples_themselves_are_read(upload_samples, checkpoint_samples):
    for sample in [*upload_samples, *checkpoint_samples]:
        sample.path.write_bytes(sample.data)
        assert sample.read(sample.path) is not None


def test_repairs_reach_past_the_first_check(upload_samples, checkpoint_samples):
    png = next(s.data for s in upload_samples if s.name == "rgba.png")
    weights = next(s.data for s in checkpoint_samples if s.name == "model.safetensors")
    for data in (png, weights):
        assert mutated(data, data, [], repair=True) == data
    wider = mutated(png, png, [Edit("flip", 0.0, b"\0" * 19 + b"\1", 0)], repair=True)
    assert wider[16:20] != png[16:20]
    assert wider[29:33] != png[29:33]  # the header's checksum, anew
    longer = mutated(weights, weights, [Edit("number", 0.0, b"\7", 0)], repair=True)
    assert int.from_bytes(longer[:8], "little") > int.from_bytes(weights[:8], "little")
