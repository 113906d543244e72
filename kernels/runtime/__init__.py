"""What kernels share on the host."""
