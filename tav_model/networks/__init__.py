"""The networks: the video UNet, its blocks, its attention, and the kernels that make them fast on CPUs."""
