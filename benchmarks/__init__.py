"""The benchmark of ppcr_ext: ``python -m benchmarks --help`` explains it."""
