"""What the kernels cost: compiled without a GPU, counted from shapes, timed on a GPU. Knows nothing of the server."""
