"""What schemathesis makes of the server's OpenAPI; bench.openapi sends it many more requests."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

from bench.openapi import Trial, application

POST, JOB = "POST /v1/3d/generations", "/v1/jobs/{job}"


def test_answers_keep_to_their_description(tmp_path):
    with application(tmp_path) as app:
        trial = Trial(app)
        trial.run(25)
        description = app.openapi()
    assert trial.faults == []
    for expected in [(f"GET {JOB}", 200), (f"GET {JOB}", 404), (f"GET {JOB}/events", 200), (f"DELETE {JOB}", 409),
                     (f"GET {JOB}/files/{{name}}", 200), (f"{POST} multipart/form-data", 202),
                     (f"{POST} multipart/form-data", 422), (f"{POST} application/json", 422)]:  # fmt: skip
        assert trial.answers[expected], expected
    assert "HTTPValidationError" not in str(description)
