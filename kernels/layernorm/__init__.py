"""LayerNorm around a GEMM: folded into the forward, in one pass on the way back."""
