#!/usr/bin/env python3
"""g++ that compiles the same text with the same flags once: .ci/run builds the library three times,
in the tree, from the source archive and with its CUDA kernels.

Objects lie in $KEPT_OBJECTS by the hash of the preprocessed source, the compiler and its flags.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

COMPILER = "g++"


def compile_once(arguments: list[str]) -> None:
    target = Path(arguments[arguments.index("-o") + 1])
    paths = ("-I", "-D", "-ffile-prefix-map")  # what they change is in the text
    flags = [a for a in arguments if a.startswith("-") and not a.startswith(paths)]
    rest = [a for a in arguments if a not in ("-c", "-o", str(target))]
    # Writes the list of headers as well, if that is asked for.
    preprocess = [COMPILER, "-E", "-P", "-MT", str(target), *rest]
    text = subprocess.run(preprocess, check=True, capture_output=True).stdout
    version = subprocess.run([COMPILER, "-v"], check=True, capture_output=True).stderr
    key = hashlib.sha256(b"\0".join([version, " ".join(flags).encode(), text])).hexdigest()
    kept = Path(os.environ["KEPT_OBJECTS"]) / f"{target.stem}-{key[:20]}.o"
    if not kept.exists():
        subprocess.run([COMPILER, *arguments], check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, partial)
        partial.rename(kept)
    shutil.copyfile(kept, target)


if "-c" in sys.argv:
    try:
        compile_once(sys.argv[1:])
    except subprocess.CalledProcessError as failed:
        sys.stderr.buffer.write(failed.stderr or b"")
        sys.exit(failed.returncode)
else:
    os.execvp(COMPILER, [COMPILER, *sys.argv[1:]])
