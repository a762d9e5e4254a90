"""Lets connections to this machine bypass the proxies that the environment names."""

from collections.abc import MutableMapping

_VARIABLES = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bypass_proxies(values: MutableMapping[str, str], host: str = "") -> None:
    """Add loopback, and `host` if given, to the exceptions from proxies in `values`.

    Python's clients read `no_proxy`, others `NO_PROXY`, gRPC `no_grpc_proxy` before `no_proxy`.
    """
    kept = [values.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    names = [name.strip() for text in kept for name in text.split(",")]
    everything = dict.fromkeys(name for name in (*names, *_LOOPBACK, host) if name)
    for name in _VARIABLES:
        values[name] = ",".join(everything)
