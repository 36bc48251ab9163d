"""Errors against the official outputs, as the tests compute them: `python -m bench.golden`. About a minute, 7 GB."""

import sys
import tempfile
from pathlib import Path

from .results import record

ISSUE, BAR = "slice", "<= 1e-5"
TESTS = Path(__file__).parent.parent / "tests"


def main() -> None:
    sys.path.insert(0, str(TESTS))
    import test_sampler
    import test_triposr
    import test_unet
    import test_vae

    folder = TESTS / "golden"
    errors = {case: test_unet.golden_error(folder, case) for case in ("unet_p_small", "unet_u_small", "unet_p_full")}
    errors["vae_small encoder"], errors["vae_small decoder"] = test_vae.golden_errors(folder)
    for case, steps in (("sampler_21x50", 50), ("sampler_21x7", 7)):
        errors[case] = test_sampler.golden_error(folder, case, steps)
    for case, error in errors.items():
        record(ISSUE, f"golden {case}, float32", error, "relative L2", BAR)
    with tempfile.TemporaryDirectory() as written:
        model = test_triposr.golden_model(Path(written))
        for output, error in test_triposr.golden_errors(model, test_triposr.golden_case()).items():
            record("triposr", f"golden triposr_small, {output}", error, "relative L2", "<= 1e-4")


if __name__ == "__main__":
    main()
