"""The configuration: one YAML file, environment, flags and defaults to one frozen value, with located errors.

Sits above `scorers` and `picker.core` and imports neither: names of plugins come in as `KnownNames`. Prints nothing.
"""

from picker.config.announcement import Announcement
from picker.config.fleet import CredentialsEntry, DnsEntry, EndpointEntry, EndpointsSection, RegistrationSection
from picker.config.index import IndexSection
from picker.config.kubernetes import KubernetesSection, PoolEntry, RoleLabel
from picker.config.layers import CONFIG_VARIABLE, Origin
from picker.config.load import Loaded, is_problems, load, load_endpoint_file, parse_announcement
from picker.config.model import Config, FilterEntry, PickerEntry, ProfileEntry, ScorerEntry
from picker.config.problems import KeyPath, Problem
from picker.config.sections import (
    AdminSection,
    DrainSection,
    GatewaySection,
    HealthSection,
    LimitsSection,
    LogSection,
    PickerSection,
    ScrapeSection,
    TimeoutsSection,
)
from picker.config.selector import LabelSelector, matching, parse_selector
from picker.config.show import effective_json, effective_text, example, leaves, schema
from picker.config.values import HostPort, KnownNames, MemoryBound, format_duration, format_size

__all__ = [
    "CONFIG_VARIABLE",
    "AdminSection",
    "Announcement",
    "Config",
    "CredentialsEntry",
    "DnsEntry",
    "DrainSection",
    "EndpointEntry",
    "EndpointsSection",
    "FilterEntry",
    "GatewaySection",
    "HealthSection",
    "HostPort",
    "IndexSection",
    "KeyPath",
    "KnownNames",
    "KubernetesSection",
    "LabelSelector",
    "LimitsSection",
    "Loaded",
    "LogSection",
    "MemoryBound",
    "Origin",
    "PickerEntry",
    "PickerSection",
    "PoolEntry",
    "Problem",
    "ProfileEntry",
    "RegistrationSection",
    "RoleLabel",
    "ScorerEntry",
    "ScrapeSection",
    "TimeoutsSection",
    "effective_json",
    "effective_text",
    "example",
    "format_duration",
    "format_size",
    "is_problems",
    "leaves",
    "load",
    "load_endpoint_file",
    "matching",
    "parse_announcement",
    "parse_selector",
    "schema",
]
