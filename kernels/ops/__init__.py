"""The fused ops, one per file: reference, public function, autograd."""
