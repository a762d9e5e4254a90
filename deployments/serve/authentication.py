"""Refuses a Ray cluster that would run code for everybody who can connect to it."""

from core.errors import ImpetusError


def check_authentication() -> None:
    """Raise ImpetusError if this process' Ray does not require a token.

    Ray's and Serve's listeners unpickle what they receive; the token is what they check first.
    """
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        raise ImpetusError(
            "Ray's token authentication is off, so every program that can connect to Ray could run "
            "code here. Set RAY_AUTH_MODE=token, or start with scripts/serve."
        )
