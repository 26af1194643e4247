"""What the kernel says a network link is: asked over rtnetlink, since a name proves nothing.

    request   nlmsghdr, ifinfomsg, IFLA_IFNAME      answer   ..., IFLA_LINKINFO { IFLA_INFO_KIND "vcan" }

A physical adapter has no kind at all, a tunnel of frames into another name space has another one (``vxcan``).
Source: rtnetlink(7), linux/if_link.h.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Final

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, number, port
_LINK: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_GETLINK, _NEWLINK, _REQUEST = 18, 16, 1
_IFNAME, _LINKINFO, _INFO_KIND = 3, 18, 1
_TYPE_BITS: Final = 0x3FFF
_MOST_NAME: Final = 15  # characters (IFNAMSIZ)


def link_kind(name: str) -> str | None:
    """The kind of a virtual link ("vcan", "veth"); "" of a link that is no virtual one; None if there is none."""
    word = name.encode() + b"\0"
    if len(word) > _MOST_NAME + 1:
        return None
    request = _LINK.pack(0, 0, 0, 0, 0) + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(word), _IFNAME) + word
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.sendto(_HEADER.pack(_HEADER.size + len(request), _GETLINK, _REQUEST, 1, 0) + request, (0, 0))
        answer = kernel.recv(1 << 16)
    if _HEADER.unpack_from(answer)[1] != _NEWLINK:
        return None
    info = dict(_attributes(answer[_HEADER.size + _LINK.size :])).get(_LINKINFO, b"")
    return dict(_attributes(info)).get(_INFO_KIND, b"").rstrip(b"\0").decode()


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & _TYPE_BITS, data[_ATTRIBUTE.size : length]
        data = data[max(_ATTRIBUTE.size, length + 3 & ~3) :]
