"""The page in a real browser: a renewal and a NACK appear by themselves, and nothing keeps a person from reading it."""

import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]  # it ships no types
from fakes.agents import Agent, agent, write_config
from fakes.peers import connected
from fakes.ports import reserved_port
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

TIMEOUT = 60_000
"""Milliseconds after which the page has not shown what it should."""
STAYS = 600
"""Seconds for which an Envoy is there: a browser on a busy machine takes its time."""
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Debian's chromium."""
    program = shutil.which("chromium")
    assert program is not None, "the page is tested in Debian's chromium: apt-get install chromium"
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        await started.close()


@asynccontextmanager
async def shown_agent(folder: Path, **ttls: str) -> AsyncIterator[tuple[Agent, str]]:
    """An agent, and the address of its page."""
    with reserved_port() as port:
        config = write_config(folder, **ttls)
        config.write_text(json.dumps({**json.loads(config.read_text()), "admin": {"address": f"127.0.0.1:{port}"}}))
        async with agent(config) as running:
            await running.event("admin_listening", address=f"127.0.0.1:{port}")
            await running.event("ready")
            yield running, f"http://127.0.0.1:{port}/"


class Visit:
    """The page as one visitor has it, and what the browser complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._complain)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _complain(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)


async def visit(program: Browser, address: str, *, dark: bool = False, size: dict[str, int] = DESK) -> Visit:
    context = await program.new_context(
        color_scheme="dark" if dark else "light",
        viewport=size,  # type: ignore[arg-type]  # a TypedDict of these two
    )
    made = Visit(await context.new_page())
    made.page.set_default_timeout(TIMEOUT)
    await made.page.goto(address)
    await made.page.wait_for_selector("article")
    return made


async def test_a_renewal_and_a_nack_appear_without_a_reload(tmp_path: Path) -> None:
    async with browser() as program, shown_agent(tmp_path, default="6s") as (running, address):
        here = await visit(program, address)
        serial = here.page.locator("article[data-workload=default] .serial")
        before = await serial.inner_text()
        await expect(serial).not_to_have_text(before, timeout=TIMEOUT)
        assert running.events("renewed", workload="default"), "what is shown is what the agent has obtained meanwhile"
        async with connected(running.socket) as peer:
            stream = await peer.stream(STAYS).ask("ROOTCA", node="edge-<b>1</b>")
            await stream.read()
            await stream.ack("ROOTCA", error="Failed to load trusted <script>CA</script> certificates")
            refused = here.page.locator("#envoys .error")
            await expect(refused).to_contain_text("Failed to load trusted <script>CA</script>", timeout=TIMEOUT)
            await expect(here.page.locator("#envoys strong")).to_have_text("edge-<b>1</b>", timeout=TIMEOUT)
            line = here.page.locator("#events li[data-event=nacked]")
            await expect(line).to_have_class("bad", timeout=TIMEOUT)
        await expect(here.page.locator("#envoys")).to_contain_text("No Envoy is connected", timeout=TIMEOUT)
        assert await running.program.stop() == 0
        await expect(here.page.locator("#said")).to_contain_text("The agent does not answer.", timeout=TIMEOUT)
        assert [each for each in here.complaints if "Failed to load resource" not in each] == []


async def test_an_agent_that_hangs_is_said_and_what_a_person_holds_stays(tmp_path: Path) -> None:
    async with browser() as program, shown_agent(tmp_path, default="6s") as (running, address):
        here = await visit(program, address)
        serial = here.page.locator("article[data-workload=default] .serial")
        before = await serial.inner_text()
        await here.page.locator("details[data-chain=default] summary").focus()
        await here.page.keyboard.press("Enter")
        article = await here.page.query_selector("article")
        await expect(serial).not_to_have_text(before, timeout=TIMEOUT)
        assert await here.page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert await here.page.evaluate("document.querySelector('details').open")
        assert await here.page.evaluate("each => each.isConnected", article), "a selection in it would be gone"
        running.program.process.send_signal(signal.SIGSTOP)
        try:
            said = here.page.locator("#said")
            await expect(said).to_contain_text("The agent does not answer. Its last answer came at", timeout=TIMEOUT)
            await expect(here.page.locator("#ready")).to_have_text("no answer", timeout=TIMEOUT)
        finally:
            running.program.process.send_signal(signal.SIGCONT)
        await expect(here.page.locator("#said")).to_contain_text("Up to date", timeout=TIMEOUT)
        assert here.complaints == []


async def test_everybody_can_read_it(tmp_path: Path) -> None:
    async with (
        browser() as program,
        shown_agent(tmp_path, default="1h", web="1h") as (running, address),
        connected(running.socket) as peer,
    ):
        stream = await peer.stream(STAYS).ask("default", node="edge-1")
        await stream.read()
        await stream.ack("default", error="no such curve")
        await running.event("nacked")
        for dark, size in ((False, DESK), (True, DESK), (False, PHONE), (True, PHONE)):
            here = await visit(program, address, dark=dark, size=size)
            await expect(here.page.locator("#envoys .error")).to_be_visible(timeout=TIMEOUT)
            chain = here.page.locator("details[data-chain=default] summary")
            await chain.focus()
            await here.page.keyboard.press("Enter")
            await expect(here.page.locator("details[data-chain=default]")).to_contain_text("root:", timeout=TIMEOUT)
            found = (await Axe().run(here.page)).response
            assert [each["id"] for each in found["violations"]] == [], f"dark={dark} {size}"
            assert await here.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            assert here.complaints == []
            await here.page.context.close()


async def test_of_many_streams_those_in_trouble_come_first(tmp_path: Path) -> None:
    async with (
        browser() as program,
        shown_agent(tmp_path, default="1h") as (running, address),
        connected(running.socket) as peer,
    ):
        streams = [await peer.stream(STAYS).ask("default", node=f"edge-{number}") for number in range(200)]
        for stream in streams:
            await stream.read()
        for stream in streams[:-1]:
            await stream.ack("default")
        await streams[-1].ack("default", error="no such curve")
        await running.event("nacked")
        here = await visit(program, address)
        first = here.page.locator("#envoys strong").first
        await expect(first).to_have_text("edge-199", timeout=TIMEOUT)
        assert await here.page.locator("#envoys tbody tr").count() == 50
        await here.page.get_by_role("button", name="Show all 200 streams").click()
        await expect(here.page.locator("#envoys tbody tr")).to_have_count(200, timeout=TIMEOUT)
