"""What the machine does while a stage works: MLflow's own collectors, sent the way that all other metrics are sent."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tav.tracking.tracker import Run

INTERVAL = 10.0  # seconds, MLflow's own default

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def system_metrics(run: Run, interval: float = INTERVAL) -> Iterator[None]:
    """Log the use of CPU, memory, disk, network and GPU to `run`, first at once and then each `interval` seconds.

    Names are MLflow's (`system/cpu_utilization_percentage`, ...), for its page "System metrics". MLflow's own monitor
    would end at the first moment in which the store does not answer.
    """
    if not run.tracked:
        yield
        return
    end = threading.Event()
    thread = threading.Thread(target=_watch, args=(run, interval, end), name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _watch(run: Run, interval: float, end: threading.Event) -> None:
    try:
        collectors = _collectors()
        while True:
            values: dict[str, float] = {}
            for collector in collectors:
                collector.collect_metrics()
                values |= collector.aggregate_metrics()
                collector.clear_metrics()
            # By the clock, so that what a resumed run logs comes after what was logged before.
            step = int(time.time() / interval)
            run.log_metrics({f"system/{name}": value for name, value in values.items()}, step=step)
            if end.wait(interval):
                return
    except Exception as error:
        logger.warning("system metrics end here: %s", error)


def _collectors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    collectors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # No NVIDIA GPU, or none that its library finds.
        collectors.append(GPUMonitor())
    return collectors
