"""The names of the pipeline's stages in dvc.yaml, on the command lines and in the Prefect flow."""

STAGES = ("decode", "encode", "annotate", "tune", "invert", "edit", "score")
# The stages that run networks, on the device that params.yaml names.
DEVICE_STAGES = STAGES[1:]
# The stages that a control signal may act in.
CONTROLLED_STAGES = ("tune", "invert", "edit")
# The stages that log to MLflow when they end; the durations of the others are logged with the scores.
TRACKED_STAGES = ("tune", "edit", "score")
