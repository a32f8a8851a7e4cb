"""The `waypost` command: flags in, configuration loaded, the right part of the program called.

Owns the verbs, what goes to stdout and stderr, and exit codes: 0 ok, 1 failed, 2 usage or configuration error. The
options that verbs share are in `flags.py` and reach the configuration from there, by way of the context. No logic of
its own beyond that; each verb imports what it needs, so that `waypost version` and `--help` are quick.
"""

from __future__ import annotations

import enum
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gateway.flags import (
    USAGE,
    Admin,
    ConfigFile,
    Dns,
    DrainTimeout,
    Kubeconfig,
    Listen,
    LogFormat,
    LogLevel,
    Namespace,
    PickerCommand,
    Policy,
    Pool,
    Selector,
    TargetPorts,
    To,
    fail,
    said,
    say,
)

if TYPE_CHECKING:
    from picker.config import Config, KnownNames, Loaded, Problem
    from picker.config.flag_values import FlagValues

FAILED = 1

_VERBS = ("run", "picker", "sim", "demo", "validate", "config", "version")


class VerbGroup(TyperGroup):
    """Lists the verbs in the order in which people meet them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in help order."""
        return sorted(super().list_commands(ctx), key=_VERBS.index)


app = typer.Typer(
    name="waypost",
    cls=VerbGroup,
    help="A smart inference gateway: sends every LLM request to the model server that will answer soonest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Show the configuration, its schema or an example.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Output(enum.StrEnum):
    """How a verb prints its result."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]


@app.command()
def run(
    ctx: typer.Context,
    config: ConfigFile = None,
    to: To = None,
    dns: Dns = None,
    pool: Pool = None,
    endpoint_selector: Selector = None,
    endpoint_target_ports: TargetPorts = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    listen: Listen = None,
    admin: Admin = None,
    policy: Policy = None,
    drain_timeout: DrainTimeout = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Run the gateway, an OpenAI-compatible HTTP proxy."""
    loaded = _load(ctx, needs_endpoints=True)
    from gateway.serve import serve_gateway

    raise typer.Exit(_serve(serve_gateway, loaded))


@app.command(cls=PickerCommand)
def picker(
    ctx: typer.Context,
    config: ConfigFile = None,
    to: To = None,
    dns: Dns = None,
    pool: Pool = None,
    endpoint_selector: Selector = None,
    endpoint_target_ports: TargetPorts = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    policy: Policy = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Run the endpoint picker, an ext-proc server for Envoy.

    Starts with the arguments of the reference endpoint picker as they are.
    """
    loaded = _load(ctx, needs_endpoints=True)
    from gateway.serve import serve_picker

    raise typer.Exit(_serve(serve_picker, loaded))


@app.command()
def sim(
    engines: Annotated[int, typer.Option("--engines", min=1, max=256, help="How many simulated model servers.")] = 3,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port of the first one; the others follow. 0: any free ports."),
    ] = 8000,
    model: Annotated[str, typer.Option("--model", help="Name of the model they serve.")] = "sim-8b",
    accelerator: Annotated[
        list[str] | None,
        typer.Option("--accelerator", metavar="NAME", help="Hardware to imitate; repeat it to mix. [H100]"),
    ] = None,
    speed: Annotated[float, typer.Option("--speed", min=0.01, max=1000, help="How much faster than real time.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="NAME", help="A LoRA adapter they offer. Repeatable.")
    ] = None,
    processes: Annotated[bool, typer.Option("--processes", help="Give each one a process of its own.")] = False,
) -> None:
    """Run simulated model servers; no GPU needed."""
    if port and port + engines - 1 > 65535:
        say(f"--port: {engines} ports from {port} up go beyond 65535")
        raise typer.Exit(USAGE)
    from sim.cluster import run_cluster

    try:
        code = run_cluster(
            engines,
            port,
            model=model,
            accelerator=accelerator or ["H100"],
            speed=speed,
            seed=seed,
            lora=lora or [],
            processes=processes,
        )
    except ValueError as error:
        say(str(error))
        raise typer.Exit(USAGE) from None
    raise typer.Exit(code)


@app.command()
def demo() -> None:
    """Show it all on simulated model servers."""
    from gateway.demo import run_demo

    raise typer.Exit(run_demo())


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration file to check.")],
    output: OutputOption = Output.TEXT,
) -> None:
    """Check a configuration file.

    Prints every problem with its line and exits 2 if there is one.
    """
    from picker.config import is_problems, load_endpoint_file

    result = _try_load(file)
    problems = result if isinstance(result, list) else []
    warnings = [] if isinstance(result, list) else list(result.warnings)
    if not isinstance(result, list) and result.config.endpoints.file is not None:
        watched = result.config.endpoints.file
        if watched.exists():
            entries = load_endpoint_file(watched, credentials=frozenset(result.config.credentials))
            problems = entries if is_problems(entries) else []
        else:
            warnings.append(f"endpoints.file: {watched} does not exist yet")
    if output is Output.JSON:
        report = {"ok": not problems, "problems": [p.as_dict() for p in problems], "warnings": warnings}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        raise typer.Exit(USAGE if problems else 0)
    for warning in warnings:
        say(f"warning: {warning}")
    if problems:
        fail(problems)
    typer.echo("ok")


@app.command()
def version(output: OutputOption = Output.TEXT) -> None:
    """Print the version."""
    try:
        number = metadata.version("waypost")
    except metadata.PackageNotFoundError:
        number = "unknown (not installed)"
    if output is Output.JSON:
        typer.echo(json.dumps({"version": number, "python": platform.python_version()}))
    else:
        typer.echo(f"waypost {number}")


@config_app.command("show", cls=PickerCommand)
def config_show(
    ctx: typer.Context,
    config: ConfigFile = None,
    to: To = None,
    dns: Dns = None,
    pool: Pool = None,
    endpoint_selector: Selector = None,
    endpoint_target_ports: TargetPorts = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    listen: Listen = None,
    admin: Admin = None,
    policy: Policy = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Print what is in force and where it came from.

    Takes the flags of run and picker. Each value has its origin: default, file, environment or flag. Secrets are
    masked.
    """
    loaded = _load(ctx)
    from picker.config import effective_json, effective_text

    render = effective_json if output is Output.JSON else effective_text
    typer.echo(render(loaded.config, loaded.origins).rstrip("\n"))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the file, for editors."""
    from picker.config import schema

    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


@config_app.command("example")
def config_example() -> None:
    """Print a commented file with every key."""
    from picker.config import example

    typer.echo(example(), nl=False)


app.add_typer(config_app, name="config")


def _try_load(path: Path | None, flags: FlagValues | None = None) -> Loaded | list[Problem]:
    from picker.config import load

    values, names = (flags.values, flags.names) if flags is not None else ({}, {})
    result = load(path, environ=os.environ, flags=values, known=_known_names(), flag_names=names)
    if isinstance(result, list):
        return result
    return _profile_problems(result) or result


def _load(ctx: typer.Context, *, needs_endpoints: bool = False) -> Loaded:
    """The configuration under a command's options; with problems, prints them and ends the program."""
    result = _try_load(ctx.params["config"], said(ctx))
    if isinstance(result, list):
        fail(result)
    for warning in result.warnings:
        say(f"warning: {warning}")
    if needs_endpoints and not _has_endpoints(result.config):
        say(
            "no endpoints: give --to URL, --pool NAMESPACE/NAME, or endpoints: in the configuration file "
            "(see `waypost config example`)"
        )
        raise typer.Exit(USAGE)
    return result


def _has_endpoints(config: Config) -> bool:
    """Whether endpoints may come from anywhere."""
    there = config.endpoints
    return bool(there.static or there.file or there.dns or there.registration.enabled or config.kubernetes.pools)


def _known_names() -> KnownNames:
    import scorers
    from picker import policies
    from picker.config import KnownNames
    from picker.core import filters, pickers

    return KnownNames(
        policies=frozenset(policies.BUILTIN),
        filters=frozenset(filters.BUILTIN),
        scorers=frozenset(scorers.available()),
        pickers=frozenset(pickers.BUILTIN),
    )


def _profile_problems(loaded: Loaded) -> list[Problem]:
    """Profiles whose plugins refuse their parameters: only building them tells."""
    from picker.config import Problem
    from picker.policies import PluginSpec, PolicyProblem, PolicySpec, build

    problems: list[Problem] = []
    for name, profile in loaded.config.profiles.items():
        spec = PolicySpec(
            filters=[PluginSpec(f.name, params=f.params) for f in profile.filters],
            scorers=[PluginSpec(s.name, s.weight, s.params) for s in profile.scorers],
            picker=PluginSpec(profile.picker.name, params=profile.picker.params),
        )
        try:
            build(name, spec)
        except PolicyProblem as problem:
            under = ("profiles", name)
            origin = next((o for path, o in loaded.origins.items() if path[:2] == under and o.where), None)
            problems.append(Problem(origin.where if origin else "configuration", str(problem), path=".".join(under)))
    return problems


def _serve(serve: Callable[[Loaded], int], loaded: Loaded) -> int:
    """Runs a door; a port that is taken or a certificate that is missing is a line, not a traceback."""
    try:
        return serve(loaded)
    except (OSError, RuntimeError) as error:
        say(f"waypost: {error}")
        return FAILED


def main() -> None:
    """The `waypost` command."""
    app(prog_name="waypost")


if __name__ == "__main__":
    main()
