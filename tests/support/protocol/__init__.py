"""Both ends of the handoff protocol in a model of everything around them.

    model.py      identities of blocks, and a block pool whose blocks hold one value each
    sending.py    the sender that serves, over a model of engine, links and role
    driver.py     nodes, effects, copies, and what must hold: shared by the two that follow
    world.py      random schedules, on a virtual network and clock
    system.py     one link, and all that can happen on it next
    search.py     every schedule of that; snapshots.py copies what it walks over, views.py compares it,
                  shared.py lets several processes walk together
    mutations.py  rules taken out, one at a time: each must be noticed

`python -m tests.support.protocol --help` runs more of it than `make test` does.
"""
