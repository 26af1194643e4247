"""What this machine has that a bus could be behind: serial ports and CAN channels. Looks, opens nothing."""

from dataclasses import dataclass
from pathlib import Path

import can
from serial.tools import list_ports

NETWORK_LINKS = Path("/sys/class/net")
ARPHRD_CAN = 280  # type of a SocketCAN link (Linux if_arp.h)
# they lead to no adapter, or are looked for in another way: socketcand's beacons would be listened to for seconds
_NO_ADAPTERS = frozenset({"serial", "slcan", "socketcan", "socketcand", "udp_multicast", "virtual"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """One port or channel; ``name`` is what a scan calls it."""

    name: str
    detail: str


def serial_ports(by_id: Path = Path("/dev/serial/by-id")) -> list[Adapter]:
    """Serial ports that a device is behind, by the name that stays the same when it is plugged in again."""
    lasting = {str(link.resolve()): str(link) for link in by_id.iterdir()} if by_id.is_dir() else {}
    found = [port for port in list_ports.comports() if port.hwid != "n/a"]  # else: a socket on the board, if that
    return [Adapter(lasting.get(port.device, port.device), port.description) for port in sorted(found)]


def can_channels(links: Path = NETWORK_LINKS) -> list[Adapter]:
    """SocketCAN links, then the channels that python-can's other interfaces find."""
    found = [
        Adapter(f"socketcan:{link.name}", "down" if _read(link / "operstate") == "down" else "up")
        for link in (sorted(links.iterdir()) if links.is_dir() else ())
        if _read(link / "type") == str(ARPHRD_CAN)
    ]
    others = can.detect_available_configs(sorted(can.interfaces.VALID_INTERFACES - _NO_ADAPTERS))
    return found + [Adapter(f"{other['interface']}:{other['channel']}", "") for other in others]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
