"""As much of the Hugging Face Hub as loading a dataset asks for."""

import json
import re
from http.server import BaseHTTPRequestHandler

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EARLIER_COMMIT = COMMIT[::-1]
REVISIONS = {"main": COMMIT, "v1": EARLIER_COMMIT}


class HubStandIn(BaseHTTPRequestHandler):
    """Answers as the Hub does for two commits of a few datasets, which hold the same."""

    files: dict[str, dict[str, bytes]]  # of each repository
    denials: dict[str, tuple[int, str | None]]  # status and error code of the repositories that are not for everyone
    requests: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        repository = "/".join(path.removeprefix("/api").split("/")[2:4])
        if repository in self.denials:
            return self.answer(*self.denials[repository])
        files = self.files.get(repository)
        if files is None:
            return self.answer(404, "RepoNotFound")
        if match := re.search(r"/resolve/(main|v1|[0-9a-f]{40})/(.+)$", path):
            return self.answer(200, None, files[match[2]]) if match[2] in files else self.answer(404, "EntryNotFound")
        if match := re.search(r"/revision/(\w+)$", path):
            commit = REVISIONS.get(match[1], match[1])
            return self.answer(200, None, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode())
        if match := re.search(r"/tree/[0-9a-f]{40}(?:/(.+))?$", path):
            entries = list_folder(files, match[1])
            return (
                self.answer(200, None, json.dumps(entries).encode()) if entries else self.answer(404, "EntryNotFound")
            )
        return self.answer(200, None, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, error: str | None = None, body: bytes = b"") -> None:
        size, wanted = len(body), re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200 and size:
            start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            stop = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
            status, body = 206, body[start:stop]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        for name, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{size}"'), ("Accept-Ranges", "bytes")):
            self.send_header(name, value)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def list_folder(files: dict[str, bytes], folder: str | None) -> list[dict[str, object]]:
    """Entries of one folder, as the Hub lists them."""
    prefix = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(prefix)]
    folders = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside} - set(inside)
    return [{"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in sorted(folders)] + [
        {"type": "file", "path": name, "oid": COMMIT, "size": len(files[name])}
        for name in inside
        if "/" not in name.removeprefix(prefix)
    ]
