"""Servers that misbehave, on loopback, and hub data sets that are not what is read."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bad_inputs import GOOD_LINES, Attempt, Bench, Case, Refused

BODY = GOOD_LINES
Answer = Callable[[http.server.BaseHTTPRequestHandler], object]


def answering(code: int, body: bytes = b"", **headers: object) -> Answer:
    """A fixed answer; `length` stands in for the true length, None for none."""
    length = headers.pop("length", len(body))

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), str(value).replace("HERE", request.path))
        if length is not None:
            request.send_header("Content-Length", str(length))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
        request.close_connection = True

    return answer


def hang_up(request: http.server.BaseHTTPRequestHandler) -> None:
    request.close_connection = True


def garbage(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"\x00\x01 nothing of HTTP\r\n\r\n")
    request.close_connection = True


def _gone_at_the_second_look() -> Answer:
    """The file is there when it is planned and gone when it is read."""
    asked = []

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(request.command)
        (answering(200, BODY, Accept_Ranges="bytes") if len(asked) < 2 else answering(404))(request)

    return answer


ANSWERS: dict[str, Callable[[], Answer]] = {
    "400": lambda: answering(400),
    "401": lambda: answering(401),
    "403": lambda: answering(403, b"<html>who are you?</html>"),
    "404": lambda: answering(404),
    "410": lambda: answering(410),
    "429": lambda: answering(429),
    "500": lambda: answering(500, b"line\nline"),
    "503": lambda: answering(503),
    "redirect to itself": lambda: answering(302, Location="HERE"),
    "redirect to a file": lambda: answering(302, Location="file:///etc/passwd"),
    "redirect to nothing": lambda: answering(302),
    "no length": lambda: answering(200, BODY, length=None),
    "length in words": lambda: answering(200, BODY, length="many"),
    "negative length": lambda: answering(200, BODY, length=-5),
    "more promised than sent": lambda: answering(200, BODY, length=len(BODY) + 100),
    "nothing": lambda: answering(200, b""),
    "no answer": lambda: hang_up,
    "not HTTP": lambda: garbage,
    "gone at the second look": _gone_at_the_second_look,
    "page of a website": lambda: answering(200, b"<html>log in</html>", Content_Type="text/html"),
}


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The address of a server that gives one answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        do_GET = do_HEAD = lambda self: answer(self)  # noqa: E731

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _served(new: Callable[[], Answer]) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        def attempt() -> None:
            with serving(new()) as address:
                bench.prepare(f"{address}/a.jsonl", language=None)()

        return attempt

    return make


def _hub(files: dict[str, str], **fields: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        folder = bench.folder / "set"
        for name, content in files.items():
            bench.write(f"set/{name}", content.replace("CANARY", str(bench.canary)).encode())
        bench.patch.setattr("datasets.config.HF_DATASETS_CACHE", Path(bench.folder / "cache"))
        return bench.prepare(folder, format="hub", **fields)

    return make


def _plain(path: str, **fields: object) -> Callable[[Bench], Attempt]:
    return lambda bench: bench.prepare(path, **fields)  # type: ignore[arg-type]


ROWS = {"a.jsonl": BODY.decode()}
SCRIPT = "open('CANARY', 'w').write('executed')\n"
CARD = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: test\n    path: a.jsonl\n---\n"
TAGGED = "---\nconfigs: !!python/object/apply:os.mknod ['CANARY']\n---\n"
OUTSIDE = "---\nconfigs:\n- config_name: default\n  data_files: ../../../etc/passwd\n---\n"
HUB: dict[str, Case] = {
    "no revision": Refused(_plain("owner/name", format="hub"), "owner/name: give its revision"),
    "address without revision": Refused(_plain("hf://datasets/owner/name"), "give its revision"),
    "address without name": Refused(_plain("hf://datasets/name", revision="a"), "write hf://datasets/OWNER/NAME"),
    "address alone": Refused(_plain("hf://", revision="a"), "write hf://datasets/OWNER/NAME"),
    "unknown split": Refused(_hub(ROWS, split="test"), "split 'test' is not there, it has train"),
    "unknown configuration": Refused(_hub({**ROWS, "README.md": CARD}, config="big"), "'big' not found"),
    "split of no configuration": Refused(
        _hub({**ROWS, "README.md": CARD}, config="small"), "split 'train' is not there"
    ),
    "nothing in it": Refused(_hub({".x": ""}), "source books: .*set: "),
    "only CSV": Refused(_hub({"a.csv": "text\na\n"}), "csv files are not read"),
    "script": Refused(_hub({"set.py": SCRIPT}), "source books: .*set: "),
    "script beside data of no kind": Refused(_hub({"set.py": SCRIPT, "a.xyz": "a"}), "source books: .*set: "),
    "card of objects": Refused(_hub({"README.md": TAGGED, **ROWS}, split="none"), "source books: .*set: "),
    "card that is no YAML": Refused(_hub({"README.md": "---\na: [\n---\n", **ROWS}, split="none"), "books: .*set: "),
    "card that points outside": Refused(_hub({"README.md": OUTSIDE, **ROWS}), "passwd|set: "),
}
CASES: dict[str, Case] = {
    **{
        f"http: {name}": Refused(_served(new), r"(http://127\.0\.0\.1:\d+/a\.jsonl|source books): ?.+")
        for name, new in ANSWERS.items()
    },
    "http: no server": Refused(_plain("http://127.0.0.1:9/a.jsonl"), r"http://127\.0\.0\.1:9/a\.jsonl: cannot be read"),
    "http: bad port": Refused(_plain("http://127.0.0.1:99999/a.jsonl"), r"99999/a\.jsonl: "),
    "http: no host": Refused(_plain("http:///a.jsonl"), r"a\.jsonl: "),
    "http: unknown protocol": Refused(_plain("ftp://127.0.0.1/a.jsonl"), "protocol is not read"),
    "http: chained protocols": Refused(_plain("simplecache::http://127.0.0.1/a.jsonl"), "protocol is not read"),
    "http: memory": Refused(_plain("memory://a.jsonl"), "protocol is not read"),
    "http: reference": Refused(_plain("reference://a.jsonl"), "protocol is not read"),
    **{f"hub: {name}": case for name, case in HUB.items()},
}
