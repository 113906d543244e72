"""The fused ops, one a file: reference, public function, autograd."""
