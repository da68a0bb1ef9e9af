"""A federation on this machine: Flower's SuperLink and SuperNodes as processes, with TLS and the nodes' own keys.

    FOLDER/keys     ca.crt, server.crt, server.key, node-0 and node-0.pub, ..: made once; private ones are the owner's
    FOLDER/app      the bundle (deployed.py)            FOLDER/run     the server's run folder
    FOLDER/node-0   what the clients of node 0 keep     FOLDER/logs    one file a process
    FOLDER/home-*   Flower's own, one a process         FOLDER/processes.json   process ids, for `down` and `status`

The same keys and commands serve real sites: each gets its own node key, `ca.crt` and the address. No key is ever printed.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from taciturn.core.errors import ConfigError, RunError
from taciturn.core.state import write_atomic

YEARS = 2  # that certificates are valid
START = 90.0  # seconds for a server to listen
AGAIN = 15.0  # seconds until a node that ended is started again: its lease of up to 60 s refuses it earlier
CONNECTION = "taciturn"  # the name of the SuperLink in Flower's configuration
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
PROMPT = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # seconds; Flower's own is 1, once for every message


def make_keys(folder: Path, nodes: int, hosts: Sequence[str] = ("localhost", "127.0.0.1")) -> None:
    """What is missing of a CA, a server certificate for these hosts, and an EC P-384 key pair for each node.

    The certificate is for this machine's own names too: a SuperLink's processes talk to it there, with the same check.
    The CA's own key is not kept: new hosts need a new CA. Errors: `ConfigError` without the package cryptography.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError as error:
        raise ConfigError(f"keys and certificates need cryptography ({error}): pip install 'taciturn[flower]'") from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    if not (folder / "server.crt").exists():
        ca, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "taciturn federation")])

        def certificate(name: x509.Name, key: Any, authority: bool, names: x509.SubjectAlternativeName | None) -> Any:
            made = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
            made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
            made = made.not_valid_after(now + datetime.timedelta(days=365 * YEARS))
            made = made.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            made = made if names is None else made.add_extension(names, critical=False)
            return made.sign(ca, hashes.SHA256()).public_bytes(pem)

        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
        everywhere = dict.fromkeys([*hosts, "localhost", "127.0.0.1"])
        places: list[Any] = [x509.IPAddress(ipaddress.ip_address(h)) if _is_ip(h) else x509.DNSName(h) for h in everywhere]
        _secret(folder / "server.key", server.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        write_atomic(folder / "ca.crt", [certificate(issuer, ca, True, None)])
        write_atomic(folder / "server.crt", [certificate(subject, server, False, x509.SubjectAlternativeName(places))])
    for number in range(nodes):
        if not (folder / f"node-{number}.pub").exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _secret(folder / f"node-{number}", key.private_bytes(pem, serialization.PrivateFormat.OpenSSH, plain))
            text = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            write_atomic(folder / f"node-{number}.pub", [text + b"\n"])


def connect(home: Path, address: str, keys: Path) -> None:
    """Write the connection of `flwr run` and `flwr supernode` to a SuperLink at HOST:PORT; home: for $FLWR_HOME."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
    write_atomic(home / "config.toml", [f'{text}root-certificates = "{keys / "ca.crt"}"\n'.encode()])


def _is_ip(host: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def _secret(path: Path, data: bytes) -> None:
    """Write a private key that nobody else can read, at no moment."""
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(data)


def _port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _born(pid: int) -> str:
    """When a process was started, in ticks; "" if there is none: a pid alone may have passed to another process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


@dataclass
class Federation:
    """SuperLink and nodes of a folder; a context manager that ends all of them."""

    folder: Path
    nodes: int = 2
    port: int = field(default_factory=_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    restarts: dict[str, float] = field(default_factory=dict)
    family: dict[str, list[list[Any]]] = field(default_factory=dict)  # by name: [pid, birth] of it and of what it started

    def __enter__(self) -> Federation:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def keys(self) -> Path:
        """Where keys and certificates are."""
        return self.folder / "keys"

    def start(self) -> None:
        """Start the SuperLink, register the nodes' keys, start the nodes. Errors: `ConfigError`, `RunError`."""
        if find_spec("flwr") is None:
            raise ConfigError("a deployed run needs flwr: pip install 'taciturn[flower]'")
        self.folder = self.folder.resolve()
        if alive(self.folder):
            raise RunError(f"{self.folder}: a federation is up; end it with `taciturn deploy down {self.folder}`")
        make_keys(self.keys, self.nodes)
        (self.folder / "logs").mkdir(exist_ok=True)
        connect(self._home("user"), f"127.0.0.1:{self.port}", self.keys)
        self.link()
        for number in range(self.nodes):
            self.command("supernode", "register", str(self.keys / f"node-{number}.pub"), CONNECTION)
            self.desk(number)
            self.node(number)

    def link(self) -> None:
        """Start the SuperLink, and wait until it listens; what a former one has left behind is ended."""
        for pid, born in self.family.get("superlink", []):
            if _same(pid, born):
                os.kill(pid, signal.SIGKILL)
        keys = self.keys
        self._spawn(
            "superlink",
            *(
                "flower-superlink",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--ssl-ca-certfile",
                str(keys / "ca.crt"),
            ),
            *("--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")),
            *("--enable-supernode-auth", "--database", str(self.folder / "superlink.db")),
            "--disable-runtime-dependency-installation",
        )
        end = time.monotonic() + START
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            if self.processes["superlink"].poll() is not None:
                break
            time.sleep(0.2)
        raise RunError(f"the SuperLink does not listen on port {self.port}; see {self.folder / 'logs' / 'superlink.log'}")

    def desk(self, number: int) -> None:
        """Start the resident process of a node (desk.py)."""
        words = "-m", "taciturn.cli", "deploy", "desk", str(self.folder / f"node-{number}")
        self._spawn(f"desk-{number}", Path(sys.executable).name, *words)

    def node(self, number: int) -> None:
        """Start a node."""
        state = self.folder / f"node-{number}"
        told = f'partition-id={number} num-partitions={self.nodes} state-dir="{state}"'
        self._spawn(
            f"node-{number}",
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.keys / "ca.crt"), "--auth-supernode-private-key"),
            *(str(self.keys / f"node-{number}"), "--port", str(_port()), "--node-config", told),
        )

    def supervise(self) -> None:
        """Start a node again that has ended; note what the processes have started, so that nothing is left behind."""
        self._note()
        for name, process in list(self.processes.items()):
            if not name.startswith("superlink") and process.poll() is not None:
                if time.monotonic() - self.restarts.get(name, 0.0) < AGAIN:
                    continue
                self.restarts[name] = time.monotonic()
                kind, number = name.split("-")
                (self.node if kind == "node" else self.desk)(int(number))

    def run(self, app: Path, out: Path, say: Callable[[dict[str, Any]], None], seconds: float = 86400.0) -> None:
        """Submit a bundle and wait until its server is done; say: is told every new line of the record.

        Errors: `RunError` if the run ends without a result; what it has done is in `out`, and is gone on with next time.
        """
        for name in ("carried.json", "result.json"):
            (out / name).unlink(missing_ok=True)
        told, end, number = len(_lines(out)), time.monotonic() + seconds, self._submit(app)
        while not (out / "carried.json").exists():
            if time.monotonic() > end or self.processes["superlink"].poll() is not None or self._over(number):
                time.sleep(1.0)
                if (out / "carried.json").exists():
                    break
                raise RunError(f"the run ended without a result; see {self.folder / 'logs'}: {self._last('superlink')}")
            self.supervise()
            time.sleep(0.5)
            told = _tell(out, told, say)
        _tell(out, told, say)

    def _submit(self, app: Path) -> str:
        found = re.search(r"(\d{6,})", self.command("run", str(app), CONNECTION))
        self._asked, self._serves = time.monotonic(), False
        return found.group(1) if found else ""

    def _over(self, number: str) -> bool:
        """True if the server's process has come and gone, or if Flower says that the run has finished before there was one;
        Flower is asked every 30 seconds, for each question starts a process.
        """
        if self.started("superlink", "flwr-serverapp"):
            self._serves = True
            return False
        if self._serves or time.monotonic() - self._asked < 30.0 or not number:
            return self._serves
        self._asked = time.monotonic()
        return "finished" in self.command("ls", CONNECTION, "--run-id", number, check=False)

    def _last(self, name: str) -> str:
        with suppress(OSError):
            lines = (self.folder / "logs" / f"{name}.log").read_text(errors="replace").splitlines()
            return "; ".join(line for line in lines[-200:] if re.search(r"\w*Error\b|ERROR", line))[-600:]
        return ""

    def command(self, *words: str, check: bool = True) -> str:
        """What `flwr ..` prints. Errors: `RunError`."""
        program = Path(sys.executable).with_name("flwr")
        done = subprocess.run([program, *words], env=self._environment("user"), capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RunError(f"flwr {' '.join(words)} failed: {(done.stdout + done.stderr).strip()[-600:]}")
        return done.stdout

    def started(self, name: str, word: str) -> list[int]:
        """What a process of the federation has started, and that in turn, where the command has the word."""
        found = []
        for pid in _descendants(self.processes[name].pid, _parents()):
            with suppress(OSError):
                found += [pid] if word in Path(f"/proc/{pid}/cmdline").read_text() else []
        return found

    def stop(self) -> None:
        """End all processes that this federation has started."""
        if self.processes:
            self._note()
        end_all(self.folder)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)

    def _home(self, name: str) -> Path:
        home = self.folder / f"home-{name}"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        return home

    def _environment(self, name: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return PROMPT | os.environ | QUIET | {"FLWR_HOME": str(self._home(name)), "PATH": path}

    def _spawn(self, name: str, program: str, *words: str) -> None:
        with open(self.folder / "logs" / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [Path(sys.executable).with_name(program), *words],
                env=self._environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.family.pop(name, None)
        self._note()

    def _note(self) -> None:
        """Write down who runs: each process, and what it has started and that in turn, with the times of their birth."""
        parents = _parents()
        before = json.dumps(self.family)
        for name, process in self.processes.items():
            kept = {pid: born for pid, born in self.family.get(name, []) if _born(pid) == born}
            for pid in [process.pid, *kept]:
                kept |= {child: _born(child) for child in _descendants(pid, parents)}
            first = [process.pid, _born(process.pid) or "gone"]
            self.family[name] = [first, *([pid, born] for pid, born in kept.items() if pid != process.pid)]
        if json.dumps(self.family) != before:
            write_atomic(self.folder / "processes.json", [json.dumps(self.family).encode()])


def _lines(out: Path) -> list[bytes]:
    """The whole lines of a record that another process writes."""
    record = out / "record.jsonl"
    return record.read_bytes().split(b"\n")[:-1] if record.exists() else []


def _tell(out: Path, told: int, say: Callable[[dict[str, Any]], None]) -> int:
    """Say what is new in a record -> how many lines are known; one that goes back to its checkpoint becomes shorter."""
    lines = _lines(out)
    for line in lines[told:]:
        say(json.loads(line))
    return len(lines)


def alive(folder: Path) -> dict[str, int]:
    """Processes of a folder's federation that run: name -> process id."""
    return {name: int(pids[0][0]) for name, pids in _known(folder).items() if _same(*pids[0])}


def _known(folder: Path) -> dict[str, list[list[Any]]]:
    try:
        known: dict[str, list[list[Any]]] = json.loads((folder / "processes.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {folder / 'processes.json'}: {error}") from error
    return known


def _same(pid: int, born: str) -> bool:
    """True if this very process still runs."""
    with suppress(OSError, IndexError):
        return _born(pid) == born and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def _parents() -> dict[int, int]:
    """The parent of every process of this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            found[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return found


def _descendants(pid: int, parents: dict[int, int]) -> list[int]:
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def end_all(folder: Path, patience: float = 10.0) -> list[str]:
    """End the processes of a folder's federation, and what they started -> the names of those that ran."""
    names, end = alive(folder), time.monotonic() + patience
    for pid in names.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while alive(folder) and time.monotonic() < end:
        time.sleep(0.1)
    for pid, born in (one for family in _known(folder).values() for one in family):
        if _same(pid, born):  # a pid may have passed to another process
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return sorted(names)
