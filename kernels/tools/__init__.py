"""What looks at kernels or measures them, and runs none of a network's."""
