"""How flags, environment and a file become an instance of a settings class (config.py has those).

Owns: the names of a setting, and precedence. Knows no particular setting, nor how a value is written
(values.py). Reads `argv`,
`environ` and one file, nothing else. Precedence: flag, then environment, then file, then default.

One name in three spellings. The field `max_model_len` of `engine` is `--max-model-len`,
`PDQ_MAX_MODEL_LEN`, and `max_model_len` under `[engine]` in the TOML file that `--config` or
`PDQ_CONFIG` names. A nested tree puts its field's name in front (`--redis-url`), unless the field
has another `prefix` in its metadata, as `engine` has the empty one.

An environment variable that is empty counts as absent. "none" stands for no value where the type
allows it. A tuple is written with commas, or by repeating the flag. A name that no service knows
is an error, wherever it stands; so is a `PDQ_…` variable, but one of another service is not.

A secret comes from the environment or a file: everybody on the machine can read a command line, so
its flag is refused with a line that says so. No error shows the value of a secret, nor what stands
beside a flag that nobody knows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.errors import ConfigError
from common.secret_files import require_private
from common.settings import values

ENVIRONMENT_PREFIX = "PDQ_"
CONFIG_VARIABLE = "PDQ_CONFIG"

T = TypeVar("T")


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str | None = None,
    secret: bool | Callable[[str], bool] = False,
    aliases: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    form: str = "",
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field of a settings class. `flag` replaces the flag's name (without dashes in front),
    `aliases` are further names of it; `secret` may be a function that says of a text whether it
    holds one; `parse` turns text into the value where the type alone does not say how, and `form`
    is what help and errors then show of it, such as `cpu|cuda:N`."""
    metadata = {
        "help": help,
        "flag": flag,
        "secret": secret,
        "aliases": aliases,
        "parse": parse,
        "form": form,
        "above": above,
        "at_least": at_least,
        "at_most": at_most,
    }
    return dataclasses.field(default=default, metadata=metadata)


# ── Reading and writing the trees ────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One setting with its place in the tree and its names."""

    path: tuple[str, ...]
    annotation: Any
    field: dataclasses.Field[Any]
    flag: str  # with dashes, "--redis-url"

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.flag[2:].replace("-", "_").upper()

    @property
    def secret(self) -> bool:
        """Whether its value is never shown."""
        return bool(self.field.metadata.get("secret"))

    @property
    def options(self) -> list[str]:
        """The spellings of its flag."""
        return [self.flag, *(f"--{name}" for name in self.field.metadata.get("aliases", ()))]

    @property
    def is_switch(self) -> bool:
        return (values.optional(self.annotation) or self.annotation) is bool

    @property
    def has_flag(self) -> bool:
        """Whether some value of it may stand on a command line."""
        return self.field.metadata.get("secret") is not True

    def is_secret(self, value: Any) -> bool:
        """Whether this very value must not be seen by others."""
        secret = self.field.metadata.get("secret")
        return bool(value) and (bool(secret(value)) if callable(secret) else bool(secret))

    def parse_flag(self, text: str) -> Any:
        if self.is_secret(text):
            raise ConfigError(
                f"{self.flag} would show a secret to everybody who lists processes: set "
                f"{self.variable}, or {'.'.join(self.path)} in the file that --config names",
                param=self.flag,
            )
        return self.parse(text, self.flag)

    def value(self, settings: Any) -> Any:
        for name in self.path:
            settings = getattr(settings, name)
        return settings

    def parse(self, text: str, source: str) -> Any:
        """A value that stands as text in `source`."""
        parse = self.field.metadata.get("parse")
        return self._converted(functools.partial(values.parse, parse_item=parse), text, source)

    def accept(self, value: Any, source: str) -> Any:
        """A value from the TOML file, which has types already."""
        if isinstance(value, str) and self.field.metadata.get("parse") is not None:
            return self.parse(value, source)
        return self._converted(values.check, value, source)

    def _converted(self, convert: Callable[[Any, Any], Any], given: Any, source: str) -> Any:
        try:
            value = convert(given, self.annotation)
        except (ValueError, KeyError) as error:
            shown = "" if self.secret else f", not {given!r}"
            form = self.field.metadata.get("form")
            meant = "one of " + ", ".join(form.split("|")) if form else values.in_words(self.annotation)
            raise ConfigError(f"{source} must be {meant}{shown}", param=source) from error
        above = self.field.metadata.get("above")
        if above is not None and value is not None and value <= above:
            raise ConfigError(f"{source} must be more than {above:g}, not {value}", param=source)
        least = self.field.metadata.get("at_least")
        if least is not None and value is not None and value < least:
            raise ConfigError(f"{source} must be at least {least}, not {value}", param=source)
        most = self.field.metadata.get("at_most")
        if most is not None and value is not None and value > most:
            raise ConfigError(f"{source} must be at most {most}, not {value}", param=source)
        return value


def load(
    settings_class: type[T],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    program: str = "pdq",
    others: Sequence[type[Any]] = (),
) -> T:
    """An instance from flags, environment and file; `ConfigError` names what is wrong and where.

    `others` are the classes whose variables may stand in `environ` too. `--help` prints every
    setting and raises `SystemExit(0)`.
    """
    leaves = list(_leaves(settings_class))
    flags = _read_flags(leaves, argv, program, settings_class)
    found: dict[tuple[str, ...], Any] = {}
    config_file = flags.pop("config", None) or environ.get(CONFIG_VARIABLE)
    if config_file:
        found.update(_read_file(settings_class, Path(config_file)))
    found.update(_read_environment(leaves, others, environ))
    for leaf in leaves:
        if leaf.flag in flags:
            found[leaf.path] = leaf.parse_flag(flags[leaf.flag])
    for leaf in leaves:
        if leaf.path not in found and leaf.field.default is dataclasses.MISSING:
            raise ConfigError(f"{leaf.flag} (or {leaf.variable}) is needed", param=leaf.flag)
    return typing.cast(T, _build(settings_class, found, ()))


def from_values(settings_class: type[T], given: Mapping[str, object]) -> T:
    """An instance of a class without nested trees, from values by name; `ConfigError` names the
    one that is unknown, of another type, or out of range."""
    leaves = {leaf.path: leaf for leaf in _leaves(settings_class)}
    found: dict[tuple[str, ...], Any] = {}
    for name, value in given.items():
        if (name,) not in leaves:
            raise ConfigError(f"unknown setting {name}", param=name)
        found[name,] = leaves[name,].accept(value, name)
    return typing.cast(T, _build(settings_class, found, ()))


def describe(settings: Any) -> dict[str, str]:
    """Flag name without dashes → value as text, secrets masked; for logs and `pdq nodes`."""
    return {
        leaf.flag[2:]: "***" if leaf.secret and leaf.value(settings) else values.text_of(leaf.value(settings))
        for leaf in _leaves(type(settings))
    }


def child_environment(settings: Any, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that shall load exactly `settings`.

    All `PDQ_…` variables of `environ` are replaced; nothing secret appears on a command line.
    """
    child = {k: v for k, v in environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
    for leaf in _leaves(type(settings)):
        value = leaf.value(settings)
        if value == leaf.field.default:
            continue
        if value == "":
            raise ConfigError(f"{leaf.flag} cannot be passed on empty", param=leaf.flag)
        child[leaf.variable] = values.text_of(value)
    return child


def _leaves(settings_class: type[Any], path: tuple[str, ...] = (), prefix: str = "") -> Iterator[_Leaf]:
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            own = field.metadata.get("prefix")
            inner = prefix + (field.name + "-" if own is None else own)
            yield from _leaves(typing.cast(type[Any], annotation), (*path, field.name), inner)
        else:
            name = field.metadata.get("flag") or prefix + field.name
            yield _Leaf((*path, field.name), annotation, field, "--" + name.replace("_", "-"))


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, and whose help is one line per setting."""

    def __init__(self, program: str, settings_class: type[Any], leaves: Sequence[_Leaf]) -> None:
        super().__init__(prog=program, allow_abbrev=False)
        self._settings_class = settings_class
        self._settings = leaves

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        about = (self._settings_class.__doc__ or "").strip()
        lines = [f"usage: {self.prog} [--config FILE] [settings]", "", about, ""]
        lines.append("settings (flag, then environment, then file, then default):")
        rows = [("--help", "this text"), ("--config FILE", f"TOML file [{CONFIG_VARIABLE}]")]
        for leaf in self._settings:
            default = leaf.field.default
            needed = default is dataclasses.MISSING
            shown = "needed" if needed else f"default: {values.text_of(default) or 'empty'}"
            flag = f"{leaf.flag} {leaf.field.metadata.get('form') or values.metavar(leaf.annotation)}"
            if leaf.is_switch:
                flag = f"{leaf.flag}, --no-{leaf.flag[2:]}"
            if not leaf.has_flag:
                flag = leaf.variable
            rows.append((flag, f"{leaf.field.metadata['help']} ({shown}) [{leaf.variable}]"))
        width = min(44, max(len(flag) for flag, _ in rows))
        return "\n".join([*lines, *(f"  {flag:<{width}}  {about}" for flag, about in rows), ""])


def _read_flags(
    leaves: Sequence[_Leaf], argv: Sequence[str], program: str, settings_class: type[Any]
) -> dict[str, str]:
    """Flag (or "config") → text, as it stands in `argv`."""
    parser = _Parser(program, settings_class, leaves)
    parser.add_argument("--config", default=argparse.SUPPRESS)
    for leaf in leaves:
        options: dict[str, Any] = {"dest": leaf.flag, "default": argparse.SUPPRESS}
        if leaf.is_switch:
            parser.add_argument(leaf.flag, action="store_const", const="true", **options)
            off = f"--no-{leaf.flag[2:]}"
            parser.add_argument(off, action="store_const", const="false", **options)
        else:
            many = typing.get_origin(leaf.annotation) is tuple
            parser.add_argument(*leaf.options, action="append" if many else "store", **options)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        named = [part.partition("=")[0] for part in unknown if part.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(named or unknown)}")
    return {k: ",".join(v) if isinstance(v, list) else v for k, v in vars(known).items()}


def _read_environment(
    leaves: Sequence[_Leaf], others: Sequence[type[Any]], environ: Mapping[str, str]
) -> dict[tuple[str, ...], Any]:
    known = {CONFIG_VARIABLE, *(leaf.variable for leaf in leaves)}
    known |= {leaf.variable for other in others for leaf in _leaves(other)}
    for variable in environ:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            raise ConfigError(f"unknown environment variable {variable}", param=variable)
    return {
        leaf.path: leaf.parse(environ[leaf.variable], leaf.variable)
        for leaf in leaves
        if environ.get(leaf.variable)
    }


def _read_file(settings_class: type[Any], path: Path) -> dict[tuple[str, ...], Any]:
    try:
        file = path.open("rb")
        with file:
            content = tomllib.load(file)
            found = _from_file(settings_class, path, content)
            if any(
                leaf.is_secret(found[leaf.path]) for leaf in _leaves(settings_class) if leaf.path in found
            ):
                require_private(file.fileno(), path, "the settings file, which holds a secret,")
            return found
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}", param=str(path)) from error


def _from_file(
    settings_class: type[Any], path: Path, content: Mapping[str, Any]
) -> dict[tuple[str, ...], Any]:
    leaves = {leaf.path: leaf for leaf in _leaves(settings_class)}
    sections = {leaf.path[:end] for leaf in leaves.values() for end in range(1, len(leaf.path))}
    found: dict[tuple[str, ...], Any] = {}

    def walk(table: Mapping[str, Any], above: tuple[str, ...]) -> None:
        for name, value in table.items():
            place = (*above, name)
            source = f"{path}: {'.'.join(place)}"
            if place in leaves:
                found[place] = leaves[place].accept(value, source)
            elif place in sections and isinstance(value, dict):
                walk(value, place)
            else:
                raise ConfigError(f"{source} is not a setting", param=source)

    walk(content, ())
    return found


def _build(settings_class: type[Any], found: Mapping[tuple[str, ...], Any], at: tuple[str, ...]) -> Any:
    hints = typing.get_type_hints(settings_class)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(settings_class):
        path = (*at, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = _build(hints[field.name], found, path)
        elif path in found:
            given[field.name] = found[path]
    return settings_class(**given)
