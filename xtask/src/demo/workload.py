"""Writes 64 MiB of files, reads them back, and hashes what was read."""

import hashlib
import os
import platform
import random
import time

FILES = 64
MIB = 1 << 20

print("container's kernel:", platform.release())
print("container's python:", platform.python_version(), "as process", os.getpid())

begin = time.monotonic()
source = random.Random(2024)
written = hashlib.sha256()
for number in range(FILES):
    content = source.randbytes(MIB)
    written.update(content)
    with open(f"/tmp/{number}", "wb") as file:
        file.write(content)

read = hashlib.sha256()
for number in range(FILES):
    with open(f"/tmp/{number}", "rb") as file:
        read.update(file.read())

same = read.digest() == written.digest()
print(f"wrote and read {FILES} files, {FILES * MIB >> 20} MiB, in {time.monotonic() - begin:.1f} s")
print("sha256 of what was read:", read.hexdigest(), "(as written)" if same else "(DIFFERENT)")
raise SystemExit(0 if same else 1)
