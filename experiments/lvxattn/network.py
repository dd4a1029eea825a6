# SPDX-License-Identifier: Apache-2.0
"""Hosts on one Linux machine: network namespaces with a rate-limited link each to one bridge. Root and iproute2 needed.

Every host has a name of its own (a UTS namespace), which its hosts file maps to its end of the link: Gloo binds the
address of the host's name. A link is full duplex: its rate is kept by a token bucket at either end, so that many
senders to one receiver share what it receives. Delay is that of the machine (netem is not everywhere).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtjax.errors import InputError

TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "taskset": "util-linux"}
_NAME = "vtx{pid}h{host}"
_HOSTS = Path("/etc/netns")  # `ip netns exec NAME` puts what lies in NAME here over /etc


class Network:
    """Hosts 0 .. n-1, from `with` on; gone at its end, also after an error or a signal.

    Args:
      hosts: number of them.
      rate: of each link in each direction, as `tc` says it ("1gbit", "100mbit"); "none" = as fast as the machine.

    Raises:
      InputError: not root, a tool is missing, or the kernel refuses.
    """

    def __init__(self, hosts: int, rate: str = "1gbit"):
        self.hosts, self.rate = hosts, rate
        self._pid = os.getpid()
        self._bridge = f"vtx{self._pid}b"
        self._children: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Network:
        if problem := missing():
            raise InputError(problem)
        _sweep()
        self._handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
        for child in self._children:
            child.wait()
        for host in range(self.hosts):
            _clear(self.name(host))
        _try("ip", "link", "del", self._bridge)
        signal.signal(signal.SIGTERM, self._handler)

    def name(self, host: int) -> str:
        """Of the host, of its namespace, and of the bridge's end of its link."""
        return _NAME.format(pid=self._pid, host=host)

    @staticmethod
    def address(host: int) -> str:
        """Of its end of the link."""
        return f"10.77.0.{host + 1}"

    def start(
        self, host: int, words: Sequence[str], cores: Sequence[int], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[Any]:
        """Starts a process on a host, on the given cores; it is killed at the end of `with`. `options` of `Popen`."""
        name = self.name(host)
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        pinned = ["taskset", "-c", ",".join(map(str, cores))]
        command = ["ip", "netns", "exec", name, *inside, *pinned, *words]
        child = subprocess.Popen(command, env={**os.environ, **environment}, **options)
        self._children.append(child)
        return child

    def cut(self, host: int) -> None:
        """Takes the bridge's end of a host's link down; nobody is told."""
        _must("ip", "link", "set", self.name(host), "down")

    def mend(self, host: int) -> None:
        """Takes it up again."""
        _must("ip", "link", "set", self.name(host), "up")

    def _build(self) -> None:
        _must("ip", "link", "add", self._bridge, "type", "bridge")
        _must("ip", "link", "set", self._bridge, "up")
        for host in range(self.hosts):
            name, inside = self.name(host), ("ip", "-n", self.name(host))
            _must("ip", "netns", "add", name)
            _must("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _must("ip", "link", "set", name, "master", self._bridge, "up")
            _must(*inside, "link", "set", "lo", "up")
            _must(*inside, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _must(*inside, "link", "set", "eth0", "up")
            if self.rate != "none":
                # A short queue: in a long one acknowledgements wait behind data, and Gloo reaches half of the rate.
                bucket = ("root", "tbf", "rate", self.rate, "burst", "256kb", "latency", "2ms")
                _must("tc", "qdisc", "add", "dev", name, *bucket)
                _must("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", *bucket)
            folder = _HOSTS / name
            folder.mkdir(parents=True)
            everyone = [f"{self.address(other)} {self.name(other)}\n" for other in range(self.hosts)]
            (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *everyone]), encoding="ascii")


def missing() -> str:
    """What keeps this machine from having hosts, in one line; empty where nothing does."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        packages = ", ".join(sorted({TOOLS[tool] for tool in absent}))
        return f"network namespaces need {', '.join(absent)} (Debian's package {packages}), found none"
    if os.geteuid() != 0:
        return f"network namespaces need root, found user {os.geteuid()}"
    return ""


_RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 6000))
print(flush=True)
connection, _ = server.accept()
count, start = len(connection.recv(1)), time.perf_counter()
while data := connection.recv(1 << 20):
    count += len(data)
print(count / (time.perf_counter() - start))
"""
_SEND = """
import socket, sys
socket.create_connection((sys.argv[1], 6000)).sendall(bytes(int(sys.argv[2])))
"""


def goodput(network: Network, size: int = 2**25) -> float:
    """Bytes per second of one TCP stream of `size` bytes from host 0 to host 1."""
    address, python = network.address(1), (sys.executable, "-c")
    there = network.start(1, [*python, _RECEIVE, address], [0], {}, stdout=subprocess.PIPE, text=True)
    assert there.stdout is not None
    there.stdout.readline()  # it listens
    network.start(0, [*python, _SEND, address, str(size)], [0], {}).wait(timeout=120)
    return float(there.communicate(timeout=120)[0])


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _sweep() -> None:
    """Clears what a killed process of this kind left."""
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=False).stdout
    listed += subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name in set(re.findall(r"\bvtx\d+[hb]\d*", listed)):
        pid = re.match(r"vtx(\d+)", name)
        if pid and not Path(f"/proc/{pid[1]}").exists():
            _clear(name)


def _clear(name: str) -> None:
    if re.fullmatch(r"vtx\d+h\d+", name):
        _try("ip", "netns", "del", name)
        shutil.rmtree(_HOSTS / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            _HOSTS.rmdir()  # where nobody else has anything in it
    _try("ip", "link", "del", name)


def _try(*words: str) -> None:
    subprocess.run(words, capture_output=True, check=False)


def _must(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(words)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
