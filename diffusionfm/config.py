"""Run configs: dataclass defaults <- YAML <- command line; an unknown key is an error naming near ones."""

import argparse
import difflib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line that names the key and the fix."""


def load_config(cls: type[T], path: str | Path | None = None, overrides: list[str] | None = None) -> T:
    """Make a `cls` (a dataclass, nested ones allowed) from its defaults, a YAML file and `a.b=c` overrides.

    A file with `base: other.yaml`, a path from its own folder, holds only what differs from that one.
    Raises ConfigError for a missing or broken file, an unknown key, a wrong type or a missing value.
    """
    layers = _read_layers(Path(path)) if path is not None else []
    layers += [_read_override(item) for item in overrides or []]
    known = _known_keys(cls)
    for layer in layers:
        _refuse_unknown(cls, layer, "", known)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), *[OmegaConf.create(layer) for layer in layers])
        OmegaConf.resolve(merged)
        return typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        what = str(error.msg or error).splitlines()[0]
        if "is not a ListConfig" in what:
            what = "takes a list, as [one, two]"
        raise ConfigError(f"{error.full_key or 'config'}: {what}") from error


def check_options(key: str, given: dict[str, Any], of: Callable[..., Any]) -> None:
    """ConfigError, naming near ones, for a key under `key` that is no optional argument of `of`, which takes them."""
    known = [
        name
        for name, one in inspect.signature(of).parameters.items()
        if one.default is not inspect.Parameter.empty
    ]
    for name in given:
        if name not in known:
            near = _near(f"{key}.{name}", [f"{key}.{one}" for one in known], known)
            raise ConfigError(f"unknown key {key + '.' + str(name)!r}; {near}")


def dump_config(cfg: Any, path: str | Path) -> None:
    """Write a config (a dataclass or a dict) as YAML that `load_config` reads back to an equal one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(yaml.safe_dump(as_dict(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(aside, path)


def as_dict(cfg: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars."""
    plain = asdict(cfg) if is_dataclass(cfg) and not isinstance(cfg, type) else cfg
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(plain), resolve=True))


def parse_args(cls: type[T], argv: list[str] | None = None, description: str = "", example: str = "") -> T:
    """Read `CONFIG.yaml [key=value ...]` from the command line into a `cls`.

    `--help` lists every key with its default; a ConfigError is printed as `error: ...` and exits with 2.
    """
    keys = "\n".join(f"  {key} = {_show(value)}" for key, value in _known_keys(cls).items())
    example = f"example:\n  {example}\n\n" if example else ""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{example}keys and their defaults:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="what differs from the defaults")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="wins over the file, as trainer.steps=100"
    )
    args = parser.parse_intermixed_args(argv)
    if args.config is not None and "=" in args.config and not Path(args.config).is_file():
        args.config, args.overrides = None, [args.config, *args.overrides]
    with user_errors():
        return load_config(cls, args.config, args.overrides)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError, which the user can put right, into one `error:` line and exit code 2."""
    try:
        yield
    except ValueError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error


def _read_layers(path: Path, readers: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """A YAML file and the files it is based on, the deepest base first."""
    if path.resolve() in readers:
        raise ConfigError(f"{path}: `base` leads back to the file itself")
    layer = _read_yaml(path)
    base = layer.pop("base", None)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base!r} is not the path of a YAML file")
    return [*_read_layers(path.parent / base, (*readers, path.resolve())), layer]


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: a config is a YAML mapping of keys to values")
    return typing.cast(dict[str, Any], layer)


def _read_override(item: str) -> dict[str, Any]:
    key, equals, _ = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{item!r}: an override is written key=value, as trainer.steps=100")
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([item])))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{item!r}: {' '.join(str(error).split())}") from error


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in a hint such as `Data` or `Data | None`, else None."""
    choices = (
        typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    )
    return next((choice for choice in choices if isinstance(choice, type) and is_dataclass(choice)), None)


def _refuse_unknown(cls: type, layer: dict[str, Any], prefix: str, known: dict[str, Any]) -> None:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    for key, value in layer.items():
        full = f"{prefix}{key}"
        if key not in names:
            raise ConfigError(
                f"unknown key {full!r}; {_near(full, list(known), [prefix + name for name in names])}"
            )
        inner = _dataclass_of(hints[key])
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(inner, value, f"{full}.", known)
        elif inner is not None and value is not None:
            raise ConfigError(
                f"{full}: expected keys below it, as {full}.{fields(inner)[0].name}, got {value!r}"
            )


def _near(full: str, known: list[str], here: list[str]) -> str:
    leaf = full.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    matches = same_leaf or difflib.get_close_matches(full, [*known, *here], n=3)
    return (
        f"did you mean {' or '.join(dict.fromkeys(matches))}?"
        if matches
        else f"known here: {', '.join(here)}"
    )


def _known_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted leaf key of a config class with its default (`???` where a value must be given)."""
    hints, keys = typing.get_type_hints(cls), {}
    defaults = OmegaConf.to_container(OmegaConf.structured(cls))
    for field in fields(cls):
        inner, default = _dataclass_of(hints[field.name]), typing.cast(dict, defaults)[field.name]
        if inner is None:
            keys[prefix + field.name] = default
        else:
            keys.update(_known_keys(inner, f"{prefix}{field.name}."))
    return keys


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
