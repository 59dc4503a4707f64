"""How the compiled libraries are built. setup.py imports these modules without the package."""
