"""The command `tav`: one module for each sub-command, and all terminal output."""
