"""A task whose value another program brings: the task hands out a token, and whoever has it settles the flight.

With a Redis or Valkey server at MEMOLOCK_REDIS_URL (default redis://localhost:6379/0), start the worker, and ask; each
in a shell of its own:

    celery -A examples.external worker
    python -m examples.external ask tea

The token lies in a list of that server now. Settle the flight by the command line, or by the Python twin of it:

    celery-memolock settle "$(redis-cli LPOP tokens:tea)" '{"price": 7}'
    python -m examples.external settle tea 7

examples/settle.js does the same in Node.
"""

import os
import sys
from typing import Any

import redis
from celery import Celery

from celery_memolock import current_flight, external, memolocked_task

REDIS_URL = os.environ.get("MEMOLOCK_REDIS_URL", "redis://localhost:6379/0")
app = Celery("examples.external", broker=REDIS_URL)
app.conf.memolock_redis_url = REDIS_URL
client: Any = redis.Redis.from_url(REDIS_URL, socket_timeout=None)  # it waits for tokens as long as it takes


@memolocked_task(ttl=30, external=True, external_timeout=60, wait_timeout=60, app=app)
def price(article: str) -> Any:
    """Hand the flight out. What this returns is not the value: that comes with the token."""
    client.rpush(f"tokens:{article}", current_flight.token)
    client.expire(f"tokens:{article}", 60)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ask", article]:
            print(price.get_cached(article))
        case ["settle", article, value]:
            _, token = client.blpop([f"tokens:{article}"])
            print(external.settle(client, token, {"price": int(value)}))
        case _:
            sys.exit(__doc__)
