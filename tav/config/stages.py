"""The names of the pipeline's stages, as dvc.yaml, the command lines and the Prefect flow use them."""

STAGES = ("decode", "encode", "tune", "invert", "edit", "score")
DEVICE_STAGES = STAGES[1:]  # These compute on the device that params.yaml names.
TRACKED_STAGES = ("tune", "edit", "score")  # These log to MLflow; the others wait for the scores.
