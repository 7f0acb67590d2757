"""What scripts/screenshots does: pictures of an agent with two real Envoys and a third that refuses a secret."""

import asyncio
import json
import socket
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src"), str(ROOT / "proto_gen")]

from fakes.agents import agent, write_config  # noqa: E402 - found by the path above
from fakes.envoys import BINARY, bootstrap  # noqa: E402 - likewise
from fakes.processes import started  # noqa: E402 - likewise
from playwright.async_api import async_playwright  # noqa: E402 - likewise

IMAGES = ROOT / "docs" / "images"
SIZES = {"wide": (1200, 800), "narrow": (390, 800)}
ENVOYS = {"edge-1": "default", "edge-2": "payments", "edge-3": "ROOTCA"}
"""Node ids, and the name that each asks for as its certificate. A bundle is none, so the third refuses it."""


async def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with socket.create_server(("127.0.0.1", 0)) as found:
            address = f"127.0.0.1:{found.getsockname()[1]}"
        config = write_config(folder, default="2m", payments="1h")
        config.write_text(json.dumps({**json.loads(config.read_text()), "admin": {"address": address}}))
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(agent(config))
            await running.event("ready")
            for node, name in ENVOYS.items():
                await stack.enter_async_context(started(envoy(folder, running.socket, node, name)))
            await running.event("nacked", node="edge-3")
            for node in ("edge-1", "edge-2"):
                await running.event("acked", node=node, count=2)
            await asyncio.sleep(30)  # so that the bar of the certificate of two minutes has a past
            await pictures(f"http://{address}/")


def envoy(folder: Path, path: Path, node: str, name: str) -> list[str]:
    """The command of an Envoy of that node id."""
    http: dict[str, object] = {"http2_protocol_options": {}}
    text = json.dumps(bootstrap(path, folder / f"{node}.sock", api_type="GRPC", name=name, http=http))
    file = folder / f"{node}.json"
    file.write_text(text.replace("envoy-under-test", node))
    return [BINARY, "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]


async def pictures(address: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for size, (width, height) in SIZES.items():
                context = await browser.new_context(
                    color_scheme=scheme, viewport={"width": width, "height": height}, locale="en-GB", timezone_id="UTC"
                )
                page = await context.new_page()
                await page.goto(address)
                await page.wait_for_selector("#envoys .error")
                await page.screenshot(path=IMAGES / f"page-{scheme}-{size}.png", full_page=size == "wide")
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
