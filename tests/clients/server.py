"""A server to test with, and the program itself."""

import contextlib
import json
import os
import subprocess
import urllib.request

PROGRAM = os.environ.get("QKOV", "target/release/qkov")


@contextlib.contextmanager
def serve(*arguments):
    """The address of a running server."""
    command = [PROGRAM, "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "http://" in line:
                yield "http://" + line.split("http://")[1].split(",")[0]
                break
        else:
            raise RuntimeError(f"{command} ended with {process.wait()}")
    finally:
        process.terminate()
        code = process.wait(timeout=30)
        process.stderr.close()
    assert code == 0, f"the server ended with {code}"


def qkov(*arguments):
    """What the program prints, as JSON."""
    run = subprocess.run([PROGRAM, *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def post(url, value):
    """What is answered to a value as JSON."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(value).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
