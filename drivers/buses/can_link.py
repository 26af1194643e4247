"""The network link of a SocketCAN channel, as sysfs shows it: why no frame can pass, and what would mend it.

A bound socket says nothing of a link whose controller is in bus-off: it takes frames and receives none. The kernel
takes the carrier away then (``can_bus_off`` in ``drivers/net/can/dev``). Virtual links always have theirs.
"""

from pathlib import Path

from drivers.buses import CanSpec

NET = Path("/sys/class/net")
_IFF_UP = 1


def how_to_return(channel: str) -> str:
    """What to do about bus-off."""
    return (
        f"`ip link set {channel} type can restart-ms 100`, set while the link is down, "
        f"lets the controller return by itself"
    )


def link_problem(spec: CanSpec, net: Path | None = None) -> str | None:
    """Why the channel can carry nothing now, with the command that helps; None if it can, or nobody knows."""
    net = net or NET
    link, channel = net / spec.channel, spec.channel
    virtual = channel.startswith("vcan")
    if not channel or not net.exists():
        return None
    if not link.exists():
        if virtual:
            return f"there is no such link; `ip link add dev {channel} type vcan` makes it"
        return "there is no such link: is the adapter plugged in, its driver loaded? `ip link show type can` lists all"
    try:
        if not int((link / "flags").read_text(), 16) & _IFF_UP:
            return f"the link is down; `ip link set {channel} up{'' if virtual else _rates(spec)}` brings it up"
        if (link / "carrier").read_text().strip() == "0":
            restart = f"`ip link set {channel} type can restart` starts it again"
            return f"the controller is in bus-off; {restart}, and {how_to_return(channel)}"
    except (OSError, ValueError):  # it went away meanwhile: whoever opens it will see
        return None
    return None


def _rates(spec: CanSpec) -> str:
    data = f" dbitrate {spec.data_bitrate or spec.bitrate} fd on" if spec.fd else ""
    return f" type can bitrate {spec.bitrate}{data}"
