"""Configures a client for this server.

Shows what would change; --apply writes it and keeps a backup of each file.  Then tests the
connection as the client would: model list, stream, tool call with its result.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

import httpx

from core.proxies import bypass_proxies
from deployments.start.readiness import local_url
from router.clients.check import LIMIT_S, run_checks
from router.clients.client import Client
from router.clients.clients import CLIENTS
from router.clients.files import apply_all, hidden, preview, undo
from router.clients.problems import ConnectError
from router.clients.target import KEY_VARIABLE, Model, Target, normal_url
from scripts.connect_lib.server import choose, list_models
from scripts.server_lib.address import AddressProblem, own_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if everything succeeded, else 1."""
    options = _parser().parse_args(arguments)
    client = CLIENTS[options.client]
    bypass_proxies(os.environ)
    key = options.key or os.environ.get(KEY_VARIABLE, "")
    try:
        if options.undo:
            return _undo(client, is_forced=options.force)
        target = Target(normal_url(options.base_url or _own_url()), key)
        model = choose(list_models(target), options.client, options.model)
        print(f"ok      models: {model.id}, context {model.context_tokens:,} tokens")
        for reason in model.reasons:
            print(f"        {client.title}, {model.level}: {reason}")
        _set_up(client, target, model, is_applied=options.apply)
    except ConnectError as problem:
        sys.stderr.write(f"{hidden(str(problem), [key] if key else [])}\n")
        return 1
    return asyncio.run(_check(client, target, model))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/connect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("client", choices=sorted(CLIENTS))
    parser.add_argument("--model", help="model id or alias (default: the best one for the client)")
    parser.add_argument("--base-url", help="base URL of the server (default: from the settings)")
    parser.add_argument("--key", help="API key of the server (default: IMPETUS_API_KEY)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--apply", action="store_true", help="write the changes and keep backups")
    action.add_argument("--undo", action="store_true", help="restore the newest backups")
    parser.add_argument(
        "--force", action="store_true", help="with --undo: restore even if a file was changed since"
    )
    return parser


def _own_url() -> str:
    try:
        return local_url(own_settings())
    except AddressProblem as problem:
        raise ConnectError(str(problem)) from problem


def _set_up(client: Client, target: Target, model: Model, *, is_applied: bool) -> None:
    if client.text is not None:
        print(f"\n{client.text(target, model)}\n")
        return
    edits = [change.planned() for change in client.changes(target, model)]
    changes = [edit for edit in edits if edit.changes_something]
    if not changes:
        print(f"        {client.title} is set up already: {edits[0].path}")
        return
    secrets = [target.key] if target.key else []
    for edit in changes:
        print(f"\n{preview(edit, secrets)}")
    print()
    if not is_applied:
        print("        Nothing was written; run again with --apply to write it.")
        return
    for edit, backup in zip(changes, apply_all(changes), strict=True):
        print(f"ok      written: {edit.path} (backup: {backup})")
    for hint in (client.key_hint if target.key else "", client.hint):
        if hint:
            print(f"        {hint}")


def _undo(client: Client, *, is_forced: bool) -> int:
    paths = client.paths()
    if not paths:
        raise ConnectError(
            f"Nothing to undo: scripts/connect writes no files for {client.title}; remove by hand "
            "what you copied."
        )
    backups = [(path, undo(path, is_forced=is_forced)) for path in paths]
    for path, backup in backups:
        print(f"ok      restored: {path}" if backup else f"        no backup of {path}")
    return 0 if any(backup for _, backup in backups) else 1


async def _check(client: Client, target: Target, model: Model) -> int:
    code = 0
    async with httpx.AsyncClient(timeout=LIMIT_S) as http:
        async for outcome in run_checks(http, client.wire, target, model):
            if outcome.problem:
                code = 1
                problem = hidden(outcome.problem, [target.key] if target.key else [])
                print(f"FAILED  {outcome.name}: {problem}")
            else:
                print(f"ok      {outcome.name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
