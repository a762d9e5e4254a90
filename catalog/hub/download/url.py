"""Reads files from plain web addresses, connecting only to checked public addresses, hop by hop."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from catalog.hub.client import MAX_REDIRECTS, REDIRECTS, HubLimits
from catalog.hub.entries import RepositoryFile, group
from catalog.hub.problems import failure, refusal, wait_s
from catalog.hub.public_address import Resolve, WebAddress, parse_address, public_ips, resolve
from catalog.scan.packages import natural_format
from core.errors import (
    HubAccessDenied,
    HubAnswerInvalid,
    HubNotFound,
    HubRateLimited,
    ImpetusError,
    RequestError,
)

_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
_NAME = re.compile(r"filename\*?\s*=\s*(?:UTF-8'[^']*')?\"?([^\";]+)\"?", re.IGNORECASE)
_LONGEST_NAME = 200
# Of one host; each may take the time limit of a connection.
_MOST_ADDRESSES = 4


class UrlSource:
    """Opens one web address; the same interface to transfers as `HubClient`.  Blocks.

    Of `private_hosts`, which need not be public, only an address of theirs may be redirected to
    another: a page of the internet leads to none of them.
    """

    def __init__(
        self,
        url: str,
        limits: HubLimits | None = None,
        look_up: Resolve = resolve,
        private_hosts: Collection[str] = (),
    ) -> None:
        """Raises RequestError for what is not an address of the web."""
        address = parse_address(url)
        self._url = url
        self._limits = limits or HubLimits()
        self._look_up = look_up
        self._private_hosts = private_hosts if address.is_one_of(private_hosts) else ()
        self.host = address.netloc

    def file_address(self, repository: str, revision: str, path: str) -> str:
        """Return the address."""
        del repository, revision, path
        return self._url

    @contextmanager
    def opened(
        self, address: str, what: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """Open a GET request and yield its response, after up to five checked redirects.

        Raises RequestError for an address that is not public, and the errors `Hub…`.
        """
        try:
            if constants.is_offline_mode():
                raise OfflineModeIsEnabled
            with ExitStack() as stack:
                response = self._follow(stack, address, headers or {})
                if not response.is_success:
                    raise self._refusal(response, what)
                yield response
        except (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled) as problem:
            raise failure(problem, self.host) from problem

    def _refusal(self, response: httpx2.Response, what: str) -> ImpetusError:
        """Return the error for a status that is no success; no advice of a hub's fits here."""
        status = response.status_code
        if status in (404, 410):
            return HubNotFound(f"{self.host} has no such file ({status}); check the address.")
        if status in (401, 403):
            return HubAccessDenied(
                f"{self.host} refuses access to the file ({status}). Download it in a browser, and "
                "put it into a model folder."
            )
        if status == 429:
            seconds = wait_s(response.headers)
            return HubRateLimited(
                f"{self.host} refuses further requests for {seconds} s (429).",
                retry_after_s=seconds,
            )
        return refusal(status, response.headers, self.host, what)

    def probe(self) -> RepositoryFile:
        """Return the file's name and size, from an answer of one byte.

        Raises RequestError for what is not a model's file, HubAnswerInvalid without a size.
        """
        with self.opened(self._url, self.host, {"Range": "bytes=0-0"}) as response:
            total = _TOTAL.fullmatch(response.headers.get("content-range", ""))
            length = response.headers.get("content-length", "")
            size = total[1] if total else length if response.status_code == 200 else ""
            name = _file_name(response.headers.get("content-disposition", ""), self._url)
            kind = response.headers.get("content-type", "")
        if kind.startswith("text/html"):
            raise RequestError(
                "The address is that of a web page; paste the address of the file itself.",
                param="url",
            )
        if not natural_format(Path(name)):
            raise RequestError(
                f"{name[:80]!r} is not a model's file by its name, such as model.gguf.",
                param="url",
            )
        if not size.isdecimal():
            raise HubAnswerInvalid(f"{self.host} does not state the size of {name[:80]}.")
        file = RepositoryFile(name, int(size), "")
        if not any(one.format == "gguf" and not one.missing for one in group((file,), ())):
            raise RequestError(
                f"{name[:80]!r} is a part of a model: its other files, such as shards, config.json "
                "and the tokenizer, are not at this address. Download it from its repository on a "
                "hub, or put all files into a model folder.",
                param="url",
            )
        return file

    def _follow(
        self, stack: ExitStack, address: str, headers: Mapping[str, str]
    ) -> httpx2.Response:
        limits = self._limits
        timeout = httpx2.Timeout(limits.silence_s, connect=limits.connect_s)
        client = stack.enter_context(httpx2.Client(timeout=timeout, follow_redirects=False))
        for _ in range(MAX_REDIRECTS + 1):
            parsed = parse_address(address)
            response = self._connected(stack, client, parsed, headers)
            if response.status_code not in REDIRECTS:
                return response
            address = self._target(parsed, response.headers.get("location", ""))
        raise HubAnswerInvalid(f"{self.host} redirected more than {MAX_REDIRECTS} times.")

    def _connected(
        self,
        stack: ExitStack,
        client: httpx2.Client,
        address: WebAddress,
        headers: Mapping[str, str],
    ) -> httpx2.Response:
        """Return the answer of the first IP address of a host that takes the connection."""
        *others, last = public_ips(address, self._look_up, self._private_hosts)[:_MOST_ADDRESSES]
        own = {"accept-encoding": "identity", **headers, "host": address.netloc}
        extensions = {"sni_hostname": address.host}

        def ask(ip: str) -> httpx2.Response:
            request = client.stream("GET", address.at(ip), headers=own, extensions=extensions)
            return stack.enter_context(request)

        for ip in others:
            with suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return ask(ip)
        return ask(last)

    def _target(self, address: WebAddress, location: str) -> str:
        try:
            target = urljoin(address.text, location)
        except ValueError:
            target = ""
        if address.scheme == "https" and urlsplit(target).scheme == "http":
            raise HubAnswerInvalid(
                f"{self.host} redirected from https to http, which is not followed."
            )
        return target


def _file_name(disposition: str, url: str) -> str:
    """Return the last part of the name that the answer, or else the address, gives a file."""
    named = _NAME.search(disposition)
    text = unquote(named[1]) if named else unquote(urlsplit(url).path)
    name = text.replace("\\", "/").rpartition("/")[2].strip()
    kept = "".join(char for char in name if char.isprintable() and char not in ':*?"<>|')
    return kept.lstrip(".")[-_LONGEST_NAME:]
