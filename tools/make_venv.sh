#!/bin/sh
# make_venv.sh PYTHON DIR: a virtual environment, also on a Debian or Ubuntu that came without python3-venv.
set -eu
python=$1 dir=$2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "uvit-fast needs Python 3.11 or newer; $python is $("$python" --version). Choose one: make PYTHON=python3.12 ..." >&2
    exit 2
}
works() { [ -x "$dir/bin/python" ] && "$dir/bin/python" -m pip --version >/dev/null 2>&1; }
works && exit 0
rm -rf "$dir"
"$python" -m venv "$dir" >/dev/null 2>&1 && works && exit 0
rm -rf "$dir"
if "$python" -m pip --version >/dev/null 2>&1; then # the system's pip can fill an environment that has none
    "$python" -m venv --without-pip "$dir"
    "$python" -m pip --python "$dir/bin/python" install -q pip && works && exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && apt-get install -y -q python3-venv && rm -rf "$dir" && "$python" -m venv "$dir" && works && exit 0
fi
echo "$python cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2
exit 2
