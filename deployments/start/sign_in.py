"""Makes the link that signs a browser in, once."""

import time

from catalog.key_store import KeyStore
from core.settings import Settings
from deployments.start.readiness import local_url


def sign_in_link(settings: Settings, store: KeyStore | None = None) -> str:
    """Return a link that opens one session within the next hour.  Raises ImpetusError."""
    own = store or KeyStore(settings.key_database)
    try:
        return f"{local_url(settings)}/session?code={own.create_link_code(now=time.time())}"
    finally:
        if store is None:
            own.close()
