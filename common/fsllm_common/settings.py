"""One mechanism for the settings of every command: a pydantic model states each setting once.

From a field's name, type, default and description come its flag (``--state-dir``), its environment variable
(``FSLLM_STATE_DIR``), its key in the settings file (``state_dir``, TOML), its help, and one error text wherever the
value came from. Flags go before the environment, the environment before the file, the file before the default.

pydantic alone, not pydantic-settings: that would add 8 MiB to a daemon for sources that click's flags replace.
"""

import difflib
import functools
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeVar

import click
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from fsllm_common.errors import SettingsInvalid

PREFIX: Final = "FSLLM_"
CONFIG: Final = "config"
"""The flag that names the settings file: ``--config``, ``FSLLM_CONFIG``."""


class Settings(BaseModel):
    """Base of a command's settings. Give every field a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in its three forms, for help and docs."""

    key: str
    flag: str
    variable: str
    default: str
    help: str
    kind: Literal["switch", "list", "value", "table"]
    metavar: str


def settings_of(model: type[Settings]) -> list[Setting]:
    """Return all settings of a model, in its order. A table stands in the file only and has neither flag nor
    variable."""
    return [_setting(name, field) for name, field in model.model_fields.items()]


def settings_options(
    model: type[Settings], *, config_file: Path | None = None
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a click command with a flag for each setting and ``--config``; it is called with
    ``settings=model(...)``.

    Args:
        model: The settings.
        config_file: Read when no ``--config`` is given and it exists.

    The command raises ``SettingsInvalid`` before its body runs.

    """

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def run(**arguments: Any) -> R:  # noqa: ANN401 (click's)
            flags = {name: arguments.pop(name, None) for name in model.model_fields}
            given: str | None = arguments.pop(CONFIG) or os.environ.get(PREFIX + CONFIG.upper())
            path = Path(given) if given else config_file if config_file and config_file.exists() else None
            return command(settings=load(model, flags, path), **arguments)

        decorated: Callable[..., R] = run
        for setting in reversed(settings_of(model)):
            decorated = _option(setting)(decorated)
        shown = f"; {config_file} when it exists" if config_file else ""
        return click.option(
            f"--{CONFIG}", metavar="FILE", help=f"Settings file (TOML).  [env: {PREFIX}{CONFIG.upper()}{shown}]"
        )(decorated)

    return decorate


def load(
    model: type[S],
    flags: Mapping[str, Any],
    toml_path: Path | None,
    *,
    environment: Mapping[str, str] | None = None,
    warn: Callable[[str], None] | None = None,
) -> S:
    """Return the settings from flags, environment, file and defaults, in this order of precedence.

    Args:
        model: The settings.
        flags: By field name; None or an empty tuple where the flag was not given.
        toml_path: The settings file, if any.
        environment: ``os.environ`` when omitted.
        warn: Called with a sentence for a variable that looks like a mistyped one; prints to stderr when omitted.

    Raises:
        SettingsInvalid: The file can not be read or has an unknown key, a value is wrong or missing. Names the setting
            in the form in which it was given.

    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if toml_path is not None:
        for key, value in _read_file(model, toml_path).items():
            values[key], sources[key] = value, f"{toml_path}: {key}"
    for setting in settings_of(model):
        if setting.variable and (text := environment.get(setting.variable)):
            values[setting.key] = _split(text) if setting.kind == "list" else text
            sources[setting.key] = setting.variable
    for key, value in flags.items():
        if value is not None and value != ():
            values[key], sources[key] = value, _flag(key)
    for variable in _mistyped(model, environment):
        (warn or _warn)(variable)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsInvalid("; ".join(_explain(e, sources) for e in error.errors(include_url=False))) from error


def _setting(name: str, field: FieldInfo) -> Setting:
    annotation = _plain(field.annotation)
    origin = typing.get_origin(annotation) or annotation
    kind: Literal["switch", "list", "value", "table"] = "value"
    metavar = {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(origin, "TEXT")
    if origin is bool:
        kind = "switch"
    elif origin in (tuple, list, set, frozenset):
        kind = "list"
    elif origin is dict or (isinstance(origin, type) and issubclass(origin, BaseModel)):
        kind = "table"
    elif origin is Literal:
        metavar = "[" + "|".join(map(str, typing.get_args(annotation))) + "]"
    default = field.get_default(call_default_factory=True, validated_data={})
    return Setting(
        key=name,
        flag="" if kind == "table" else _flag(name),
        variable="" if kind == "table" else PREFIX + name.upper(),
        default="" if field.is_required() or default in (None, (), {}) else _written(default),
        help=field.description or "",
        kind=kind,
        metavar=metavar,
    )


def _plain(annotation: Any) -> Any:  # noqa: ANN401 (a type expression)
    """Return the type itself from ``T | None`` and ``Annotated[T, ...]``."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        return _plain(members[0]) if len(members) == 1 else str
    return annotation


def _option(setting: Setting) -> Callable[[Callable[P, R]], Callable[P, R]]:
    if setting.kind == "table":
        return lambda command: command
    where = [f"env: {setting.variable}", f"file: {setting.key}"]
    if setting.default:
        where.append(f"default: {setting.default}")
    text = f"{setting.help}  [{'; '.join(where)}]"
    if setting.kind == "switch":
        no = setting.flag.replace("--", "--no-", 1)
        return click.option(f"{setting.flag}/{no}", setting.key, default=None, help=text)
    return click.option(
        setting.flag, setting.key, default=None, multiple=setting.kind == "list", metavar=setting.metavar, help=text
    )


def _read_file(model: type[Settings], path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid(f"{path}: {error.strerror}", cure="Give the path of a file that you may read.") from error
    except ValueError as error:
        raise SettingsInvalid(f"{path}: not TOML: {error}") from error
    known = list(model.model_fields)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise SettingsInvalid(f"{path}: {key}: unknown key; {hint}")
    return content


def _mistyped(model: type[Settings], environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable with our prefix that nearly is one of ours. Others belong to other
    commands."""
    known = [PREFIX + name.upper() for name in [*model.model_fields, CONFIG]]
    found = []
    for variable in sorted(environment):
        if variable.startswith(PREFIX) and variable not in known:
            near = difflib.get_close_matches(
                variable.removeprefix(PREFIX), [k.removeprefix(PREFIX) for k in known], 1, 0.7
            )
            if near:
                found.append(f"{variable} is not a setting of this command; did you mean {PREFIX}{near[0]}?")
    return found


def _explain(error: Any, sources: Mapping[str, str]) -> str:  # noqa: ANN401 (pydantic_core.ErrorDetails)
    if not error["loc"]:
        return str(error["msg"])
    key = str(error["loc"][0])
    if error["type"] == "missing" and len(error["loc"]) == 1:
        return f"{_flag(key)} is required; it may also stand in {PREFIX}{key.upper()} or in the settings file as {key}"
    inner = "".join(f".{step}" for step in error["loc"][1:])
    given = repr(error["input"])
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{sources.get(key, _flag(key))}{inner}: {message} (got {given if len(given) <= 80 else given[:77] + '...'})"


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list | set | frozenset):
        return ", ".join(map(str, value))
    return str(value)


def _warn(sentence: str) -> None:
    click.echo(f"warning: {sentence}", err=True)
