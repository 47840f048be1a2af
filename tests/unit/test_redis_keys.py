"""Keys: no two alike, all under the prefix, and each method says what its key is."""

from __future__ import annotations

import inspect

from common.store.keys import Keys


def methods() -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(method)
        for name, method in inspect.getmembers(Keys, inspect.isfunction)
        if not name.startswith("_") and name != "permanent"
    }


def spelled(keys: Keys, argument: str) -> dict[str, str]:
    return {
        name: getattr(keys, name)(*[argument] * (len(signature.parameters) - 1))
        for name, signature in methods().items()
    }


def test_every_key_is_under_the_prefix_and_no_two_are_alike() -> None:
    names = spelled(Keys("other"), "x")
    assert all(name.startswith("other:") for name in names.values())
    assert len(set(names.values())) == len(names)


def test_families_cannot_be_mistaken_for_each_other() -> None:
    """The reaper finds members of a family by its stem: no stem may begin another key."""
    stems = {n: k for n, k in spelled(Keys(), "").items() if len(methods()[n].parameters) == 2}
    for name, stem in stems.items():
        others = {n: k for n, k in spelled(Keys(), "x").items() if n != name}
        assert not any(key.startswith(stem) for key in others.values()), name


def test_each_docstring_says_type_time_to_live_writer_and_reader() -> None:
    for name in methods():
        about = getattr(Keys, name).__doc__ or ""
        assert "Writer" in about, name
        assert "eader" in about, name
        kinds = ("Hash", "List", "Sorted set", "Set", "Stream", "String", "set;")
        assert any(kind in about for kind in kinds), name
        assert "TTL_S" in about or "permanent" in about, name


def test_permanent_keys_are_those_whose_docstring_says_so() -> None:
    said = {n for n in methods() if "permanent" in (getattr(Keys, n).__doc__ or "")}
    assert Keys().permanent() == {getattr(Keys(), name)() for name in said}
