"""Where files are written, and which folders a stage may write in: kills, full disks and second starts leave
nothing half done. Needs no torch, nor does flags.py, so that errors of a command line come at once.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None


class UserError(ValueError):
    """Something the user can mend; `common.run` shows it as a line or two, without a traceback."""


class DiskError(UserError, OSError):
    """A file that the disk or its permissions did not take."""


# ----------------------------------------------------------------------------------------------------
# writing: each file appears whole or not at all

TEMPORARY = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside path; what was written there takes path's place on success. Whatever way
    a library has to say that the disk is full, it becomes a DiskError."""
    path = Path(path)
    fits = len(os.fsencode(path.name)) < 230  # a file system takes 255
    name = path.name if fits else f"{path.name[:40]}-{zlib.crc32(os.fsencode(path.name)):08x}"
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.stat().st_size > 2**20:
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())  # a shared disk may not say before this that it is full
        os.replace(temporary, path)
    except Exception as error:
        if reason := disk_problem(error, path, temporary):
            raise DiskError(f"cannot write {path}: {reason}; all that was finished before is kept") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_problem(error, path: Path, temporary: Path) -> str | None:
    """Why the disk did not take a file, or None if the error is about something else. Libraries hide it: then
    the disk is asked whether it takes more."""
    if isinstance(error, UserError):
        return None
    number = getattr(error, "errno", None)
    if number in FULL or number and getattr(error, "filename", None) in (str(path), str(temporary)):
        return os.strerror(number)
    if isinstance(error, OSError) and number:  # of another file, which it names
        return None
    try:
        with open(temporary, "ab") as f:
            f.write(bytes(2**16))
            f.flush()
            os.fsync(f.fileno())
    except OSError as refusal:
        return refusal.strerror
    return None


def write_text(path, text: str):
    """UTF-8; of names that are not, the bytes are written as \\udc.., which in JSON means what they were."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def append(path, line: str):
    """A further line of a log. Of a kill or a full disk it may be half there; who reads it cuts that off."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as f:
            f.write(line)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}; its earlier lines are kept") from error


def as_json(value, **options) -> str:
    """Readable JSON that UTF-8 can hold."""
    return escaped(json.dumps(value, ensure_ascii=False, **options))


def escaped(text: str) -> str:
    """Text in which what is no character is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def sweep(folder):
    """Removes what killed processes left of files they were replacing, in a folder and below it, but for
    folders that are other stages' own."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, MARK).exists()]
        for name in filter(TEMPORARY.fullmatch, names):
            Path(place, name).unlink(missing_ok=True)


def remove_clips(folder):
    """Removes the .safetensors in a folder, and the folder unless somebody put something else there."""
    folder = Path(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


# ----------------------------------------------------------------------------------------------------
# owning: a stage writes only into its own folder, and no two processes into one. The folder's mark says what
# it holds and, while a process writes there, which one. On other machines of a shared disk that process is
# taken for dead when it has not touched the mark for a while

MARK = ".bagger.json"
FIRST = {"clips": "meta.json", "a model": "run.json"}  # what shows that a folder without a mark is ours too
HARMLESS = {"lost+found", ".DS_Store", MARK}  # in an empty folder
BEAT, STALE = 30, 300  # seconds between touches, and without one
BEGAN = time.strftime("%Y-%m-%d %H:%M:%S")
held = {}  # {mark: (this process's id, what it says)}


def own(folder, what: str):
    """Makes folder this process's to write in, until release(). what: what it holds, in a word."""
    if not str(folder):
        raise UserError("the folder to write into has an empty name; give --out DIR")
    mark = Path(folder).absolute() / MARK
    folder = Path(folder)
    for other, (pid, _) in list(held.items()):
        if pid != os.getpid():  # of the process that this one was forked from
            del held[other]
    if mark in held:
        return sweep(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marked = mark.exists()
    if not marked and not (folder / FIRST.get(what, MARK)).exists():
        with os.scandir(folder) as entries:
            if name := next((entry.name for entry in entries if entry.name not in HARMLESS), None):
                raise UserError(f"{folder} holds {name} and was not made by this stage; choose a "
                                "new or empty --out")
    try:
        take(mark, what)
    except UserError:
        raise
    except OSError as error:
        raise DiskError(f"cannot write {mark}: {error.strerror}; nothing was changed") from error
    held[mark] = os.getpid(), {"holds": what, "writer": this_process()}
    if not any(thread.name == "beat" for thread in threading.enumerate()):
        threading.Thread(target=beat, name="beat", args=(os.getpid(),), daemon=True).start()
    if marked:
        sweep(folder)


def take(mark: Path, what: str):
    """Writes this process into a mark, if no living one is there."""
    with opened_alone(mark, os.O_CREAT) as (f, alone):
        before = parse(f.read())
        if before.get("holds", what) != what:
            raise UserError(f"{mark.parent} holds {before['holds']}, so that {what} cannot be written there; "
                            "choose another --out")
        writer = before.get("writer")
        if writer and is_alive(writer, mark):
            raise UserError(in_use(writer, mark))
        ours = {"holds": what, "writer": this_process()}
        write_over(f, ours)
    if not alone:  # of two that start at the same time on such a disk, the last to write has it
        time.sleep(1)
        writer = parse(mark.read_text(errors="replace")).get("writer")
        if writer != ours["writer"]:
            raise UserError(in_use(writer, mark))


def in_use(writer, mark) -> str:
    about = "it" if writer["host"] == this_host() else f"it (should it be dead: {STALE // 60} minutes)"
    return (f"{mark.parent} is being written by process {writer['pid']} on {writer['host'].split()[0]}, "
            f"{writer['command']}, since {writer['since']}; wait for {about}, or choose another --out")


@contextlib.contextmanager
def opened_alone(mark: Path, flags: int = 0):
    """Yields (the open mark, whether others are kept out): not every file system can."""
    with open(os.open(mark, os.O_RDWR | flags, 0o666), "r+", encoding="utf-8", errors="replace") as f:
        yield f, any(locked(f) for _ in range(50))


def locked(f) -> bool:
    """Until it is closed. Nobody holds it for long; a disk whose locks are broken is not waited for."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        time.sleep(0.1)
    except (OSError, AttributeError):  # it knows no locks
        pass
    return False


def parse(text: str) -> dict:
    """A mark. Behind it may be the rest of a longer one, if it is just being written."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write_over(f, value: dict):
    f.seek(0)
    f.write(json.dumps(value) + "\n")  # ASCII, and shorter than what a disk takes at once
    f.truncate()


def release():
    """Gives all folders back."""
    for mark, (pid, ours) in list(held.items()):
        with contextlib.suppress(OSError):
            if pid == os.getpid():
                with opened_alone(mark) as (f, _):
                    if parse(f.read()) == ours:
                        write_over(f, {"holds": ours["holds"]})
    held.clear()


def beat(pid: int):
    """Shows other machines that this process lives. It ends where one has taken over its folder, as may be
    when it was asleep."""
    while held and pid == os.getpid():
        time.sleep(BEAT)
        for mark, (_, ours) in list(held.items()):
            with contextlib.suppress(OSError):
                writer = parse(mark.read_text(errors="replace")).get("writer", ours["writer"])
                if writer != ours["writer"] and mark in held:
                    sys.stderr.write(f"{mark.parent} has been taken over by another process\n")
                    os._exit(2)
                os.utime(mark)


def this_process() -> dict:
    return {"host": this_host(), "pid": os.getpid(), "started": started(os.getpid()), "since": BEGAN,
            "command": plain(Path(sys.argv[0]).name)}


def this_host() -> str:
    """Processes are known by their ids only within the same container of the same machine."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process began, in the system's own terms, which tells it from a later one of the same id. None:
    it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        pass
    return "some time"


def is_alive(writer: dict, mark: Path) -> bool:
    try:
        in_use(writer, mark)  # has all that it must have
        if writer["host"] == this_host():
            return writer["started"] is not None and started(int(writer["pid"])) == writer["started"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    clock = mark.with_name(f"{MARK}.{os.getpid()}.tmp")  # by the clock of the disk: machines' differ
    clock.write_bytes(b"")
    try:
        return clock.stat().st_mtime - mark.stat().st_mtime < STALE
    finally:
        clock.unlink(missing_ok=True)


def die_with_parent():
    """On Linux, this process is killed when the one that started it ends: a rank without its torchrun would
    go on to write."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ----------------------------------------------------------------------------------------------------
# showing: names and captions may hold anything; a terminal is to see text

# of Unicode: the old control characters, and those that turn the direction of a text
SPECIAL = *range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)
ESCAPES = {c: f"\\x{c:02x}" if c < 256 else f"\\u{c:04x}" for c in SPECIAL}
ESCAPES_IN_TEXT = {c: text for c, text in ESCAPES.items() if chr(c) not in "\n\t"}


def is_name(text: str) -> bool:
    """Is this the name of a file that can be written here, without folders?"""
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:  # half a character
        return False
    return 0 < size <= 230 and not {"/", "\0"} & set(text) and text not in (".", "..")


def plain(text: str) -> str:
    """One line that any terminal and encoding can show: what controls it, or is no character, is escaped."""
    return escaped(text.translate(ESCAPES))


class Screen(io.TextIOWrapper):
    """Standard output that no name can turn into commands, and that takes any character."""

    def __init__(self, stream, kept: str):
        super().__init__(stream.buffer, stream.encoding, "backslashreplace",
                         line_buffering=stream.line_buffering, write_through=stream.write_through)
        self.before = stream  # which would close the buffer when it goes
        self.escapes = {c: text for c, text in ESCAPES_IN_TEXT.items() if chr(c) not in kept}

    def write(self, text: str) -> int:
        return super().write(text.translate(self.escapes))


def guard_screen():
    """From here on; a progress bar returns to the start of its line."""
    if not isinstance(sys.stdout, Screen):
        sys.stdout.flush()
        sys.stdout, sys.stderr = Screen(sys.stdout, ""), Screen(sys.stderr, "\r")
