"""The report while a study runs: served on this machine, and renewed as rows come in.

It only reads the results. What is served is the page of `report.html` and, added to it, a script that asks
for a newer one; the file on disk stays free of any request.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import ipaddress
import json
import logging
import re
import socket
import string
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raydisp import storage
from raydisp.errors import OutputError
from raydisp.interrupts import terminate_as_interrupt
from raydisp.report import NothingYetError, make_report, page

logger = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
LOOK_EVERY_S = 2.0
"""How often the results are looked at, at the most."""
SHARE = 0.2
"""Of the time at the most that goes into looking and building: a large study is looked at less often."""

PARTS = ("trials", "steps", "evals", "layers", "items")
FILES = ("study.yaml", "confirm.yaml")
"""What the report is made from."""

POLICY = "default-src 'none';"
"""As the page's own policy begins; the served copy may ask its server as well."""

Version = tuple[Any, ...]


class _Once(logging.Filter):
    """Lets each message through once: the same is found wrong whenever the page is built anew."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._seen
        self._seen.add(text)
        return new


@dataclasses.dataclass(frozen=True)
class Page:
    """What is served."""

    content: bytes
    version: str


class Watched:
    """A results folder, and its page as it was when it was last looked at."""

    def __init__(self, study_dir: str) -> None:
        """Raises:
        OutputError: it is a file, or in a place that cannot be reached.
        """
        self.study_dir = study_dir
        self._seen: Version | None = None
        self._failed = ""
        self.page = served(waiting(study_dir))
        try:
            self.refresh()
        except OutputError:
            raise
        except Exception as error:
            self._tell(error)

    def refresh(self) -> bool:
        """Build the page anew if anything it is made from has changed; whether it has.

        Raises:
            OutputError: the results are no folder, or in a place that cannot be reached.
        """
        seen = self._look()
        if seen == self._seen:
            return False
        try:
            text = make_report(self.study_dir)
        except NothingYetError:
            text = waiting(self.study_dir)
        self._seen = seen
        page = served(text)
        changed = page.version != self.page.version
        self.page = page
        return changed

    def try_refresh(self) -> None:
        """The same, for a page that is there already: what goes wrong is said once, and the page stays."""
        try:
            self.refresh()
            self._failed = ""
        except Exception as error:
            # Whatever it is, the next rows may mend it, and the page as it was is better than none.
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if text != self._failed:
            logger.warning("the report is not renewed just now: %s", text)
        self._failed = text

    def _look(self) -> Version:
        try:
            parts = [storage.list_versions(storage.join(self.study_dir, name)) for name in PARTS]
            files = [storage.version_of(storage.join(self.study_dir, name)) for name in FILES]
        except OSError as error:
            raise OutputError(f"{self.study_dir} cannot be read: {' '.join(str(error).split())}") from None
        return (*parts, *files)


def waiting(study_dir: str) -> str:
    """The page of a study that has no trial yet."""
    reason = f"There is no trial in {study_dir} yet."
    return string.Template(page.read_part("watch.html")).substitute(
        begin=page.begin("waiting"), reason=html.escape(reason)
    )


def served(text: str) -> Page:
    """A page with the script that renews it; its version is that of its content."""
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    script = string.Template(page.read_part("watch.js")).substitute(version=version)
    assert POLICY in text, "the page has a policy"
    text = text.replace(POLICY, f"{POLICY} connect-src 'self';", 1)
    head, end, rest = text.rpartition("</body>")
    return Page(f"{head}<script>{script}</script>\n{end}{rest}".encode(), version)


# --- over HTTP -----------------------------------------------------------------------------------------


class ReportServer(ThreadingHTTPServer):
    """Serves two things, to loopback alone unless another host is asked for: the page and its version."""

    daemon_threads = True

    def __init__(self, watched: Watched, host: str, port: int) -> None:
        """Raises:
        OutputError: the address cannot be had.
        """
        self.watched = watched
        self.host = host
        self.open_to_others = not is_loopback(host)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"{_shown(host)}:{port} cannot be listened on: {reason}; give another --port, or none for a "
                "free one"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{_shown(self.host)}:{self.server_address[1]}/"

    def knows(self, name: str) -> bool:
        """Whether a Host header means this server.

        A page of another site can point a name of its own at this address and then read what is served; it
        cannot make a browser send one of these. Addresses are no names.
        """
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?", name)
        if match is None:
            return False
        host = match[1].strip("[]").lower()
        if is_loopback(host):
            return True
        if not self.open_to_others:
            return False
        own = {self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return host in own or _address(host) is not None

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request of %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "raydisp", ""
    timeout = 10.0

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        names = self.headers.get_all("Host", [])
        if len(names) != 1 or not self.server.knows(names[0]):
            self._answer(HTTPStatus.FORBIDDEN, b"This server answers to loopback names only.\n", "text/plain")
            return False
        if self.command != "GET":
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"Only GET.\n", "text/plain")
            return False
        return True

    def do_GET(self) -> None:
        page, path = self.server.watched.page, self.path.partition("?")[0]
        if path in ("/", "/report.html"):
            self._answer(HTTPStatus.OK, page.content, "text/html")
        elif path == "/version":
            self._answer(HTTPStatus.OK, json.dumps({"version": page.version}).encode(), "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"There are / and /version.\n", "text/plain")

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug(format, *arguments)


def watch(study_dir: str, host: str, port: int) -> None:
    """Serve the report of a results folder until Ctrl-C or SIGTERM, which is how this ends well.

    Args:
        port: 0: a free one.
    Raises:
        OutputError: the folder cannot be read, or the address cannot be had.
    """
    study_dir = storage.local_absolute(study_dir)
    if not 0 <= port <= 65535:
        raise OutputError(f"--port {port} is not between 0 and 65535")
    once = _Once()
    for name in ("raydisp.report", "raydisp.report.page"):
        logging.getLogger(name).addFilter(once)
    watched = Watched(study_dir)
    with terminate_as_interrupt(), ReportServer(watched, host, port) as server:
        if server.open_to_others:
            logger.warning(
                "--host %s: whoever reaches this machine can read the report, unencrypted and unasked", host
            )
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        print(f"{study_dir} at {server.url} (Ctrl-C ends it)", flush=True)
        try:
            while True:
                started = time.monotonic()
                watched.try_refresh()
                took = time.monotonic() - started
                time.sleep(max(LOOK_EVERY_S, took * (1 - SHARE) / SHARE))
        except KeyboardInterrupt:
            print()
        finally:
            server.shutdown()


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine and nothing else."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
