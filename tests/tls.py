"""TLS in front of a server that speaks none, with certificates of the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trustme


class TlsFront:
    """Takes TLS connections from whoever has our certificate, and hands on what they say.

    Args:
        behind: the server's URL.
        folder: where the certificates go.

    Attributes:
        url: rediss:// and where it listens.
        settings: what a client needs to come in, by the client library's names.
        ports: those from which it has talked to the server.
    """

    url: str

    def __init__(self, behind: str, folder: Path) -> None:
        self.ports: set[int] = set()
        self._behind = urlsplit(behind)
        ca = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.verify_mode = ssl.CERT_REQUIRED
        ca.issue_cert("127.0.0.1").configure_cert(self.context)
        ca.configure_trust(self.context)
        caller = ca.issue_cert("caller@example.org")
        self.settings: dict[str, Any] = {}
        for name, pem in (
            ("ssl_ca_certs", ca.cert_pem),
            ("ssl_certfile", caller.cert_chain_pems[0]),
            ("ssl_keyfile", caller.private_key_pem),
        ):
            self.settings[name] = str(folder / f"{name}.pem")
            pem.write_to_path(self.settings[name])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on one connection, in both directions."""
        beyond, out = await asyncio.open_connection(self._behind.hostname, self._behind.port)
        self.ports.add(out.get_extra_info("sockname")[1])
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(_hand_on(reader, out), _hand_on(beyond, writer))
        for each in (writer, out):
            each.transport.abort()


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError  # and with this direction the other one ends


@contextlib.contextmanager
def tls_front(behind: str, folder: Path) -> Iterator[TlsFront]:
    """Have one for the time of a with block, in a thread of its own."""
    front = TlsFront(behind, folder)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(front.serve, "127.0.0.1", 0, ssl=front.context))
    front.url = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="tls-front")
    thread.start()
    try:
        yield front
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
