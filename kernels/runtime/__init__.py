"""The host side that all kernels share."""
