"""The prefix index in the configuration: what is remembered of the engines' KV caches, how it is learnt and shared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from picker.config.fleet import Name
from picker.config.secrets import Secret
from picker.config.sections import Section
from picker.config.values import Count, FilePath, not_bool, refuse

EventPort = Annotated[int, BeforeValidator(not_bool), Field(ge=1, le=65535)]


class IndexSection(Section):
    """Which endpoint holds which prefix."""

    enabled: bool = Field(default=True, description="Route by what endpoints hold of a prompt.")
    blocks: Count = Field(default=4_000_000, description="Prefix blocks remembered in all; about 100 bytes each.")
    kv_events: Literal["auto", "off"] = Field(
        default="auto", description="Listen to the KV-cache events of engines that publish them."
    )
    kv_events_port: EventPort | None = Field(
        default=None,
        description="Port of the events; each data-parallel rank adds one. [what the engine says, else 5557]",
    )
    kv_replay_port: EventPort | None = Field(
        default=None, description="Port where missed events are asked for. [what the engine says, else 5558]"
    )
    tokenizers: dict[Name, FilePath] = Field(
        default_factory=dict,
        max_length=100,
        description="Directories with tokenizer.json and the chat template, by the engines' name of the model.",
        examples=[{"llama-3-8b": "/models/llama-3-8b"}],
    )
    ask_engines: bool = Field(default=True, description="Have engines tokenise prompts where no tokenizer is given.")
    backend: Literal["memory", "redis"] = Field(
        default="memory", description="redis: replicas share what they learn, and their load."
    )
    redis_url: Secret | None = Field(
        default=None,
        description="redis://, rediss://, unix:// or redis+sentinel://, with user and password if needed.",
        examples=["${REDIS_URL}"],
    )
    redis_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:{}-]{1,64}$")] = Field(
        default="waypost", description="Begins all key names; one per deployment."
    )

    @model_validator(mode="after")
    def _redis_is_named(self) -> IndexSection:
        if self.backend == "redis" and self.redis_url is None:
            raise refuse("needs redis_url", at="backend")
        return self
