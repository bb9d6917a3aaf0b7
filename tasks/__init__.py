"""The stages of the pipeline, each a function over paths and parameters, and their command line."""
