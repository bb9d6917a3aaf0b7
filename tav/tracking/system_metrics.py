"""The use of the machine while a stage works: MLflow's own collectors, logged like all other metrics."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

    from tav.tracking.tracker import Run

INTERVAL = 10.0  # seconds, MLflow's own default
FIRST_METRIC_INTERVAL = 0.2  # seconds between two looks whether the run has a metric yet

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def system_metrics(run: Run, interval: float = INTERVAL, after_others: bool = False) -> Iterator[None]:
    """Log the use of CPU, memory, disk, network and GPU to `run`, now and then every `interval` seconds.

    Args:
        run: the run.
        interval: seconds between two values.
        after_others: begin when the run has metrics of its own, because MLflow's comparison opens on what was logged first.

    The names are MLflow's (`system/cpu_utilization_percentage`, ...), for its page "System metrics". MLflow's own monitor
    is not used because it ends the first time that the store does not answer.
    """
    if not run.tracked:
        yield
        return
    end = threading.Event()
    thread = threading.Thread(
        target=_monitor, args=(run, interval, after_others, end), name="system metrics", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _monitor(run: Run, interval: float, after_others: bool, end: threading.Event) -> None:
    while after_others and not run.has_metrics:
        if end.wait(FIRST_METRIC_INTERVAL):
            return
    try:
        collectors = _collectors()
        while True:
            values: dict[str, float] = {}
            for collector in collectors:
                collector.collect_metrics()
                values |= collector.aggregate_metrics()
                collector.clear_metrics()
            # Steps count by the clock, so that those of a resumed run follow the earlier ones.
            step = int(time.time() / interval)
            run.log_metrics({f"system/{name}": value for name, value in values.items()}, step=step)
            if end.wait(interval):
                return
    except Exception as error:
        logger.warning("system metrics stopped: %s", error)


def _collectors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    collectors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA GPU, or none that its library finds
        collectors.append(GPUMonitor())
    return collectors


def peak_memory() -> float:
    """Return the peak memory of this process so far, in GiB: the GPU's if it has used one, else the host's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
