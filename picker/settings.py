"""From the configuration to what the rooms want to know. Values in, values out; nothing is started here."""

from __future__ import annotations

from picker import policies
from picker.config import Config, ProfileEntry
from picker.core.datastore import Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.scheduler import Profile
from picker.policies import PluginSpec, PolicySpec
from picker.signals.settings import ScrapeSettings
from picker.upstream.credentials import Credentials

# A model list is believed for this many of its intervals.
MODELS_BELIEVED_INTERVALS = 4


def build_profile(config: Config) -> Profile:
    """The profile of the configured policy. Raises picker.policies.PolicyProblem when a plugin cannot be built."""
    entry = config.profiles.get(config.policy)
    spec = policies.BUILTIN[config.policy] if entry is None else _policy(entry)
    return policies.build(config.policy, spec)


def _policy(entry: ProfileEntry) -> PolicySpec:
    return PolicySpec(
        filters=tuple(PluginSpec(plugin.name, params=plugin.params) for plugin in entry.filters),
        scorers=tuple(PluginSpec(plugin.name, plugin.weight, plugin.params) for plugin in entry.scorers),
        picker=PluginSpec(entry.picker.name, params=entry.picker.params),
    )


def health_limits(config: Config) -> HealthLimits:
    """When an endpoint loses traffic."""
    health = config.health
    return HealthLimits(
        probe_failures=health.probe_failures,
        hung_after_s=health.hung_after,
        breaker_failures=health.breaker_failures,
        breaker_open_s=health.breaker_open,
        breaker_open_max_s=health.breaker_open_max,
    )


def credentials(config: Config) -> dict[str, Credentials]:
    """By the names entries use. Secrets leave their wrapping here."""
    return {
        name: Credentials(
            api_key=entry.api_key.get_secret_value() if entry.api_key is not None else None,
            ca=str(entry.ca) if entry.ca is not None else None,
            client_cert=str(entry.client_cert) if entry.client_cert is not None else None,
            client_key=str(entry.client_key) if entry.client_key is not None else None,
            server_name=entry.server_name,
            verify=entry.verify,
        )
        for name, entry in config.credentials.items()
    }


def freshness(config: Config) -> Freshness:
    """How long figures and model lists count."""
    return Freshness(
        signals_s=config.scrape.stale_after, models_s=MODELS_BELIEVED_INTERVALS * config.scrape.models_interval
    )


def deadlines(config: Config) -> Deadlines:
    """How long requests may take."""
    return Deadlines(
        first_byte_s=config.timeouts.first_byte,
        between_chunks_s=config.timeouts.between_chunks,
        total_s=config.timeouts.total,
    )


def scrape_settings(config: Config) -> ScrapeSettings:
    """How often and how patiently engines are asked."""
    return ScrapeSettings(
        busy_s=config.scrape.busy_interval,
        idle_s=config.scrape.idle_interval,
        timeout_s=config.scrape.timeout,
        models_s=config.scrape.models_interval,
    )
