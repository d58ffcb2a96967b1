from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


async def test_the_documentation_loads_nothing_from_elsewhere(client: Client) -> None:
    page = await client.http.get("/docs")
    assert page.status_code == 200
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page.text)
    assert page.headers["content-security-policy"].startswith("default-src 'self'")


async def test_what_the_documentation_loads_is_served_here(client: Client) -> None:
    page = (await client.http.get("/docs")).text
    parts = [part for part in re.findall(r"""(?:src|href)=["']([^"']+)""", page) if not part.startswith("data:")]
    assert len(parts) == 2
    for part in parts:
        reply = await client.http.get(f"/{part}")
        assert (reply.status_code, len(reply.content) > 100_000) == (200, True)


async def test_a_slash_at_the_end_leads_to_the_page_whose_parts_are_found(client: Client) -> None:
    reply = await client.http.get("/docs/", follow_redirects=True)
    assert (reply.status_code, reply.url.path) == (200, "/docs")


async def test_there_is_no_other_documentation_page(client: Client) -> None:
    assert (await client.http.get("/redoc")).status_code == 404
