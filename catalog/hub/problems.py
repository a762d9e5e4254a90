"""Turns what goes wrong between this machine and a hub into errors that say what to do; pure."""

from collections.abc import Mapping

import httpx2
from huggingface_hub.errors import OfflineModeIsEnabled

from core.errors import (
    HubAccessDenied,
    HubAnswerInvalid,
    HubNotFound,
    HubOffline,
    HubRateLimited,
    HubTokenRejected,
    HubTooSlow,
    HubUnavailable,
    ImpetusError,
)

_DEFAULT_WAIT_S = 60
_LONGEST_WAIT_S = 3600
_STORE = "Store (`scripts/models token set`)"
# Source: what huggingface_hub's hf_raise_for_status looks for.
_STALE = "Invalid credentials in Authorization header"
_DISABLED = "Access to this resource is disabled."


def is_stale_token(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a hub refused a request because it does not know the token."""
    return status == 401 and headers.get("x-error-message", "") == _STALE


def refusal(status: int, headers: Mapping[str, str], host: str, what: str) -> ImpetusError:
    """Return the error for an answer with `status`, from 300 on; header names are in lower case.

    `what` is what was asked for, such as a repository's name.
    """
    code = headers.get("x-error-code", "")
    if is_stale_token(status, headers):
        return HubTokenRejected(
            f"{host} does not know the token in use, and {what} needs one. {_STORE} one that is "
            "valid (huggingface.co/settings/tokens), or sign in with `hf auth login`."
        )
    if code == "GatedRepo":
        return _gated(status, host, what)
    if headers.get("x-error-message", "") == _DISABLED:
        return HubAccessDenied(f"{what} was disabled by {host}; choose another repository.")
    if code in ("RevisionNotFound", "EntryNotFound"):
        missing = "revision" if code == "RevisionNotFound" else "file"
        return HubNotFound(f"{host} has no such {missing} of {what}.", param="name")
    if status == 404 or code == "RepoNotFound":
        return HubNotFound(
            f"{host} has no {what}, or shows it to members only. Check the spelling; for a private "
            f"repository, {_STORE.lower()} a token that may read it.",
            param="name",
        )
    if status in (401, 403):
        return HubAccessDenied(
            f"{host} refuses access to {what} ({status}). {_STORE} a token that may read it."
        )
    if status == 429:
        seconds = wait_s(headers)
        return HubRateLimited(
            f"{host} refuses further requests for {seconds} s (429). A token allows more of them: "
            f"{_STORE.lower()} one.",
            retry_after_s=seconds,
        )
    if status >= 500:
        return HubUnavailable(
            f"{host} fails at the moment ({status}); try again later.",
            retry_after_s=wait_s(headers, None),
        )
    return HubAnswerInvalid(f"{host} answered {what} with the unexpected status {status}.")


def _gated(status: int, host: str, what: str) -> HubAccessDenied:
    page = f"https://{host}/{what}"
    if status == 401:
        return HubAccessDenied(
            f"{what} is gated: accept its terms at {page}, then {_STORE.lower()} a token of "
            "the same account."
        )
    return HubAccessDenied(
        f"{what} is gated, and the account of the token in use has no access: accept its terms at "
        f"{page}, and wait for its owner if they are reviewed."
    )


def wait_s(headers: Mapping[str, str], default: int | None = _DEFAULT_WAIT_S) -> int | None:
    """Return the seconds of Retry-After, an hour at most; `default` for a date or without one."""
    text = headers.get("retry-after", "").strip()
    return min(int(text), _LONGEST_WAIT_S) if text.isdecimal() and len(text) < 10 else default


def failure(problem: Exception, host: str) -> ImpetusError:
    """Return the error for a request that got no whole answer."""
    match problem:
        case OfflineModeIsEnabled():
            return HubOffline(
                f"{host} is not asked: offline mode is on. Unset HF_HUB_OFFLINE and "
                "TRANSFORMERS_OFFLINE to go online."
            )
        case httpx2.TimeoutException():
            return HubTooSlow(f"{host} did not answer in time; try again later.")
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return HubUnavailable(
                f"{host!r} is not the address of a hub; set HF_ENDPOINT to one, such as "
                "https://huggingface.co, or unset it."
            )
        case httpx2.RemoteProtocolError() | httpx2.DecodingError():
            return HubUnavailable(f"The connection to {host} broke off; try again.")
        case _:
            return HubUnavailable(
                f"{host} cannot be reached. Check the network, the proxy and HF_ENDPOINT."
            )
