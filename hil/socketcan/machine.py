"""A machine with Debian's kernel in QEMU, on the root file system of this one.

    cache:      kernel and the modules needed, unpacked from Debian's package, in the order of their loading
    initramfs:  busybox, those modules, ``init``, the command
    root:       the host's, read-only through 9p, under a layer in memory; /tmp and /run are the machine's own
    ports:      first serial port: what kernel and command say; second: the command's exit status

Needs no root, no KVM and no image; takes about five seconds to boot. There is no network in it.
"""

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Timer
from zlib import crc32

from hil.guard import guard

INIT = Path(__file__).with_name("init")
META_PACKAGE = "linux-image-amd64"
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "vcan", "can_raw", "sch_tbf")
KVM = "SERVO_GATEWAY_KVM"  # =1 asks for it: there are hosts where a machine under KVM hangs
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LC_ALL": "C"}


class MachineError(Exception):
    """There is no machine to be had; the message says what is missing, or what the machine said last."""


def run_in_machine(command: Sequence[str], tell: Callable[[str], None], *, within_s: float) -> int:
    """Run ``command`` in a fresh machine; its exit status. ``tell`` gets every line that it says, as it says it.

    Raises MachineError if that cannot be, or takes longer.
    """
    kernel = fetch_kernel()
    with tempfile.TemporaryDirectory(prefix="servo-gateway-machine-", ignore_cleanup_errors=True) as scratch:
        initramfs, status = Path(scratch, "initramfs"), Path(scratch, "status")
        initramfs.write_bytes(_initramfs(kernel / "modules", shlex.join(command)))
        with subprocess.Popen(
            _qemu(kernel / "vmlinuz", initramfs, status),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for the owner
        ) as process:
            watch, alarm = guard(process, Path(scratch)), Timer(within_s, process.kill)
            alarm.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    tell(line.decode(errors="replace").rstrip())
            finally:
                alarm.cancel()
                for child in (process, watch):
                    child.kill()
                    child.wait()
        told = status.read_text().strip() if status.exists() else ""
    if not told:
        raise MachineError(f"the machine ended without a result, or had none within {within_s:g} s")
    return int(told)


def _qemu(kernel: Path, initramfs: Path, status: Path) -> list[str]:
    # the oldest processor that NumPy's wheels run on: what newer ones can do is slower to emulate
    processor = ("-accel", "kvm", "-cpu", "host") if os.environ.get(KVM) == "1" else ("-cpu", "Nehalem")
    return [
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", *processor, "-smp", "2", "-m", "1G"),
        *("-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        *("-serial", "stdio", "-serial", f"file:{status}"),
        *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
    ]


def _initramfs(modules: Path, command: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("bin", "dev", "host", "proc", "root", "scratch"):
            (root / name).mkdir()
        shutil.copy(INIT, root / "init")
        shutil.copy(_tool("busybox"), root / "bin")
        shutil.copytree(modules, root / "modules")
        (root / "command").write_text(command)
        names = "\n".join(str(path.relative_to(root)) for path in root.rglob("*"))
        return subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), capture_output=True, check=True
        ).stdout


# --- the kernel ------------------------------------------------------------------------------------------------------


def fetch_kernel() -> Path:
    """A directory with ``vmlinuz`` and ``modules/``: Debian's newest kernel, fetched if it is not there yet.

    Raises MachineError if the package lists have none.
    """
    if platform.machine() != "x86_64":
        raise MachineError(f"the machine is an x86_64 one, this is {platform.machine()}")
    for tool in ("qemu-system-x86_64", "busybox", "apt-get", "dpkg", "depmod", "modprobe"):
        _tool(tool)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "servo-gateway"
    release = _newest_release()
    kernel = cache / f"linux-{release}-{crc32(' '.join(MODULES).encode()):08x}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "linux.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kernel.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{kernel.name}.") as scratch:
                _unpack(release, Path(scratch), Path(scratch, "complete"))
                Path(scratch, "complete").rename(kernel)
    return kernel


def _newest_release() -> str:
    """As ``uname -r`` has it: what the package that leads to the newest kernel depends on."""
    shown = _run("apt-cache", "show", "--no-all-versions", META_PACKAGE)
    if found := re.search(r"^Depends:.*?\blinux-image-(\S+)", shown, re.MULTILINE):
        return found[1]
    raise MachineError(
        f"the package lists have no {META_PACKAGE}: `apt-get update` may help on Debian. Elsewhere, as root, on a "
        "kernel with CAN, nothing of this is needed: `modprobe vcan`"
    )


def _unpack(release: str, scratch: Path, target: Path) -> None:
    try:
        _run("apt-get", "download", "--quiet=2", f"linux-image-{release}", cwd=scratch)
    except MachineError as error:
        raise MachineError(f"{error}; if the package lists are old, `apt-get update` helps") from error
    (package,) = scratch.glob("*.deb")
    root = scratch / "root"
    _run("dpkg", "--extract", str(package), str(root))
    _run("depmod", "--basedir", str(root), release)
    needed = _run("modprobe", "--dirname", str(root), "--set-version", release, "--show-depends", "--all", *MODULES)
    # "insmod PATH", each behind those that it needs; a shared one comes again and again
    paths = dict.fromkeys(line.split()[1] for line in needed.splitlines() if line.startswith("insmod "))
    (target / "modules").mkdir(parents=True)
    for number, path in enumerate(paths):
        shutil.copy(path, target / "modules" / f"{number:02}-{Path(path).name}")
    shutil.copy(root / "boot" / f"vmlinuz-{release}", target / "vmlinuz")


def _tool(name: str) -> str:
    if path := shutil.which(name, path=ENVIRONMENT["PATH"]):
        return path
    raise MachineError(f"there is no {name}; on Debian, `hil/prerequisites.sh socketcan` installs what is missing")


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(f"{shlex.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
