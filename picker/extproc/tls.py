"""Server credentials: a self-signed certificate by default, or files that are read again when they change.

The key is EC P-256: made in under a millisecond, and every TLS 1.2 stack takes it. gRPC offers ALPN `h2` by itself.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from picker.extproc.settings import TlsSettings

VALIDITY = datetime.timedelta(days=3650)
# Certificates are valid a while before they are made: the clocks of proxy and picker may differ.
_CLOCK_SKEW = datetime.timedelta(hours=1)


def self_signed(names: tuple[str, ...] = ("waypost-picker", "localhost")) -> tuple[bytes, bytes]:
    """A new (key, certificate) pair in PEM for the DNS names given."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Waypost"), x509.NameAttribute(NameOID.COMMON_NAME, names[0])]
    )
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


class CertificateFiles:
    """Certificate and key on disk, read again for a new connection when their modification times changed.

    Raises OSError at construction when a file cannot be read. Later a pair that cannot be read, or is half written,
    changes nothing: the old one stays in use.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._paths = [Path(settings.cert_file), Path(settings.key_file)]
        if settings.client_ca_file:
            self._paths.append(Path(settings.client_ca_file))
        self._seen = self._stamp()
        self.initial = self._read()

    def changed(self) -> object | None:
        """The new configuration, None when nothing changed. Called by gRPC for every handshake, on a thread of its
        own.
        """
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            configuration = self._read()
        except (OSError, ValueError):
            return None
        self._seen = stamp
        return configuration

    def _stamp(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._paths)

    def _read(self) -> object:
        certificate, key, *client_ca = (path.read_bytes() for path in self._paths)
        private = serialization.load_pem_private_key(key, password=None)
        public = x509.load_pem_x509_certificate(certificate).public_key()
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if public.public_bytes(*form) != private.public_key().public_bytes(*form):
            raise ValueError("certificate and key do not belong together")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)


def server_credentials(settings: TlsSettings) -> grpc.ServerCredentials:
    """Credentials for the ext-proc port. Raises OSError or ValueError when configured files cannot be used."""
    if not settings.cert_file:
        return grpc.ssl_server_credentials([self_signed()])
    files = CertificateFiles(settings)
    changed = files.changed if settings.reload else _unchanged
    return grpc.dynamic_ssl_server_credentials(
        files.initial, changed, require_client_authentication=bool(settings.client_ca_file)
    )


def _unchanged() -> None:
    """For files that are read once."""
