"""The SocketCAN rig: the suites that need a kernel with CAN, where the kernel at hand has none.

    python -m hil.socketcan
      kernel has vcan:  unshare --net --mount ----------\\
      else:             QEMU, Debian's kernel, init ------ inside: vcan0 up, pytest

Both run the same tests on this root file system, and neither touches the network of the host. It knows pytest and
nothing of the gateway.
"""
