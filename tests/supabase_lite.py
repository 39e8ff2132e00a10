"""Supabase's REST and Auth protocol over a throw-away database: the npm package `@supabase/lite`.

`npm ci` in the folder of `package.json` installs it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

_ROOT = Path(__file__).parents[1]
_PROGRAM = _ROOT / "node_modules" / ".bin" / "lite"
_START_SECONDS_MAX = 60.0


@dataclass(frozen=True, kw_only=True)
class SupabaseLite:
    """A running server."""

    url: str
    publishable_key: str
    """May do what `anon` may."""
    secret_key: str
    """Acts as `service_role`."""
    jwt_secret: str = field(repr=False)

    def access_token(self, user_id: str, *, valid_for: timedelta = timedelta(hours=1), **claims: Any) -> str:
        """A user's token, as Auth would sign it: role `authenticated`, `sub` the user. `claims` are laid over that,
        such as `app_metadata={"tenant_id": "acme"}`. It is not checked that the user exists."""
        now = datetime.now(UTC)
        payload = {
            "sub": user_id,
            "aud": "authenticated",
            "role": "authenticated",
            "iat": int(now.timestamp()),
            "exp": int((now + valid_for).timestamp()),
            **claims,
        }
        signed = f"{_base64({'alg': 'HS256', 'typ': 'JWT'})}.{_base64(payload)}"
        signature = hmac.new(self.jwt_secret.encode(), signed.encode(), hashlib.sha256).digest()
        return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"

    def sign_up(self, email: str, password: str) -> tuple[str, str]:
        """A real user: its id and access token.

        By hand, because the `supabase` client does not read the time stamps of this server's Auth.
        """
        answer = httpx.post(
            f"{self.url}/auth/v1/signup",
            json={"email": email, "password": password},
            headers={"apikey": self.publishable_key},
        )
        answer.raise_for_status()
        return answer.json()["user"]["id"], answer.json()["access_token"]


@contextmanager
def supabase_lite_server(database_url: str) -> Iterator[SupabaseLite]:
    """Serve the schema `public` of this database (`postgresql://…` over TCP).

    Skips the test where Node.js or the package is missing; where `CI` is set that fails it.
    """
    require_node()
    publishable_key = f"sb_publishable_{secrets.token_urlsafe(16)}"
    secret_key = f"sb_secret_{secrets.token_urlsafe(24)}"
    jwt_secret = secrets.token_hex(32)
    folder = Path(tempfile.mkdtemp(prefix="supabase-lite-"))
    log = folder / "log"
    port = _free_port()
    (folder / "supabase").mkdir()
    (folder / "supabase" / "config.toml").write_text(
        "\n".join(
            [
                "[api]",
                f"port = {port}",
                'schemas = ["public"]',
                "[db]",
                'driver = "postgres"',
                f"url = {json.dumps(database_url)}",
                "[auth]",
                "enabled = true",
                f"jwt_secret = {json.dumps(jwt_secret)}",
                'publishable_key = "env(SUPABASE_PUBLISHABLE_KEY)"',
                'secret_key = "env(SUPABASE_SECRET_KEY)"',
                "[auth.email]",
                "enable_confirmations = false",
            ]
        ),
        encoding="utf-8",
    )
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(folder),
        "DO_NOT_TRACK": "1",
        "SUPABASE_PUBLISHABLE_KEY": publishable_key,
        "SUPABASE_SECRET_KEY": secret_key,
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [_PROGRAM, "start", "--no-admin"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server, log)
        yield SupabaseLite(
            url=url, publishable_key=publishable_key, secret_key=secret_key, jwt_secret=jwt_secret
        )
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def require_node() -> None:
    """Skip the test where Node.js or the npm packages are missing; where `CI` is set, fail it."""
    if shutil.which("node") is None:
        missing = "Node.js is not installed"
    elif not _PROGRAM.exists():
        missing = "the npm package @supabase/lite is not installed: run `npm ci`"
    else:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI must run the tests against Supabase's protocol")
    pytest.skip(missing)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while server.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/auth/v1/health")
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"@supabase/lite did not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def _base64(content: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
