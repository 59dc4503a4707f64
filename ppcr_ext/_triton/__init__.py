"""The Triton backend. Its kernels are imported, and Triton with them, when one is first launched."""
