"""How to talk to a group of endpoints: API key, CA, client certificate, server name. Owns the TLS contexts."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Credentials:
    """One entry of the configuration's `credentials`. The key never shows in a repr.

    Raises ValueError for a key that no header may carry.
    """

    api_key: str | None = field(default=None, repr=False)
    ca: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    server_name: str | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("an API key must be one line of printable ASCII characters")

    @property
    def has_files(self) -> bool:
        """Whether a TLS context of these reads files that were configured."""
        return self.ca is not None or self.client_cert is not None


def tls_context(credentials: Credentials) -> ssl.SSLContext:
    """A client context for these credentials. Raises OSError or ssl.SSLError when a file is missing or no
    certificate.
    """
    context = ssl.create_default_context(cafile=credentials.ca)
    if credentials.client_cert is not None:
        context.load_cert_chain(credentials.client_cert, credentials.client_key)
    if not credentials.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
