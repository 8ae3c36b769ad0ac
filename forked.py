"""RANKS=2 python stage.py: a stage on a CPU forks itself into so many ranks.

They have torch imported already and need no launcher, so they start in no time, at no port that is chosen by
anybody. They end with the first of them, whose exit code is that of all.
"""

import os
import select
import signal
import socket
import sys

import torch
import torch.distributed as dist

import files

others = {}  # in the first process: {pid: the pipe that brings its last words}
pipe = None  # in the others: where theirs go


def fork(count: int) -> tuple[int, dist.Store]:
    """The rank and the store of each of so many processes."""
    global others, pipe
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    first = os.getpid()
    with socket.socket() as door:  # open before anybody can knock
        door.bind(("localhost", 0))
        door.listen(count)
        port = door.getsockname()[1]
        for rank in range(1, count):
            ours, theirs = os.pipe()
            if pid := os.fork():
                os.close(theirs)
                others[pid] = ours
            else:
                others, pipe = {}, theirs
                files.die_with_parent()
                if os.getppid() != first:  # it has ended already
                    os._exit(1)
                return rank, dist.TCPStore("localhost", port, count)
        return 0, dist.TCPStore("localhost", port, count, is_master=True, wait_for_workers=False,
                                master_listen_fd=door.detach())


def one_has_ended() -> bool:
    """In the first process, which cannot reach the others any more: is it because one of them has ended?"""
    return bool(select.select(others.values(), [], [], 2)[0])


def end(status: int, words: str) -> int:
    """What any of them has to say at its end is said once, by the first, which waits for the others. When one
    fails, they have 2 seconds to say that they fail as well."""
    if pipe:
        os.write(pipe, words.encode())
        return status
    said = [words]
    while others:
        ended = select.select(others.values(), [], [], 2 if status else None)[0]
        for pid in list(others):
            if not ended:
                os.kill(pid, signal.SIGKILL)
            if not ended or others[pid] in ended:
                with os.fdopen(others.pop(pid), errors="replace") as last:
                    said.append(last.read())
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if ended and code < 0:
                    said.append(f"process {pid} was ended by signal {-code}; the same command goes on\n")
                if ended and code:
                    status = code if code > 0 else 128 - code
    print("".join(dict.fromkeys(said)), end="", file=sys.stderr)
    return status
