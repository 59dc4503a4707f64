"""A pytest plugin (``-p shard``): the tests of one of several processes, by PPCR_SHARD=0/4.

For tools/gpu.py: machines with a GPU may lack pytest-xdist.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    index, count = map(int, os.environ.get("PPCR_SHARD", "0/1").split("/"))
    items[:] = items[index::count]
