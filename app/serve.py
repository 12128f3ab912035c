"""Start the app: `streamlit run app/main.py` as a child process, bound to 127.0.0.1 only.

If the wanted port is taken the next free one is used. `start` returns when the app answers its health check, so
a printed URL can be opened at once. The workspace travels in $ATOMSCOPE_HOME.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from cache.errors import AtomscopeError, UsageError
from cache.workspace import ENV_HOME

HOST = "127.0.0.1"
PORT = 8501
MAIN = Path(__file__).with_name("main.py")
ROOT = Path(__file__).resolve().parent.parent
HEALTH_SECONDS = 60.0


def free_port(wanted: int = PORT) -> int:
    """`wanted` if nothing listens there, else the next free port of the following hundred."""
    if not 1 <= wanted <= 65_535:
        raise UsageError(f"port {wanted} does not exist: use 1 to 65535")
    for port in range(wanted, min(wanted + 100, 65_536)):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UsageError(f"no free port from {wanted} on: choose another with --port")


def command(port: int) -> list[str]:
    """The command line of the child. Flags win over any config file of the user."""
    flags = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
    }
    args = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(MAIN), *args]


def environment(workspace: Path) -> dict[str, str]:
    """Environment of the child: the workspace, and this checkout first on the path."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return os.environ | {ENV_HOME: str(workspace), "PYTHONPATH": path}


@dataclass
class Server:
    """A running app."""

    process: subprocess.Popen[bytes]
    url: str

    def stop(self) -> None:
        """End the child and wait for it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start(workspace: Path, port: int = PORT, *, log: Path | None = None) -> Server:
    """Start the app and wait until it answers. Its messages go to `log`, or to this process's stderr."""
    port = free_port(port)
    out = log.open("wb") if log else None
    try:
        process = subprocess.Popen(
            command(port),
            env=environment(workspace),
            stdin=subprocess.DEVNULL,
            stdout=out or subprocess.DEVNULL,
            stderr=subprocess.STDOUT if out else None,
        )
    finally:
        if out:
            out.close()
    server = Server(process, f"http://{HOST}:{port}")
    try:
        _wait_for_health(server)
    except BaseException:
        server.stop()
        raise
    return server


def _wait_for_health(server: Server) -> None:
    end = time.monotonic() + HEALTH_SECONDS
    # the app is on this machine: a proxy of the environment must not be asked for it
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise AtomscopeError(
                f"the app ended with code {server.process.returncode} before it answered: see its messages above, "
                "and check that streamlit is installed (`pip install streamlit`)"
            )
        try:
            with opener.open(f"{server.url}/_stcore/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AtomscopeError(f"the app did not answer at {server.url} within {HEALTH_SECONDS:.0f} s: try again")


def serve(workspace: Path, port: int = PORT) -> int:
    """Run the app in the foreground until it ends or Ctrl-C; returns its exit code (130 after Ctrl-C)."""
    server = start(workspace, port)
    print(f"atomscope app: {server.url}  (workspace {workspace}; Ctrl-C stops it)", flush=True)
    # `kill`, systemd and containers stop with SIGTERM: the child must go too, it holds the port
    old = signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        return server.process.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, old)
        server.stop()


def _interrupt() -> None:
    raise KeyboardInterrupt
