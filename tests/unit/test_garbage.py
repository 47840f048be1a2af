"""What Python's collector of cyclic garbage looks at in a process that serves."""

from __future__ import annotations

import subprocess
import sys

START = """
import gc, weakref
from common.garbage import keep_what_is_here

class Node:
    pass

gc.disable()
loaded = [Node() for _ in range(10_000)]
cycle = Node()
cycle.itself, gone = cycle, weakref.ref(cycle)
del cycle
keep_what_is_here()
assert gone() is None, "what nobody needs after a start is kept, too"
assert not any(isinstance(each, Node) for each in gc.get_objects()), "a collection walks it"
served = Node()
served.itself, gone = served, weakref.ref(served)
del served
gc.collect()
assert gone() is None, "garbage that comes later is never collected"
"""

IMPORT = """
import gc
from common.garbage import importing

try:
    with importing():
        table = [[] for _ in range(100_000)]
        assert gc.get_count()[0] >= 100_000, "it was collected meanwhile"
        raise ImportError
except ImportError:
    pass
assert not any(each is table[0] for each in gc.get_objects()), "a collection walks it"
assert gc.isenabled()
"""


def test_nothing_is_collected_while_libraries_are_imported_nor_looked_through_later() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True)


def test_a_collection_does_not_walk_what_the_start_has_loaded() -> None:
    subprocess.run([sys.executable, "-c", START], check=True)  # what is kept here is kept for good
