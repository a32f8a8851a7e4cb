"""The options of the commands: how each is spelled and explained, and what a command line says in all.

Owns no meaning: values go to the configuration by path. Imports what it needs when it needs it, so that `waypost
version` and `--help` are quick.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from picker.config import Problem
    from picker.config.flag_values import FlagValues, Given

USAGE = 2

# What the options that commands share set; the flag is the parameter's name with dashes.
_PATHS: Mapping[str, str] = {
    "to": "endpoints.static",
    "dns": "endpoints.dns",
    "namespace": "kubernetes.namespace",
    "kubeconfig": "kubernetes.kubeconfig",
    "listen": "listen",
    "admin": "admin.listen",
    "policy": "policy",
    "drain_timeout": "drain.timeout",
    "log_level": "log.level",
    "log_format": "log.format",
}
_GIVEN = "waypost.reference"


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text)


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", envvar="WAYPOST_CONFIG", help="Configuration file (YAML)."),
]
To = Annotated[list[str] | None, _option("--to", "URL", "A model server, such as http://10.0.0.1:8000. Repeatable.")]
Dns = Annotated[list[str] | None, _option("--dns", "NAME:PORT", "Every address of NAME is a model server. Repeatable.")]
Pool = Annotated[list[str] | None, _option("--pool", "NS/NAME", "A Kubernetes InferencePool to follow. Repeatable.")]
Selector = Annotated[
    str | None, _option("--endpoint-selector", "LABELS", "Pods with these labels, such as app=vllm, are model servers.")
]
TargetPorts = Annotated[
    list[str] | None, _option("--endpoint-target-ports", "PORTS", "Their ports, such as 8000,8001. Repeatable.")
]
Namespace = Annotated[
    str | None, _option("--namespace", "NAME", "Where pools named without one are. [$NAMESPACE, else the pod's own]")
]
Kubeconfig = Annotated[
    str | None, _option("--kubeconfig", "FILE", "Outside a cluster. [$KUBECONFIG or ~/.kube/config]")
]
Policy = Annotated[
    str | None, _option("--policy", "NAME", "balanced, least-loaded, round-robin, random, or a profile of the file.")
]
LogLevel = Annotated[str | None, _option("--log-level", "LEVEL", "debug, info, warning or error. [info]")]
LogFormat = Annotated[str | None, _option("--log-format", "FORMAT", "auto, json or console. [auto]")]
DrainTimeout = Annotated[
    str | None, _option("--drain-timeout", "DURATION", "Longest wait for requests in progress after SIGTERM. [30s]")
]
Listen = Annotated[str | None, _option("--listen", "HOST:PORT", "Where the gateway listens. [127.0.0.1:8080]")]
Admin = Annotated[str | None, _option("--admin", "HOST:PORT", "Health, metrics and debug pages. [127.0.0.1:9090]")]


class PickerCommand(TyperCommand):
    """Takes the flags of the reference endpoint picker too, as its manifests spell them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Sets the reference's flags aside for `given` before the usual parsing."""
        from picker.config.reference_arguments import read_flags

        own = {
            name.lstrip("-"): not getattr(option, "is_flag", False)
            for option in self.get_params(ctx)
            for name in option.opts
        }
        reading = read_flags(args, own)
        ctx.meta[_GIVEN] = reading.given
        refuse(reading.said.problems)
        return super().parse_args(ctx, reading.rest)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The command's own options, then the flags of the table."""
        from picker.config.reference_flags import FLAGS, help_rows

        super().format_options(ctx, formatter)
        ignored = ", ".join(f"--{name}" for name, flag in FLAGS.items() if flag.ignored)
        with formatter.section("Flags of the endpoint picker, one dash or two, also in camelCase"):
            formatter.write_dl(list(help_rows()))
        with formatter.section("Accepted without effect"):
            formatter.write_text(ignored)


def said(ctx: typer.Context) -> FlagValues:
    """Everything a command line says. Tells what has no effect; ends the program if something cannot be."""
    from picker.config.pool_flags import pool_values
    from picker.config.reference_flags import settings
    from picker.sources.static import usual_url

    options: Mapping[str, Any] = ctx.params
    given: Mapping[str, Given] = ctx.meta.get(_GIVEN, {})
    configured = options["config"] is not None or "WAYPOST_PICKER__CERT_PATH" in os.environ
    values = settings(given, configured=configured)
    values.add(
        pool_values(options["pool"] or (), options["endpoint_selector"], options["endpoint_target_ports"] or (), given)
    )
    for name, path in _PATHS.items():
        value = options.get(name)
        if value is None or value == ():
            continue
        texts = [usual_url(url) for url in value] if name == "to" else value
        values.put(path, texts, f"--{name.replace('_', '-')}")
    refuse(values.problems)
    for warning in values.warnings:
        say(f"warning: {warning}")
    return values


def refuse(problems: Sequence[Problem]) -> None:
    """Ends the program if there are problems, after printing them."""
    if problems:
        fail(problems)


def fail(problems: Sequence[Problem]) -> NoReturn:
    """Prints problems and ends the program."""
    for problem in problems:
        say(str(problem))
    raise typer.Exit(USAGE)


def say(line: str) -> None:
    """One line for people."""
    typer.echo(line, err=True)
