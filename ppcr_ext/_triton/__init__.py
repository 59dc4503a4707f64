"""The Triton backend. Triton and the kernels are imported when one is first launched."""
