"""Secrets of a configuration: where they come from and how they stay hidden.

A secret is written as `${NAME}` (environment), `file:/path` (a file, trailing line end removed) or, for experiments, as
itself. Error texts name the variable or the file, never the value. Only this file turns a reference into its value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, SecretStr, ValidationInfo, WithJsonSchema

from picker.config.values import context_of, refuse

REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
MAX_SECRET_BYTES = 64 * 1024


def resolve_secret(value: object, info: ValidationInfo) -> SecretStr:
    """The secret behind what the file says. Raises a refusal which never holds the value."""
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, str):
        raise refuse("must be text: ${NAME}, file:/path or the secret itself in quotes")
    whole = REFERENCE.fullmatch(value)
    if whole:
        secret = _from_environment(whole[1], info)
    elif value.startswith("file:"):
        secret = _from_file(value.removeprefix("file:"))
    elif "${" in value:
        raise refuse("must be ${NAME} alone, without text around it")
    else:
        secret = value
    if not secret:
        raise refuse("must not be empty")
    if not (secret.isascii() and secret.isprintable()):
        # The value becomes an HTTP header; a line end in it would let it add headers of its own.
        raise refuse("must be one line of printable ASCII characters")
    return SecretStr(secret)


def _from_environment(name: str, info: ValidationInfo) -> str:
    found = context_of(info).environ.get(name)
    if found is None:
        raise refuse(f"environment variable {name} is not set")
    if not found:
        raise refuse(f"environment variable {name} is empty")
    return found


def _from_file(name: str) -> str:
    path = Path(name)
    if not path.is_absolute():
        raise refuse("must have an absolute path after file:")
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > MAX_SECRET_BYTES:
        raise refuse(f"{path} holds more than 64KiB")
    text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
    if not text:
        raise refuse(f"{path} is empty")
    return text


Secret = Annotated[
    SecretStr,
    BeforeValidator(resolve_secret),
    WithJsonSchema(
        {"type": "string", "examples": ["${WAYPOST_ADMIN_TOKEN}", "file:/run/secrets/token"], "writeOnly": True}
    ),
]
