"""Views of Django, under ASGI and WSGI, that wait for a task."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import django
import pytest
from django.conf import settings
from django.http import HttpRequest, JsonResponse
from django.test import AsyncClient, Client
from django.urls import path

from celery_memolock.server import Server
from tests.workers.shop import Shop


@pytest.fixture(scope="module")
def made(server: Server, start_for_all: Callable[..., Any]) -> Iterator[Shop]:
    """A site with an async and a plain view, and a worker."""
    found, _ = start_for_all(server.url, server.url, "--concurrency", "2")

    async def aview(_: HttpRequest, key: str) -> JsonResponse:
        return JsonResponse(await found.tasks["stock"].aget_cached(key), safe=False)

    def view(_: HttpRequest, key: str) -> JsonResponse:
        return JsonResponse(found.tasks["stock"].get_cached(key), safe=False)

    urls = ModuleType("tests_django_urls")
    urls.urlpatterns = [path("a/<key>", aview), path("s/<key>", view)]  # type: ignore[attr-defined]
    sys.modules[urls.__name__] = urls
    settings.configure(ROOT_URLCONF=urls.__name__, ALLOWED_HOSTS=["testserver"], SECRET_KEY="of the tests", USE_TZ=True)
    django.setup()
    yield found
    del sys.modules[urls.__name__]


def test_async_views(made: Shop, key: str) -> None:
    """A hundred async views wait for one run."""

    async def ask() -> list[Any]:
        client = AsyncClient()
        return [each.json() for each in await asyncio.gather(*(client.get(f"/a/{key}") for _ in range(100)))]

    assert asyncio.run(ask()) == [[key, "stock"]] * 100
    assert made.ran(key) == 1


def test_plain_views_under_asgi(made: Shop, key: str) -> None:
    """A plain view, which Django runs in a thread under ASGI, shares the value with async ones."""

    async def ask() -> list[Any]:
        client = AsyncClient()
        both = [client.get(f"/{kind}/{key}") for kind in "as" * 5]
        return [each.json() for each in await asyncio.gather(*both)]

    assert asyncio.run(ask()) == [[key, "stock"]] * 10
    assert Client().get(f"/s/{key}").json() == [key, "stock"]
    assert made.ran(key) == 1
