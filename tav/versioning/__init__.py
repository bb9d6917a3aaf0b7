"""DVC: which stages are up to date, restoring, recording, and repairing what a killed process leaves."""
