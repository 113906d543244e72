"""Tools that inspect and measure kernels; the network does not need them."""
