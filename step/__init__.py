"""How a training step is computed: machine, chunked losses, the C kernels, optimiser."""
