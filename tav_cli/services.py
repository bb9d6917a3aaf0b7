"""`tav up` and `tav down`: start and stop the local services, and print where they are."""

from __future__ import annotations

from pathlib import Path

from flows import services
from tav_cli.terminal import ProgressBars


def up(root: Path) -> None:
    """Start the services in the background, and print their addresses when they are ready.

    Raises:
        TavError: as `flows.services.start`.
    """
    with ProgressBars() as bars, bars.activity("starting Prefect and MLflow"):
        started = services.start(root)
    print(f"Prefect   {started.prefect}")
    mlflow = (
        services.mlflow_page(root, started.mlflow) if started.mlflow else "none: tracking.uri is null in params.yaml"
    )
    print(f"MLflow    {mlflow}")
    print("ready: prefect deployment run tav/edit-batch --watch      (stop: tav down)")


def down(root: Path) -> None:
    """Stop the services, and print whether there were any.

    Raises:
        TavError: as `flows.services.stop`.
    """
    print("stopped" if services.stop(root) else "not running")
