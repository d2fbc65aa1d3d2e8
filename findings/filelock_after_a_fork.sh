#!/usr/bin/env bash
# filelock 4.3.1: a forked child neither holds nor can release its parent's lock.
# Guess: flock belongs to the open file, which a fork shares; so the child's lock.is_locked is True, and its
# lock.release() frees the lock for everybody.
# Seen: in the child is_locked is False at once and release() does nothing; a third process still finds the lock held.
source "$(dirname "$0")/pinned.sh"
pinned filelock==4.3.1
check <<'CODE'
import os
import subprocess
import sys

from filelock import FileLock

lock = FileLock("x.lock")
lock.acquire()
child = os.fork()
if not child:
    held = lock.is_locked
    lock.release()
    os._exit(int(held))
held_in_child = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
third = "from filelock import FileLock, Timeout\ntry:\n FileLock('x.lock', timeout=0).acquire()\nexcept Timeout: print('held')"
seen = subprocess.run([sys.executable, "-c", third], capture_output=True, text=True).stdout.strip()
print(held_in_child, lock.is_locked, seen)
assert held_in_child == 0 and lock.is_locked and seen == "held"
CODE
