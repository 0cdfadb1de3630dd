"""S3 endpoints that refuse, lie or are not there, on loopback."""

from __future__ import annotations

import http.server
from collections.abc import Callable

from bad_inputs import GOOD_LINES, Attempt, Bench, Case, Refused
from bad_inputs.remote import Answer, answering, garbage, hang_up, serving

# The retries of the client alone take half a minute; those of the file system stay.
ONCE = {"retries": {"max_attempts": 0}}
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BOMB = b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY a0 'aaaaaaaaaa'>" + b"".join(
    b"<!ENTITY a%d '%s'>" % (number, b"&a%d;" % (number - 1) * 10) for number in range(1, 12)
)


def _error(status: int, code: str) -> Answer:
    """What S3 says to a request that it does not grant."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
    return answering(status, body.encode(), Content_Type="application/xml")


def _cut(request: http.server.BaseHTTPRequestHandler) -> None:
    """A file of 100,000 bytes whose connection always closes early."""
    listing = (
        b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a.jsonl</Key>"
        b"<Size>100000</Size><ETag>1</ETag><LastModified>2020-01-01T00:00:00.000Z</LastModified></Contents>"
        b"</ListBucketResult>"
    )
    if "list-type" in request.path:
        answering(200, listing, Content_Type="application/xml")(request)
        return
    answering(200, GOOD_LINES, length=100_000, ETag="1", Last_Modified="Wed, 01 Jan 2020 00:00:00 GMT")(request)


ANSWERS: dict[str, Callable[[], Answer]] = {
    "missing bucket": lambda: _error(404, "NoSuchBucket"),
    "missing key": lambda: _error(404, "NoSuchKey"),
    "denied": lambda: _error(403, "AccessDenied"),
    "unknown access key": lambda: _error(403, "InvalidAccessKeyId"),
    "wrong signature": lambda: _error(403, "SignatureDoesNotMatch"),
    "expired token": lambda: _error(400, "ExpiredToken"),
    "another region": lambda: _error(301, "PermanentRedirect"),
    "internal error": lambda: _error(500, "InternalError"),
    "slow down": lambda: _error(503, "SlowDown"),
    "not XML": lambda: answering(200, b"<html>log in", Content_Type="text/html"),
    "XML that grows": lambda: answering(404, BOMB + b"]><Error>&a11;</Error>", Content_Type="application/xml"),
    "not HTTP": lambda: garbage,
    "no answer": lambda: hang_up,
    "more promised than sent": lambda: answering(200, GOOD_LINES, length=len(GOOD_LINES) + 100),
    "closes midway": lambda: _cut,
    "nothing": lambda: answering(200, b""),
}


def _prepare(bench: Bench, endpoint: str, path: str) -> Attempt:
    for name, value in ENVIRONMENT.items():
        bench.patch.setenv(name, value)
    return bench.prepare(path, storage_options={"endpoint_url": endpoint, "config_kwargs": ONCE})


def _served(new: Callable[[], Answer], path: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        def attempt() -> None:
            with serving(new()) as endpoint:
                _prepare(bench, endpoint, path)()

        return attempt

    return make


def _elsewhere(endpoint: str) -> Callable[[Bench], Attempt]:
    return lambda bench: _prepare(bench, endpoint, "s3://books/a.jsonl")


CASES: dict[str, Case] = {
    **{
        f"s3: {name}, {path}": Refused(_served(new, f"s3://books/{path}"), rf"s3://books/{path.replace('*', '.')}: ")
        for name, new in ANSWERS.items()
        for path in ("a.jsonl", "*.jsonl")
    },
    "s3: no server": Refused(_elsewhere("http://127.0.0.1:9"), r"s3://books/a\.jsonl: cannot be read"),
    "s3: bad port": Refused(_elsewhere("http://127.0.0.1:99999"), r"s3://books/a\.jsonl: cannot be read"),
    "s3: no address": Refused(_elsewhere("nonsense"), r"s3://books/a\.jsonl: cannot be read"),
}
