"""For all tests: no network, two threads, and no deadline for hypothesis on a shared machine."""

import os
import signal
from pathlib import Path

import pytest

# Before anything imports torch or the hub's clients, and for the processes that tests start.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ[name] = "1"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "2")
# Threads that wait do not spin: small tensors on a busy machine would else take many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell's background jobs ignore interrupts, and what they start does too; some tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("tests.support.killing")

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile("tav", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tav")


@pytest.fixture
def prefect(tmp_path: Path) -> dict[str, str]:
    """The environment of a Prefect server and an MLflow UI of this test's own; `tests.support.servers` starts them."""
    from tests.support.servers import free_port

    return {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TAV_MLFLOW_PORT": str(free_port()),
    }
