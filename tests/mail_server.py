"""A mail server in this process that keeps what it is given."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Mailbox(socketserver.ThreadingTCPServer):
    """A mail server that keeps what it is given."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, *, refuses: str = "", dies: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.refuses = refuses
        self.dies = dies
        self.mails: list[dict[str, Any]] = []


class _Session(socketserver.StreamRequestHandler):
    server: Mailbox

    def say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())

    def handle(self) -> None:
        self.say("220 test")
        mail: dict[str, Any] = {"to": []}
        while line := self.rfile.readline().decode().strip():
            verb = line.upper()
            if verb.startswith("MAIL"):
                mail["from"] = line
                self.say("250 ok")
            elif verb.startswith("RCPT"):
                if self.server.refuses and self.server.refuses in line:
                    self.say("550 no such user")
                else:
                    mail["to"].append(line)
                    self.say("250 ok")
            elif verb == "DATA":
                self.say("354 go on")
                text = b""
                while (part := self.rfile.readline()) != b".\r\n":
                    text += part
                self.server.mails.append(mail | {"text": text.decode()})
                if self.server.dies:
                    return
                self.say("250 queued")
            elif verb == "QUIT":
                self.say("221 bye")
                return
            else:
                self.say("250 ok")


@contextmanager
def mailbox(**options: Any) -> Iterator[Mailbox]:
    with Mailbox(**options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
