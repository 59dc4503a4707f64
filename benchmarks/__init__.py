"""The benchmark of ppcr_ext: ``python -m benchmarks`` (``--help`` explains it). See README.md, section Results."""
