"""Open every file of a folder as a checkpoint, and write what became of each: one line of JSON a file, at once."""

import json
import sys
import time
from pathlib import Path

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)


def main(folder: Path, report: Path) -> None:
    from models.conv4 import conv4_backbone

    from e2mc_hf.errors import UsageError
    from e2mc_hf.models.checkpoint_import import import_checkpoint

    events: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        is_write = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or is_write:
            events.append(event)

    with report.open("w") as output:
        sys.addaudithook(watch)
        for path in sorted(folder.iterdir()):
            before = reset_peak()
            events.clear()
            start = time.process_time()
            try:
                imported = import_checkpoint(path, backbone=conv4_backbone())
                outcome, message = "loaded", imported.record.fingerprint
            except UsageError as error:
                outcome, message = "refused", str(error)
            except Exception as error:
                outcome, message = type(error).__name__, str(error)
            seconds = time.process_time() - start
            line = {"file": path.name, "outcome": outcome, "message": message, "seconds": seconds}
            line |= {"events": list(events), "grown": memory("VmHWM") - before}
            output.write(json.dumps(line) + "\n")
            output.flush()


def memory(name: str) -> int:
    """A figure of this process in bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def reset_peak() -> int:
    """Begin to look for the peak anew, and return the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
