"""The `waypost` command: flags in, configuration loaded, the right part of the program called.

Owns the spelling of flags, what goes to stdout and stderr, and exit codes: 0 ok, 1 failed, 2 usage or configuration
error. No logic of its own beyond that; each verb imports what it needs, so that `waypost version` and `--help` are
quick.
"""

from __future__ import annotations

import enum
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from picker.config import KnownNames, Loaded, Problem

FAILED = 1
USAGE = 2

_FLAG_NAMES: Mapping[tuple[str, ...], str] = {
    ("endpoints", "static"): "--to",
    ("admin", "listen"): "--admin",
    ("picker", "cert_reload"): "--enable-cert-reload",
    ("drain", "timeout"): "--drain-timeout",
    ("log", "level"): "--log-level",
    ("log", "format"): "--log-format",
}
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


class PickerCommand(TyperCommand):
    """Takes the flags of the reference endpoint picker as its manifests spell them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Handle switches, flags without effect here, and flags for pools before the usual parsing."""
        from picker.config.reference_flags import POOL, set_aside, spell_out_switches

        kept, aside = set_aside(spell_out_switches(args))
        pools = [flag for flag in aside if flag in POOL]
        if pools:
            _say(
                f"{', '.join(pools)}: Kubernetes pools are not supported yet by this version; "
                "name the model servers with --to URL or under endpoints: in the configuration file"
            )
            raise typer.Exit(USAGE)
        if aside:
            _say(f"warning: {', '.join(aside)}: accepted for compatibility, without effect (see --log-level)")
        return super().parse_args(ctx, kept)


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text)


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", envvar="WAYPOST_CONFIG", help="Configuration file (YAML)."),
]
To = Annotated[list[str] | None, _option("--to", "URL", "A model server, such as http://10.0.0.1:8000. Repeatable.")]
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
Host = Annotated[str | None, _option("--host", "IP", "Address that all ports bind to. [0.0.0.0]")]
GrpcPort = Annotated[int | None, _option("--grpc-port", "PORT", "ext-proc and gRPC health. [9002]")]
HealthPort = Annotated[int | None, _option("--grpc-health-port", "PORT", "gRPC health alone, without TLS. [9003]")]
MetricsPort = Annotated[int | None, _option("--metrics-port", "PORT", "Health, metrics and debug pages. [9090]")]
SecureServing = Annotated[
    str | None, _option("--secure-serving", "BOOL", "TLS on the gRPC port: true or false. [true]")
]
CertPath = Annotated[
    str | None, _option("--cert-path", "DIR", "Directory with tls.crt and tls.key. [a self-signed certificate]")
]
CertReload = Annotated[
    str | None, _option("--enable-cert-reload", "BOOL", "Read the certificate again when it changes. [false]")
]
ResponsePath = Annotated[
    str | None, _option("--response-path", "MODE", "observe responses, or leave after the request. [observe]")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]


@app.command()
def run(
    config: ConfigFile = None,
    to: To = None,
    listen: Listen = None,
    admin: Admin = None,
    policy: Policy = None,
    drain_timeout: DrainTimeout = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Run the gateway, an OpenAI-compatible HTTP proxy."""
    flags: dict[tuple[str, ...] | str, object] = {
        "endpoints.static": _urls(to),
        "listen": listen,
        "admin.listen": admin,
        "policy": policy,
        "drain.timeout": drain_timeout,
        "log.level": log_level,
        "log.format": log_format,
    }
    loaded = _load(config, flags, needs_endpoints=True)
    from gateway.serve import serve_gateway

    raise typer.Exit(_serve(serve_gateway, loaded))


@app.command(cls=PickerCommand)
def picker(
    config: ConfigFile = None,
    to: To = None,
    policy: Policy = None,
    host: Host = None,
    grpc_port: GrpcPort = None,
    grpc_health_port: HealthPort = None,
    metrics_port: MetricsPort = None,
    secure_serving: SecureServing = None,
    cert_path: CertPath = None,
    enable_cert_reload: CertReload = None,
    response_path: ResponsePath = None,
    drain_timeout: DrainTimeout = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Run the endpoint picker, an ext-proc server for Envoy."""
    flags: dict[tuple[str, ...] | str, object] = {
        "endpoints.static": _urls(to),
        "policy": policy,
        "picker.host": host,
        "picker.grpc_port": grpc_port,
        "picker.grpc_health_port": grpc_health_port,
        "picker.metrics_port": metrics_port,
        "picker.secure_serving": secure_serving,
        "picker.cert_path": cert_path,
        "picker.cert_reload": enable_cert_reload,
        "picker.response_path": response_path,
        "drain.timeout": drain_timeout,
        "log.level": log_level,
        "log.format": log_format,
    }
    loaded = _load(config, flags, needs_endpoints=True)
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
        _say(f"--port: {engines} ports from {port} up go beyond 65535")
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
        _say(str(error))
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

    result = _try_load(file, {})
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
        _say(f"warning: {warning}")
    if problems:
        _fail(problems)
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


@config_app.command("show")
def config_show(
    config: ConfigFile = None,
    to: To = None,
    listen: Listen = None,
    admin: Admin = None,
    policy: Policy = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Print what is in force and where it came from.

    Each value has its origin: default, file, environment or flag. Secrets are masked.
    """
    loaded = _load(config, {"endpoints.static": _urls(to), "listen": listen, "admin.listen": admin, "policy": policy})
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


def _urls(to: Sequence[str] | None) -> list[str] | None:
    """The `--to` arguments as URLs: a bare HOST:PORT and the `/v1` of SDK base URLs are what people type."""
    from picker.sources.static import usual_url

    return [usual_url(text) for text in to] if to else None


def _try_load(path: Path | None, flags: Mapping[tuple[str, ...] | str, object]) -> Loaded | list[Problem]:
    from picker.config import load

    result = load(path, environ=os.environ, flags=flags, known=_known_names(), flag_names=_FLAG_NAMES)
    if isinstance(result, list):
        return result
    return _profile_problems(result) or result


def _load(path: Path | None, flags: Mapping[tuple[str, ...] | str, object], *, needs_endpoints: bool = False) -> Loaded:
    """The configuration; with problems, prints them and ends the program."""
    result = _try_load(path, flags)
    if isinstance(result, list):
        _fail(result)
    for warning in result.warnings:
        _say(f"warning: {warning}")
    endpoints = result.config.endpoints
    if needs_endpoints and not endpoints.static and endpoints.file is None:
        _say("no endpoints: give --to URL, or endpoints: in the configuration file (see `waypost config example`)")
        raise typer.Exit(USAGE)
    return result


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


def _fail(problems: Sequence[Problem]) -> NoReturn:
    for problem in problems:
        _say(str(problem))
    raise typer.Exit(USAGE)


def _serve(serve: Callable[[Loaded], int], loaded: Loaded) -> int:
    """Runs a door; a port that is taken or a certificate that is missing is a line, not a traceback."""
    try:
        return serve(loaded)
    except (OSError, RuntimeError) as error:
        _say(f"waypost: {error}")
        return FAILED


def _say(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """The `waypost` command."""
    app(prog_name="waypost")


if __name__ == "__main__":
    main()
