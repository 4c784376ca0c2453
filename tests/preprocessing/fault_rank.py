"""One rank of a job that meets a fault: `python fault_rank.py JOB.json`.

The job is made by `faults.py`. This program watches what the rank does to the output directory
(files opened for writing, synced, renamed, removed), counts each kind of operation over all ranks,
and strikes just before the chosen one.
"""

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILL_BYTES = 2**20


class Watch:
    """Counts operations on the output directory in the files of another directory."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._output = job["output"]
        self._counts = Path(job["watch"])
        self._moment = job["moment"]
        sys.addaudithook(self._audit)
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._watched(getattr(os, name), name))

    def _watched(self, call: Callable[[int], None], name: str) -> Callable[[int], None]:
        def watched(descriptor: int) -> None:
            self._happens(name, os.readlink(f"/proc/self/fd/{int(descriptor)}"))
            call(descriptor)

        return watched

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._happens("open", arguments[0])
        elif event == "os.rename":
            self._happens("rename", arguments[1])
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            path, folder = arguments[0], arguments[-1]
            if folder != -1:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            self._happens(event[3:], path)

    def _happens(self, what: str, path: Any) -> None:
        if isinstance(path, int) or not os.fsdecode(path).startswith(self._output):
            return
        name = re.sub(r"\d+", "N", os.path.basename(os.fsdecode(path)))
        operation = f"{what} {name}"
        # Two ranks never get the same position: what is appended moves the end.
        file = os.open(self._counts / operation, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, b".")
        number = os.lseek(file, 0, os.SEEK_CUR)
        os.close(file)
        if self._moment is not None and self._moment[:2] == [operation, number]:
            self._strike()

    def _strike(self) -> None:
        (self._counts.parent / "struck").touch()
        action = self._moment[2]
        if action.startswith("fill"):
            fill_disk(Path(self._output).parent / "ballast", int(action.split()[1]))
            return
        if action == "kill all":
            for path in self._counts.parent.glob("pid-*"):
                if int(path.name[4:]) != os.getpid():
                    os.kill(int(path.name[4:]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(ballast: Path, left: int) -> None:
    """Take all of a disk but the last bytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(FILL_BYTES)) == FILL_BYTES:
                pass
        except OSError:
            file.truncate(max(file.tell() - left, 0))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_bytes())
    (Path(job["watch"]).parent / f"pid-{os.getpid()}").touch()

    from preprocessing.errors import InputError
    from preprocessing.generate import generate
    from preprocessing.options import PreprocessOptions
    from preprocessing.parallel import connect

    ranks = connect(job["ranks"])
    options = PreprocessOptions(**job["options"])
    ranks.barrier()
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    Watch(job)
    started = time.monotonic()
    (Path(job["watch"]).parent / "started").touch()
    try:
        generate([*map(Path, job["inputs"])], Path(job["output"]), options, ranks,
                 unit_bytes=job["unit_bytes"])  # fmt: skip
        print(json.dumps({"seconds": time.monotonic() - started}) + "\n", end="", flush=True)
    except InputError as error:
        print(json.dumps({"refused": str(error)}) + "\n", end="", flush=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
