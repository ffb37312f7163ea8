"""Web processes that fork, end while they wait, or run greenlets."""

from __future__ import annotations

import json

from tests.workers.conftest import BROKERS, in_a_process
from tests.workers.shop import Shop

FORK = """
import json, os, sys
from tests.workers.shop import shop

key = sys.argv[1]
before = shop.stock.get_cached(key)          # starts the listener and makes connections
pid = os.fork()
if pid == 0:
    after = shop.stock.get_cached(key + " in the child")
    print(json.dumps(after), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(json.dumps(shop.stock.get_cached(key + " in the parent")), flush=True)
"""


@BROKERS
def test_fork_after_use(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A process that forks after its first use: parent and child both go on, each with a listener of its own."""
    done = in_a_process(any_shop, FORK, key)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [[f"{key} in the child", "stock"], [f"{key} in the parent", "stock"]], done.stderr


EXIT = """
import sys, threading
from tests.workers.shop import shop

threading.Thread(target=lambda: shop.gated.get_cached(sys.argv[1]), daemon=True).start()
shop.await_start(sys.argv[1])
"""


@BROKERS
def test_exit_with_waiters(any_shop: tuple[Shop, str, str], key: str) -> None:
    """A process may end while its threads wait."""
    done = in_a_process(any_shop, EXIT, key)
    any_shop[0].open_gate(key)
    assert (done.returncode, done.stderr) == (0, "")


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
from tests.workers.shop import shop

jobs = [gevent.spawn(shop.stock.get_cached, sys.argv[1]) for _ in range(200)]
gevent.joinall(jobs, raise_error=True)
print(len({str(job.value) for job in jobs}))
"""


@BROKERS
def test_greenlets(any_shop: tuple[Shop, str, str], key: str) -> None:
    """200 greenlets of one process wait for one run."""
    done = in_a_process(any_shop, GREENLETS, key)
    assert done.stdout.split() == ["1"], done.stderr
    assert any_shop[0].ran(key) == 1
