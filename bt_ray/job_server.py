"""Where a cluster's job server answers, and whom: beyond loopback and without a token it runs anyone's code."""

from __future__ import annotations

import http.client
import socket
from typing import Any
from urllib.parse import SplitResult

import psutil

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROBE_TIMEOUT_S = 2.0
GET_TIMEOUT_S = 30.0  # without a byte: a look at a job
SEND_TIMEOUT_S = 120.0  # the same: a job or its files are sent, or a job is stopped


def job_server_refusal(host: str, open_at: str | None, has_token: bool) -> str | None:
    """Why a job server at `host` must not be used, or None. Pure.

    `open_at`: an address beyond loopback at which it answers without a token: there it runs anyone's code.
    """
    if open_at is not None:
        return (
            f"the job server answers anyone at {open_at}, beyond loopback and without a token. Start the head with "
            "--dashboard-host=127.0.0.1, or with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        )
    if host not in LOOPBACK and not has_token:
        return (
            f"the job server at {host} is beyond loopback and no token is set here. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH as the cluster was started with, or reach it through a tunnel."
        )
    return None


def job_client(url: str) -> Any:
    """Ray's job client, whose requests end: its own wait for ever where a server takes them and falls silent.

    They raise OSError (requests.Timeout) then. Raises what JobSubmissionClient raises.
    """
    from ray.job_submission import JobSubmissionClient

    class LimitedClient(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            more.setdefault("timeout", GET_TIMEOUT_S if method == "GET" else SEND_TIMEOUT_S)
            return super()._do_request(method, endpoint, **more)

    return LimitedClient(url)


def open_to_all(server: SplitResult) -> str | None:
    """An address beyond loopback at which the job server answers without a token, or None.

    One that says 127.0.0.1 is asked at this machine's other addresses too: what it says is where it is
    reached, and not where it listens.
    """
    hosts = own_addresses() if server.hostname in LOOPBACK else [server.hostname or ""]
    connect = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
    for host in hosts:
        connection = connect(host, server.port, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/api/version")
            if connection.getresponse().status == http.client.OK:
                return host
        except (OSError, http.client.HTTPException):
            continue  # nothing listens there, or no job server
        finally:
            connection.close()
    return None


def own_addresses() -> list[str]:
    """This machine's addresses beyond loopback."""
    found = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    found = [entry for entry in found if entry.family in (socket.AF_INET, socket.AF_INET6)]
    # An address with a zone (%) reaches no further than the next switch, and needs its interface's name.
    return [
        entry.address
        for entry in found
        if not entry.address.startswith("127.") and entry.address != "::1" and "%" not in entry.address
    ]
