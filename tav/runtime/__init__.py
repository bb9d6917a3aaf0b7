"""What every run needs of the machine: devices, locks, events and progress, logs."""
