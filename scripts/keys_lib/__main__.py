"""Lists, creates and revokes API keys, and prints sign-in links for browsers.

Works on the key database in the data folder: the server need not run, and a running one notices
changes within a second.  As soon as a key exists, every request needs one.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from catalog.key_store import KeyStore
from core.errors import ImpetusError
from core.keys import SCOPES
from core.settings import Settings
from deployments.start.checks import read_settings
from deployments.start.sign_in import sign_in_link

_CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
_DAY_S = 24 * 3600.0
_MOST_DAYS = 36_500.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after an error, which is printed."""
    options = _parser().parse_args(arguments)
    try:
        settings = read_settings(options.config)
        store = KeyStore(settings.key_database)
        try:
            options.run(store, settings, options)
        finally:
            store.close()
    except ImpetusError as problem:
        sys.stderr.write(f"{problem.message}\n")
        return 1
    return 0


def _list(store: KeyStore, settings: Settings, options: argparse.Namespace) -> None:
    del settings
    keys = [stored.key for stored in store.stored()]
    if options.json:
        print(json.dumps({"keys": [key.described() for key in keys]}))
        return
    if not keys:
        print("There are no API keys.")
        return
    rows = [("ID", "NAME", "SCOPES", "EXPIRES", "LAST USE")]
    for key in keys:
        expiry = "never" if key.expires_at is None else _day(key.expires_at)
        if not key.is_valid_at(time.time()):
            expiry = f"expired {expiry}"
        use = "never" if key.last_used_at is None else _day(key.last_used_at)
        rows.append((key.id, key.name, ",".join(sorted(key.scopes)), expiry, use))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


def _create(store: KeyStore, settings: Settings, options: argparse.Namespace) -> None:
    now = time.time()
    days = options.expires_in_days
    expires_at = None if days is None else now + days * _DAY_S
    is_first = settings.api_key is None and not store.stored()
    scopes = options.scope or ["inference"]
    key, text = store.create(options.name, scopes, now=now, expires_at=expires_at)
    if options.json:
        print(json.dumps({**key.described(), "key": text}))
        return
    print(text)
    # Apart from the key, so that a script can read that alone.
    sys.stderr.write("The key is shown this once. Send it as `Authorization: Bearer KEY`.\n")
    if is_first:
        sys.stderr.write("It is the first one: from now on every request needs a key.\n")


def _revoke(store: KeyStore, settings: Settings, options: argparse.Namespace) -> None:
    store.revoke(options.id)
    is_open = settings.api_key is None and not settings.is_public and not store.stored()
    if options.json:
        print(json.dumps({"revoked": options.id}))
        return
    print(f"The key {options.id} is revoked.")
    if is_open:
        print("It was the last one: programs on this machine need no key any more.")


def _link(store: KeyStore, settings: Settings, options: argparse.Namespace) -> None:
    link = sign_in_link(settings, store)
    print(json.dumps({"link": link}) if options.json else link)


def _day(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def _days(text: str) -> float:
    days = float(text)
    if not 0 < days <= _MOST_DAYS:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {_MOST_DAYS:,.0f} days")
    return days


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=_CONFIG, help="the server's configuration file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="list the keys, without their texts")
    listing.set_defaults(run=_list)
    creation = commands.add_parser("create", help="create a key and print it, this once")
    creation.add_argument("name", help="what the key is for")
    creation.add_argument(
        "--scope",
        action="append",
        choices=sorted(SCOPES),
        help="what it may do; may be repeated; inference without it",
    )
    creation.add_argument("--expires-in-days", type=_days, help="it never expires without it")
    creation.set_defaults(run=_create)
    revocation = commands.add_parser("revoke", help="delete a key")
    revocation.add_argument("id", help="the id that `list` shows")
    revocation.set_defaults(run=_revoke)
    link = commands.add_parser("link", help="print a link that signs a browser in, once")
    link.set_defaults(run=_link)
    return parser


if __name__ == "__main__":
    sys.exit(main())
