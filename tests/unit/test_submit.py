"""`bt-ray submit`: what is sent, to whom, as which command, and how the job is followed."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bt_ray import cli, config_file, package, submit
from bt_ray.errors import ConfigError, StageFailedError
from bt_ray.package import MIB, lacking, named_paths, pack, too_large
from bt_ray.submit import Request

URL = "http://127.0.0.1:8265"
CONFIG: dict[str, Any] = {
    "program": "support.py:Support",
    "metric": "support.py:solved",
    "data": {"train": "rows/train.jsonl", "val": "rows/val.jsonl", "inputs": ["question"]},
    "steps": {"p": {"optimizer": "labeled"}},
    "strategy": "p",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The config of a project in a folder of its own."""
    folder = tmp_path / "project"
    for name in ("support.py", "rows/train.jsonl", "rows/val.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x\n")
    return write(folder / "config.yaml")


def write(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def packed(path: Path) -> package.Package:
    return pack(path, config_file.load(path))


class Jobs:
    """A job client whose one job goes through `looks`: (status, log so far); an exception is raised."""

    def __init__(self, looks: list[Any] | None = None, exit_code: int | None = None, session: str | None = None) -> None:
        self.looks = looks or [("SUCCEEDED", "")]
        self.exit_code = exit_code
        self.session = session
        self.submitted: list[dict[str, Any]] = []

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return str(job["submission_id"])

    def get_job_info(self, submission_id: str) -> Any:
        look = self.looks[0]
        if isinstance(look, BaseException):
            self.looks.pop(0)
            raise look
        return SimpleNamespace(status=SimpleNamespace(value=look[0]), message="its words", driver_exit_code=self.exit_code)

    def get_job_logs(self, submission_id: str) -> str:
        return str(self.looks.pop(0)[1])

    def _do_request(self, method: str, path: str) -> Any:
        assert (method, path) == ("GET", "/api/version")
        return SimpleNamespace(json=lambda: {"ray_version": "2", "session_name": self.session})


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """The client of a cluster that is not this machine."""
    client = Jobs()
    monkeypatch.setattr(submit, "connect", lambda server: client)
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    return client


# -- the working directory -----------------------------------------------------------------------


def test_the_folder_is_the_configs_own_where_that_holds_everything(project: Path) -> None:
    found = packed(project)
    assert (found.folder, found.config, found.num_files, found.elsewhere) == (project.parent, "config.yaml", 4, ())


def test_the_folder_is_the_deepest_that_holds_all_relative_paths(project: Path) -> None:
    data = {"train": "../rows/train.jsonl", "val": "/mnt/rows/val.jsonl", "inputs": ["question"]}
    names = {"program": "../support.py:Support", "metric": "../support.py:solved"}
    config = write(project.parent / "configs" / "deep" / "c.yaml", **names, data=data)
    with pytest.raises(ConfigError, match=r"there is no file .*configs/support\.py\. Paths start at the config's folder"):
        packed(config)
    config = write(project.parent / "configs" / "c.yaml", **names, data=data)
    found = packed(config)
    assert (found.folder, found.config) == (project.parent, "configs/c.yaml")
    assert found.elsewhere == ("/mnt/rows/val.jsonl",), "an absolute path is one of the cluster's"


def test_every_local_path_of_a_config_is_known(project: Path) -> None:
    for name in ("weights", "large", "teacher", "writer"):
        (project.parent / name).mkdir()
    step = {
        "optimizer": "search/own.py:Mine",
        "proposer": {"model": "writer", "engine": {}},
        "teacher": {"model": "teacher"},
    }
    config = write(
        project,
        program="shop.flow:Flow",
        data={**CONFIG["data"], "val": "openai/gsm8k:main:train"},
        model="weights",
        models={"large": "large", "hub": "org/name", "far": "/mnt/far"},
        assign={"a": "large", "b": "hub", "c": "far"},
        steps={"p": step},
    )
    assert named_paths(config_file.load(config)) == {
        "metric": "support.py",
        "steps.p.optimizer": "search/own.py",
        "data.train": "rows/train.jsonl",
        "model": "weights",
        "models.large": "large",
        "models.far": "/mnt/far",
        "steps.p.proposer": "writer",
        "steps.p.teacher": "teacher",
    }


def test_a_home_folder_is_not_sent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: project.parent)
    with pytest.raises(ConfigError, match=r"more than a run can take along\. Move them into one project folder"):
        packed(project)


def test_a_base_dir_of_this_machine_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_dir: /somewhere is a folder of this machine\. Leave the key out"):
        packed(write(project, base_dir="/somewhere"))


def test_keys_runs_and_environments_stay_here(project: Path) -> None:
    folder = project.parent
    for name in (".env", ".env.local", "runs/project/run.json", ".venv/pyvenv.cfg", ".git/config", "notes/runs/kept.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    found = set(package.packed_files(folder))
    assert found == {"config.yaml", "support.py", "rows/train.jsonl", "rows/val.jsonl", "notes/runs/kept.txt"}


@pytest.mark.parametrize("ignore", [".gitignore", ".rayignore"])
def test_data_that_an_ignore_file_keeps_from_the_cluster_is_named(
    project: Path, ignore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.parent / ignore).write_text("rows/\n")
    with pytest.raises(ConfigError, match=r"data\.train: .*rows/train\.jsonl would not reach the cluster"):
        packed(project)
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    if ignore == ".gitignore":
        assert packed(project).num_files == 5


def test_what_is_sent_is_what_ray_would_pack(project: Path, tmp_path: Path) -> None:
    from zipfile import ZipFile

    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    (project.parent / ".gitignore").write_text("*.log\n")
    for name in ("a.log", ".env", "sub/b.txt"):
        (project.parent / name).parent.mkdir(exist_ok=True)
        (project.parent / name).write_text("x" * 1000)
    target = tmp_path / "package.zip"
    excludes = [*ray_constants.get_runtime_env_default_excludes(), *package.EXCLUDES]
    packaging.create_package(str(project.parent), target, include_gitignore=True, excludes=excludes)
    with ZipFile(target) as archive:
        sent = {item.filename: item.file_size for item in archive.infolist() if not item.is_dir()}
    assert package.packed_files(project.parent) == sent


def test_a_folder_that_is_too_large_is_refused_with_its_largest_entries() -> None:
    folder = Path("/project")
    sizes = {"data/a.bin": 60 * MIB, "data/b.bin": 30 * MIB, "model/w.safetensors": 80 * MIB, "a.log": 7 * MIB, "b.py": 10}
    found = too_large(folder, sizes, 100 * MIB) or ""
    assert found.startswith("/project holds 177.0 MiB, and Ray's job server takes less than 100 MiB; the largest entries are")
    assert "data/ (90.0 MiB), model/ (80.0 MiB), a.log (7.0 MiB): name what the run does not need in /project/.rayignore" in found
    assert "b.py" not in found and found.count(". ") == 0, "one sentence"
    assert too_large(folder, {"a": 100 * MIB - 1}, 100 * MIB) is None


def test_the_verb_refuses_a_folder_that_is_too_large(
    project: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 1 * MIB < package.size_limit() <= 512 * MIB
    (project.parent / "weights.bin").write_bytes(b"x" * 3 * MIB)
    monkeypatch.setattr(package, "size_limit", lambda: 2 * MIB)
    assert cli.main(["submit", str(project), "--address", URL, "--run-dir", "/mnt/run"]) == 2
    assert "weights.bin (3.0 MiB)" in capsys.readouterr().err and not jobs.submitted


def test_a_folder_counts_as_sent_where_something_in_it_is() -> None:
    needed = {"model": "/p/weights"}
    found = lacking(Path("/"), {"model": str(Path(__file__).parent)}, {f"{Path(__file__).parent}/x".lstrip("/"): 1})
    assert found is None
    assert "there is no file /p/weights" in (lacking(Path("/p"), needed, {}) or "")


# -- the job server ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://head:10001", "auto", "http://", "http://head:port", "http://[::1", "ftp://head"]
)
def test_an_address_that_is_no_url_of_a_job_server(address: str) -> None:
    with pytest.raises(ConfigError, match=r"is no URL of a job server\. Give that of the cluster's dashboard, like http://"):
        submit.server_of(address)


def test_a_password_in_an_address_is_not_taken() -> None:
    with pytest.raises(ConfigError, match="--address holds a password") as error:
        submit.server_of("https://me:hunter2@head:8265")
    assert "hunter2" not in str(error.value)
    assert submit.server_of("https://head/ray/").geturl() == "https://head/ray"


def test_beyond_loopback_a_token_is_asked_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(submit, "open_to_all", lambda server: None)
    assert cli.main(["submit", str(project), "--address", "http://10.0.0.7:8265", "--run-dir", "/mnt/run"]) == 2
    said = capsys.readouterr().err
    assert "beyond loopback and no token is set here. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in said


def test_a_server_that_answers_anyone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    monkeypatch.setattr(submit, "open_to_all", lambda server: "10.0.0.7")
    with pytest.raises(ConfigError, match=r"answers anyone at 10\.0\.0\.7"):
        submit.connect(submit.server_of("http://10.0.0.7:8265"))


def test_a_token_that_is_asked_for_must_be_there() -> None:
    assert not submit.token_lacks({}, has_own_file=False)
    assert submit.token_lacks({"RAY_AUTH_MODE": "token"}, has_own_file=False)
    for there in ({"RAY_AUTH_TOKEN": "t"}, {"RAY_AUTH_TOKEN_PATH": "/t"}):
        assert not submit.token_lacks({"RAY_AUTH_MODE": "token", **there}, has_own_file=False)
    assert not submit.token_lacks({"RAY_AUTH_MODE": "token"}, has_own_file=True)


def test_an_address_where_nothing_answers_is_one_sentence(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # a port that nobody listens at
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert cli.main(["submit", str(project), "--address", address, "--run-dir", "/mnt/run"]) == 2
    said = capsys.readouterr().err
    assert f"no Ray job server answers at {address} (" in said and "Is the cluster up" in said
    assert "Traceback" not in said and said.count("\n") == 1


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def refuse(address: str) -> None:
        raise error

    monkeypatch.setattr(submit, "open_to_all", lambda server: None)
    monkeypatch.setattr(submit, "_knock", lambda server: None)
    monkeypatch.setattr(submit, "job_client", refuse)


def test_another_token_than_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    raising(monkeypatch, AuthenticationError("Authentication failed"))
    with pytest.raises(ConfigError, match=r"asks for another token than is set here\. Set RAY_AUTH_MODE=token"):
        submit.connect(submit.server_of(URL))


@pytest.mark.parametrize("error", [RuntimeError("Version check returned 404.\nmore"), KeyError("ray_version"), TimeoutError()])
def test_what_is_no_job_server(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raising(monkeypatch, error)
    with pytest.raises(ConfigError, match="no Ray job server answers at") as told:
        submit.connect(submit.server_of(URL))
    assert "\n" not in str(told.value)


def test_the_address_of_the_command_line_counts_before_rays_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.dashboard.utils import get_address_for_submission_client

    raising(monkeypatch, AssertionError())
    monkeypatch.setattr(submit, "job_client", get_address_for_submission_client)
    monkeypatch.setenv("RAY_ADDRESS", "http://another:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:2")
    assert submit.connect(submit.server_of(URL)) == URL


# -- the run directory and the job ---------------------------------------------------------------


def test_where_the_run_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = Request("mine/config.yaml", (), URL, None)
    assert submit.place(given, is_here=True) == str(tmp_path / "runs" / "mine"), "as `bt-ray run` has it"
    assert submit.place(Request("c.yaml", (), URL, "/mnt/bt_ray/x"), is_here=False) == "/mnt/bt_ray/x"
    assert submit.place(Request("c.yaml", (), URL, "s3://runs/team/x/"), is_here=False) == "s3://runs/team/x"
    with pytest.raises(ConfigError, match=r"runs/mine is a folder of this machine, and the run is written by"):
        submit.place(given, is_here=False)


def test_a_cluster_is_here_where_its_session_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._common.utils.get_default_ray_temp_dir", lambda: str(tmp_path))
    (tmp_path / "session_1").mkdir()
    assert submit._is_here(Jobs(session="session_1"))
    assert not submit._is_here(Jobs(session="session_2")) and not submit._is_here(Jobs(session=None))


def test_the_command_is_one_that_the_cluster_understands(project: Path) -> None:
    words = shlex.split(submit.entrypoint(packed(project), "/mnt/a run", ("seed=3", "steps.p.note='x y'")))
    assert words[:4] == ["python", "-m", "bt_ray.cli", "run"]
    parsed = cli._parser().parse_args(words[3:])
    assert (parsed.config, parsed.run_dir, parsed.set) == ("config.yaml", "/mnt/a run", ["seed=3", "steps.p.note='x y'"])


def test_a_projects_own_script_is_run_where_it_has_one(project: Path) -> None:
    (project.parent / "jobs").mkdir()
    (project.parent / "jobs" / "better_together.py").write_text("")
    words = shlex.split(submit.entrypoint(packed(project), "/mnt/run", ("seed=3",)))
    assert words == ["python", "jobs/better_together.py", "--config", "config.yaml", "--run-dir=/mnt/run", "--set=seed=3"]


def test_a_run_is_submitted_and_the_ways_on_are_said(
    project: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    step = {"optimizer": "opro", "proposer": {"model": "openai/x", "api_key_env": "OPENAI_API_KEY"}}
    write(project, steps={"p": step}, data={**CONFIG["data"], "val": "/mnt/val.jsonl"})
    assert cli.main(["submit", str(project), "--set", "seed=3", "--address", URL, "--run-dir", "/mnt/bt_ray/my run"]) == 0
    (job,) = jobs.submitted
    assert job["runtime_env"] == {"working_dir": str(project.parent), "excludes": ["/runs", ".env", ".env.*"]}
    assert job["submission_id"].startswith("bt-ray-my-run-") and "--set=seed=3" in job["entrypoint"]
    said = capsys.readouterr().out
    assert "sk-secret" not in json.dumps(job) + said and "Not sent: the values of OPENAI_API_KEY" in said
    assert "the nodes must have: /mnt/val.jsonl" in said and "on the cluster's storage" in said
    assert f"Submitted {job['submission_id']}; its run directory is /mnt/bt_ray/my run" in said
    assert f"RAY_API_SERVER_ADDRESS={URL} ray job logs --follow {job['submission_id']}" in said
    assert "bt-ray stop '/mnt/bt_ray/my run'" in said and "bt-ray status '/mnt/bt_ray/my run'" in said


def keyed(project: Path, key_file: str) -> package.Package:
    step = {"optimizer": "opro", "proposer": {"model": "openai/x", "api_key_file": key_file}}
    return packed(write(project, steps={"p": step}))


def test_a_file_that_holds_a_key_is_not_sent(project: Path, tmp_path: Path) -> None:
    (project.parent / "key").write_text("sk-secret")
    (tmp_path / "link").symlink_to(project.parent / "key")
    for name, says in (
        ("key", "is a path in the config's folder"),
        ("missing", "is a path in the config's folder"),
        (str(project.parent / "key"), "which would be sent to the job server"),
        (str(tmp_path / "link"), "which would be sent to the job server"),
    ):
        with pytest.raises(ConfigError, match=rf"steps\.p\.proposer\.api_key_file: it .*{says}") as error:
            keyed(project, name)
        assert "sk-secret" not in str(error.value) and "Give the absolute path" in str(error.value)
    (project.parent / ".gitignore").write_text("key\n")
    assert keyed(project, str(project.parent / "key")).elsewhere == (str(project.parent / "key"),)
    assert keyed(project, "/run/secrets/key").elsewhere == ("/run/secrets/key",)  # said to be what the nodes must have


def test_a_relative_run_directory_of_another_cluster_is_explained(
    project: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", str(project), "--address", URL, "--run-dir", "runs/x"]) == 2
    said = capsys.readouterr().err
    assert "--run-dir: runs/x is a folder of this machine" in said and "absolute path of a folder on storage" in said
    assert not jobs.submitted


def test_a_server_that_breaks_off_or_refuses(project: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(str(project), (), URL, "/mnt/run")
    for error, words in (
        (ConnectionResetError("reset"), "broke off while the run was sent"),
        (RuntimeError("no."), "refuses bt-ray-run-"),
    ):

        def fail(error: Exception = error, **job: Any) -> str:
            raise error

        monkeypatch.setattr(jobs, "submit_job", fail)
        with pytest.raises(StageFailedError, match=words):
            submit.submit(request, False, lambda text: None)


# -- following -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "exit_code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", 130, 130), ("STOPPED", None, 130)],
)
def test_the_log_is_printed_as_it_grows_until_the_job_ends_with_its_code(
    project: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str], ending: str, exit_code: int | None, expected: int
) -> None:
    jobs.looks = [("PENDING", ""), ("RUNNING", "one\n"), ConnectionError("gone"), ("RUNNING", "one\n"), (ending, "one\ntwo\n")]
    jobs.exit_code = exit_code
    assert cli.main(["submit", str(project), "--address", URL, "--run-dir", "/mnt/run", "--follow"]) == expected
    out, err = capsys.readouterr()
    assert out.endswith("one\ntwo\n") and out.count("one") == 1
    assert (f"the job ended as {ending}: its words" in err) == (ending != "SUCCEEDED")


def test_an_interrupt_while_following_leaves_the_run_alone(project: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.looks = [("RUNNING", "one\n"), KeyboardInterrupt()]
    assert cli.main(["submit", str(project), "--address", URL, "--run-dir", "/mnt/run", "--follow"]) == 130
    said = capsys.readouterr().err
    assert "detached; the run goes on" in said and "ray job logs --follow bt-ray-run-" in said
    assert "bt-ray stop /mnt/run" in said and "ray job stop bt-ray-run-" in said


def test_a_server_that_falls_silent_while_following(
    project: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "SERVER_TIMEOUT_S", -1.0)
    jobs.looks = [ConnectionError("gone")]
    assert cli.main(["submit", str(project), "--address", URL, "--run-dir", "/mnt/run", "--follow"]) == 1
    assert "has not answered for" in capsys.readouterr().err
