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


def test_a_collection_does_not_walk_what_the_start_has_loaded() -> None:
    subprocess.run([sys.executable, "-c", START], check=True)  # what is kept here is kept for good
