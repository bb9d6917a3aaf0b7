"""For all tests: no network, one thread, no deadline for hypothesis, and how the tests are spread over workers."""

import os
import signal
from pathlib import Path

import pytest

# Before anything imports torch or the hub's clients, and for the processes that tests start.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ[name] = "1"
# One thread in this process and in those that tests start, so that their results are bit-identical; the cores are for
# the workers of pytest-xdist.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

# A shell's background jobs ignore interrupts, and what they start does too; some tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("tests.support.killing")

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile("tav", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tav")

# The files that take longest, in seconds on a quiet machine. They begin first, so that no worker waits for one at the end.
LONGEST = {
    "test_end_to_end.py": 120,
    "test_controlled.py": 75,
    "flows/test_cancellation.py": 90,
    "tav_cli/test_main.py": 80,
    "tav/versioning/test_dvc_pipeline.py": 70,
    "faults/test_kills.py": 60,
    "full_size/test_stable_diffusion_1_5.py": 50,
    "tasks/test_mlflow_model.py": 50,
    "tav/reports/test_report.py": 45,
    "flows/test_ray.py": 40,
    "faults/test_soak.py": 35,
    "toyworld/test_training.py": 35,
    "toyworld/test_weights.py": 35,
    "faults/test_full_disk.py": 30,
    "faults/test_two_runs.py": 30,
    "security/test_videos.py": 30,
    "flows/test_services.py": 25,
    "benchmarks/test_toyworld.py": 25,
}
# Tests with these fixtures, which run a pipeline or a browser, are slow.
SLOW_FIXTURES = {"cluster", "finished", "forked", "ran", "templates", "tracked", "window"}
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; pytest-xdist keeps this order, and the tests of a file on one worker."""
    items.sort(key=lambda item: -LONGEST.get(item.path.relative_to(TESTS).as_posix(), 0))
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def prefect(tmp_path: Path) -> dict[str, str]:
    """The environment of a Prefect server and an MLflow UI of this test's own; `tests.support.servers` starts them."""
    from tests.support.servers import free_port

    return {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TAV_MLFLOW_PORT": str(free_port()),
    }
