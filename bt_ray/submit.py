"""`bt-ray submit`: a whole run as a Ray job, from the machine that holds its files.

What `ray job submit --working-dir FOLDER -- python jobs/better_together.py` does, with the checks before it. No variable
of this machine's environment is sent: a job's environment can be read by everyone who reaches the job server.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from bt_ray import config_file
from bt_ray.cluster import DONE, SERVER_TIMEOUT_S, start_job
from bt_ray.environment import environment, own_command
from bt_ray.errors import ConfigError, StageFailedError
from bt_ray.job_server import job_client, job_server_refusal, open_to_all
from bt_ray.package import EXCLUDES, MIB, Package, key_variables, pack
from bt_ray.runs.bucket import is_url, place_of

SCRIPT = "jobs/better_together.py"
INTERRUPTED = 130
POLL_S = 1.0
KNOCK_TIMEOUT_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """The words of the command line."""

    config: str
    overrides: tuple[str, ...]
    address: str
    run_dir: str | None


def submit(request: Request, follow: bool, say: Say) -> int:
    """Submit the run and say how to go on; with `follow` its log too, until it ends. Returns the exit code.

    Raises ConfigError for what cannot be sent or reached, StageFailedError where the job server refuses the job.
    """
    config = config_file.load(request.config, request.overrides)
    server = server_of(request.address)
    package = pack(Path(request.config), config)
    jobs = connect(server)
    is_here = _is_here(jobs)
    run_dir = place(request, is_here)
    job = {
        "entrypoint": entrypoint(package, run_dir, request.overrides),
        "submission_id": f"bt-ray-{re.sub('[^A-Za-z0-9]+', '-', Path(run_dir).name)}-{uuid.uuid4().hex[:8]}",
        "runtime_env": {"working_dir": str(package.folder), "excludes": list(EXCLUDES)},
    }
    try:
        submission_id = start_job(jobs, job)
    except OSError as error:
        raise StageFailedError(
            f"the job server at {server.geturl()} broke off while the run was sent: {error}. Try again."
        ) from None
    for line in told(package, key_variables(config), is_here):
        say(line)
    ways = ways_on(server.geturl(), submission_id, run_dir)
    say(f"Submitted {submission_id}; its run directory is {run_dir}\n{ways}")
    if not follow:
        return 0
    try:
        return follow_job(jobs, submission_id)
    except KeyboardInterrupt:
        print(f"\nbt-ray: detached; the run goes on.\n{ways}", file=sys.stderr)
        return INTERRUPTED


def server_of(address: str) -> SplitResult:
    """The job server's URL. Raises ConfigError where it is none, or holds a password. Pure."""
    try:
        server = urlsplit(address.rstrip("/"))
        is_valid = server.scheme in ("http", "https") and bool(server.hostname) and server.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        is_valid = False
    if not is_valid:
        raise ConfigError(
            f"--address {address!r} is no URL of a job server. Give that of the cluster's dashboard, like http://127.0.0.1:8265."
        )
    if "@" in server.netloc:  # a command line is seen by others, and this address is printed
        raise ConfigError("--address holds a password. Leave it out: a token is read from RAY_AUTH_TOKEN_PATH.")
    return server


def token_lacks(variables: Mapping[str, str], has_own_file: bool) -> bool:
    """Whether a token is asked for (RAY_AUTH_MODE=token) and none is there. `has_own_file`: ~/.ray/auth_token. Pure."""
    if variables.get("RAY_AUTH_MODE") != "token":
        return False
    return not (variables.get("RAY_AUTH_TOKEN") or variables.get("RAY_AUTH_TOKEN_PATH") or has_own_file)


def connect(server: SplitResult) -> Any:
    """A job client of that server. Raises ConfigError where it may not be used, does not answer, or knows no such token."""
    has_token = os.environ.get("RAY_AUTH_MODE") == "token"
    if token_lacks(os.environ, (Path.home() / ".ray" / "auth_token").is_file()):
        raise ConfigError(
            "RAY_AUTH_MODE=token is set and there is no token. Set RAY_AUTH_TOKEN_PATH to the file of the cluster's."
        )
    if reason := job_server_refusal(server.hostname or "", open_to_all(server), has_token):
        raise ConfigError(f"--address: {reason}")
    from ray.exceptions import AuthenticationError

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # both set their own levels when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    url = server.geturl()
    try:
        _knock(server)
        # The client would take RAY_ADDRESS before the address that it is given.
        with environment({"RAY_API_SERVER_ADDRESS": url}):
            return job_client(url)
    except AuthenticationError:
        raise ConfigError(
            f"--address: the job server at {url} asks for another token than is set here. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH as the cluster was started with."
        ) from None
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:  # what requests and the client raise for whatever answers there
        raise ConfigError(
            f"--address: no Ray job server answers at {url} ({_first_line(error)}). Is the cluster up, and the tunnel to it "
            "(`ray dashboard cluster.yaml`)?"
        ) from None


def _knock(server: SplitResult) -> None:
    """Raise OSError soon where nothing answers: the client itself waits for minutes. A proxy is left to the client."""
    from requests.utils import get_environ_proxies

    if not get_environ_proxies(server.geturl()):
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((server.hostname or "", port), timeout=KNOCK_TIMEOUT_S).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]


def _is_here(jobs: Any) -> bool:
    """Whether the cluster's head is this machine, and its storage this machine's. A tunnel ends on loopback too, so the
    address does not tell; the folder of the cluster's session does."""
    from ray._common.utils import get_default_ray_temp_dir

    session = jobs._do_request("GET", "/api/version").json().get("session_name")
    return bool(session) and Path(get_default_ray_temp_dir(), session).is_dir()


def place(request: Request, is_here: bool) -> str:
    """The run directory as the cluster's nodes are to find it. Raises ConfigError where only this machine would have it."""
    wanted = request.run_dir or str(Path("runs") / Path(request.config).resolve().parent.name)
    if is_url(wanted):
        return place_of(wanted).url
    if Path(wanted).is_absolute():
        return wanted
    if is_here:
        return str(Path(wanted).resolve())
    raise ConfigError(
        f"--run-dir: {wanted} is a folder of this machine, and the run is written by the nodes of the cluster at {request.address}. "
        "Give s3://BUCKET/FOLDER, or the absolute path of a folder on storage that all of them reach, like /mnt/bt_ray/NAME; "
        "where this machine mounts it too, `bt-ray status` and `bt-ray stop` work on it from here."
    )


def entrypoint(package: Package, run_dir: str, overrides: Sequence[str]) -> str:
    """The job's command: the project's own script where it has one, else the installed module. Pure but for that look."""
    options = [f"--run-dir={run_dir}", *(f"--set={item}" for item in overrides)]
    if (package.folder / SCRIPT).is_file():
        return shlex.join(["python", SCRIPT, "--config", package.config, *options])
    return shlex.join(["python", "-m", "bt_ray.cli", "run", package.config, *options])


def told(package: Package, variables: Sequence[str], is_here: bool) -> list[str]:
    """What was sent, and what the cluster itself must have."""
    lines = [f"Sent {package.folder} ({package.num_files} files, {package.num_bytes / MIB:.1f} MiB) as the working directory."]
    if not is_here:
        lines.append("The run directory is on the cluster's storage: this machine sees it where it mounts that storage.")
        if package.elsewhere:
            lines.append(f"Not sent, as the config gives absolute paths; the nodes must have: {', '.join(package.elsewhere)}")
    if variables:
        lines.append(f"Not sent: the values of {', '.join(variables)}. Set them where the cluster's nodes start.")
    return lines


def ways_on(url: str, submission_id: str, run_dir: str) -> str:
    """How to follow, look and stop. The variable counts before RAY_ADDRESS, which ray's own --address does not."""
    ray = f"RAY_API_SERVER_ADDRESS={shlex.quote(url)} ray job"
    tool, folder = shlex.quote(own_command()), shlex.quote(run_dir)
    return (
        f"  follow: {ray} logs --follow {submission_id}\n"
        f"  look:   {tool} status {folder}\n"
        f"  stop:   {tool} stop {folder}    or: {ray} stop {submission_id}"
    )


def follow_job(jobs: Any, submission_id: str) -> int:
    """Print the job's log as it grows. Returns the job's exit code. Raises StageFailedError where the server falls silent."""
    shown, deadline = 0, time.monotonic() + SERVER_TIMEOUT_S
    while True:
        try:
            info = jobs.get_job_info(submission_id)  # before the log, which then holds all that a job that ended wrote
            log = jobs.get_job_logs(submission_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise StageFailedError(
                    f"the job server has not answered for {SERVER_TIMEOUT_S:g} s ({_first_line(error)}). The run may well go on; "
                    f"look for {submission_id} again when the cluster answers."
                ) from None
            time.sleep(POLL_S)
            continue
        deadline = time.monotonic() + SERVER_TIMEOUT_S
        print(log[shown:], end="", flush=True)
        shown = len(log)
        status = str(info.status.value)
        if status in DONE:
            return _exit_code(status, info)
        time.sleep(POLL_S)


def _exit_code(status: str, info: Any) -> int:
    if status == "SUCCEEDED":
        return 0
    print(f"bt-ray: the job ended as {status}: {info.message or 'no reason given'}", file=sys.stderr)
    return INTERRUPTED if status == "STOPPED" else int(info.driver_exit_code or 1)
