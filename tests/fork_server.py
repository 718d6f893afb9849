"""Run many `batch-infer` and `python` commands quickly: a server forks for each, with all slow libraries imported.

`start` writes programs named `batch-infer` and `python` to a folder, which send their arguments, working folder,
environment and standard streams to the server.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SLOW_MODULES = (
    "batch_infer.azureml.batch",
    "batch_infer.jobs",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "pandas",
    "peft.tuners",
    "scipy.interpolate",
    "scipy.stats",
    "torch._inductor.config",
    "transformers.models.clip.modeling_clip",
)
"""Modules whose import takes most of the time of a command, with what they import."""
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(request)
    sys.exit(connection.recv(1)[0])
"""


@contextmanager
def start() -> Iterator[Path]:
    """Start a server, and return the folder of its programs until the context ends."""
    folder = Path(tempfile.mkdtemp(prefix="batch-infer-"))  # short, because addresses of sockets are
    address = folder / "socket"
    for name in ("batch-infer", "python"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
    line = [sys.executable, "-m", "tests.fork_server", str(address)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield folder / "bin"
        finally:
            server.terminate()
            server.wait()
            shutil.rmtree(folder)


def serve(address: str) -> None:
    """Fork for each request. The child runs the command, and the parent answers with its exit code."""
    for name in SLOW_MODULES:
        importlib.import_module(name)
    gc.freeze()  # Otherwise, collecting garbage would copy the memory of the server in each child
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
            while _reap():
                pass


def _reap() -> bool:
    """Collect an ended child, if there is one."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _answer(connection: socket.socket) -> None:
    """Run a command in a second child, and send its exit code."""
    header, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    size = int.from_bytes(header, "big")
    request = b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    program, arguments, folder, environment = json.loads(request)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = os.fdopen(0, encoding="utf-8")
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8") for number in (1, 2))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(_run_to_end(program, arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(bytes([code % 256]))
    os._exit(0)


def _run_to_end(program: str, arguments: list[str]) -> int:
    """Run a command in this process, and return its exit code.

    The caller ends the process without the interpreter's own cleanup, which would copy the memory of the server.
    """
    try:
        _run(program, arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run(program: str, arguments: list[str]) -> None:
    """Run a command in this process. Raises SystemExit with its exit code."""
    if program == "batch-infer":
        from batch_infer.__main__ import main

        sys.argv = ["batch-infer", *arguments]
        main()
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
