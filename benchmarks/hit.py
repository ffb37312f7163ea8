"""What a hit costs, beside the client's own GET and JSON decoding, and beside a bare socket.

All are measured in one process, interleaved, round after round; a ratio is formed within its round.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import redis
from celery import Celery

from benchmarks.harness import arguments, record, spread
from celery_memolock import memolocked_task
from celery_memolock.server import serve_or_use

VALUE = {"queue": "q1", "waiting": 5500, "names": ["ada", "grace", "edsger"]}

app = Celery("benchmarks.hit")


@memolocked_task(ttl=600, app=app)
def queue_size(queue_id: str) -> dict[str, object]:
    return dict(VALUE)


def bare_socket(url: str, key: str) -> Callable[[], object]:
    """Return a function that sends a ready-made GET over a socket and reads the answer: the limit."""
    parts = urlsplit(url)
    link = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    command = f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode()

    def get() -> object:
        link.sendall(command)
        return link.recv(65536)

    return get


def measure(get: Callable[[], object], calls: int) -> float:
    """Return microseconds per call."""
    began = time.perf_counter()
    for _ in range(calls):
        get()
    return (time.perf_counter() - began) / calls * 1e6


def main() -> None:
    args = arguments(__doc__, rounds=15, calls=3000)
    with serve_or_use() as url:
        app.conf.memolock_redis_url = url
        queue_size.set_cached(dict(VALUE), "q1")
        client = redis.Redis.from_url(url)
        client.set("bare", json.dumps(VALUE))
        contenders: dict[str, Callable[[], object]] = {
            "bare socket GET": bare_socket(url, "bare"),
            "redis.Redis.get + json.loads": lambda: json.loads(client.get("bare")),  # type: ignore[arg-type]
            "get_cached": lambda: queue_size.get_cached("q1"),
        }
        for get in contenders.values():
            measure(get, args.calls // 10)
        rounds = [{name: measure(get, args.calls) for name, get in contenders.items()} for _ in range(args.rounds)]
        results = {
            "microseconds": {name: spread([each[name] for each in rounds]) for name in contenders},
            "get_cached as a multiple of": {
                name: spread([each["get_cached"] / each[name] for each in rounds])
                for name in contenders
                if name != "get_cached"
            },
        }
        record("hit", url, results, args)


if __name__ == "__main__":
    main()
