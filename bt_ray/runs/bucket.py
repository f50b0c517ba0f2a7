"""A run's objects in an S3-compatible bucket, and what goes wrong with them.

boto3 and not a file system's view of a bucket: two drivers are kept apart by writes at a known version. Keys, region and
endpoint are taken as every AWS tool takes them (environment, profile, role of the machine).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from bt_ray.errors import RunDirError, StorageError

URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<prefix>[^/]+(/[^/]+)*)/?")
ATTEMPTS = 3  # of one request, by the client itself; what waits longer is the caller's
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
TAKEN = (409, 412)  # a conditional write came too late
REFUSED = (301, 400, 401, 403, 404, 405, 501)  # will be refused again, but for these reasons
PASSING = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch")


class BusyError(StorageError):
    """The bucket does not answer, or asks to be left alone for now. The same may work later."""


class TakenError(StorageError):
    """A conditional write came after somebody else's."""


@dataclass(frozen=True)
class Place:
    """Where a run lies: `s3://bucket/prefix`."""

    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


class Found(NamedTuple):
    """An object: its bytes, its version (the ETag), and its age by the store's own clock, in whole seconds."""

    data: bytes
    version: str
    age_s: float


def is_url(run_dir: str | Path) -> bool:
    """Whether a run directory is named by a bucket's URL."""
    return str(run_dir).startswith("s3:/")


def place_of(url: str) -> Place:
    """The place that a URL names. Raises RunDirError where it names none. Pure."""
    found = URL.fullmatch(url)
    if not found or any(part in (".", "..") for part in found["prefix"].split("/")):
        raise RunDirError(f"{url!r} names no place for a run. Write s3://BUCKET/FOLDER, as s3://my-runs/helpdesk.")
    return Place(found["bucket"], found["prefix"])


class Bucket:
    """The objects below one place, by their names relative to it. Safe in several threads.

    Every method raises BusyError where the bucket cannot be reached now, StorageError where it refuses.
    """

    def __init__(self, place: Place) -> None:
        import boto3
        from botocore.config import Config

        self.place = place
        with self._said("the client"):
            self._client: Any = boto3.session.Session().client(
                "s3",
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    # Stores that are only compatible know no newer checksums.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    @property
    def endpoint(self) -> str:
        """Address of the store that is asked."""
        return str(self._client.meta.endpoint_url)

    def names(self, below: str = "") -> list[str]:
        """Names of all objects, or of those that begin with `below`."""
        start = f"{self.place.prefix}/"
        with self._said(below):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.place.bucket, Prefix=start + below)
            return [one["Key"].removeprefix(start) for page in pages for one in page.get("Contents", ())]

    def get(self, name: str) -> Found | None:
        """An object; None where there is none."""
        with self._said(name):
            try:
                answer = self._client.get_object(**self._key(name))
            except self._client.exceptions.NoSuchKey:
                return None
            return Found(answer["Body"].read(), str(answer["ETag"]), _age_s(answer))

    def put(self, name: str, data: bytes) -> None:
        """Write an object, whole."""
        with self._said(name):
            self._client.put_object(**self._key(name), Body=data)

    def put_if(self, name: str, data: bytes, version: str | None) -> str:
        """Write an object that is at `version` (None: that is not there) and return its new version. Raises TakenError."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._said(name):
            try:
                return str(self._client.put_object(**self._key(name), Body=data, **condition)["ETag"])
            except self._client.exceptions.ClientError as error:
                status, code = _said_by(error)
                if status in TAKEN or code == "NoSuchKey":  # the last: the version was to be there
                    raise TakenError(f"{self.place.url}/{name} was written by somebody else.") from error
                raise

    def upload(self, name: str, path: Path) -> None:
        """Write a file of any size; it appears whole or not at all."""
        with self._said(name):
            self._client.upload_file(str(path), self.place.bucket, f"{self.place.prefix}/{name}")

    def download(self, name: str, path: Path) -> None:
        """Read an object of any size into a new file; none is made where the object was removed."""
        from botocore.exceptions import ClientError

        with self._said(name):
            try:
                self._client.download_file(self.place.bucket, f"{self.place.prefix}/{name}", str(path))
            except ClientError as error:
                if _said_by(error)[1] not in ("404", "NoSuchKey"):
                    raise

    def delete(self, name: str) -> None:
        """Remove an object, where it is there."""
        with self._said(name):
            self._client.delete_object(**self._key(name))

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.place.bucket, "Key": f"{self.place.prefix}/{name}"}

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Raise what boto3 raises in our words. Its messages name requests and never keys."""
        import boto3.exceptions
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError, PartialCredentialsError

        what = f"{self.place.url}/{name}".rstrip("/")
        try:
            yield
        except ClientError as error:
            raise _refusal(what, error) from error
        except boto3.exceptions.Boto3Error as error:  # of a transfer, with the client's error inside
            inner = error.__context__
            raise (_refusal(what, inner) if isinstance(inner, ClientError) else _busy(what, error)) from error
        except (NoCredentialsError, PartialCredentialsError, NoRegionError) as error:
            raise StorageError(f"{what}: {error} Set the AWS variables or profile that `aws s3 ls` would need.") from error
        except BotoCoreError as error:
            raise _busy(what, error) from error


def _age_s(answer: dict[str, Any]) -> float:
    """How long ago an object was written. Both times are the store's, so that no two machines' clocks are compared."""
    said = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    now = parsedate_to_datetime(said) if said else datetime.now(UTC)
    return max(0.0, (now - answer["LastModified"]).total_seconds())


def _said_by(error: Any) -> tuple[int, str]:
    """HTTP status and S3's own code of a ClientError."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status, str(error.response.get("Error", {}).get("Code", status))


def _refusal(what: str, error: Any) -> StorageError:
    status, reason = _said_by(error)
    if status == 501:
        return unconditional(what, reason)
    if status in REFUSED and reason not in PASSING:
        return StorageError(
            f"{what}: the bucket refuses: {reason}. Look at the bucket's name, its region and endpoint, and what this key may do."
        )
    return _busy(what, reason)


def _busy(what: str, error: object) -> BusyError:
    return BusyError(f"{what}: the bucket does not answer ({str(error)[:200]}). Try again once it does.")


def unconditional(what: str, reason: str) -> StorageError:
    """The refusal of a store that cannot keep two drivers apart."""
    return StorageError(
        f"{what}: this store has no conditional writes ({reason}), without which two drivers could write one run. Use another."
    )
