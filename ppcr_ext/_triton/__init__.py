"""The Triton backend. It imports Triton when it is asked what can run, and the kernels later."""
