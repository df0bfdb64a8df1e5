#!/usr/bin/env bash
# python.sh FOLDER: an aarch64 Python with torch and pytest in FOLDER, run by qemu-user as FOLDER/python. `make arm` calls it.
# Packages come from the apt sources of this machine (Debian 12 has Python 3.11) into FOLDER; nothing is installed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
to=$(cd "$1" && pwd)
pip=${PIP:-python3.11 -m pip}
packages="python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libgomp1 libstdc++6
  zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libsqlite3-0 libuuid1 libcrypt1"

for tool in apt-get dpkg-deb qemu-aarch64; do
  command -v $tool > /dev/null || { echo "$tool is not here: make arm needs Debian 12, and its package qemu-user" >&2; exit 1; }
done

if [ ! -e "$to/root/.ready" ]; then
  rm -rf "$to/root" "$to/apt"
  mkdir -p "$to/root" "$to/apt/state/lists/partial" "$to/apt/cache/archives/partial" "$to/apt/debs"
  : > "$to/apt/status"
  cat > "$to/apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures {"arm64";};
APT::Sandbox::User "";
Dir::State "$to/apt/state";
Dir::State::status "$to/apt/status";
Dir::Cache "$to/apt/cache";
CONF
  export APT_CONFIG=$to/apt/apt.conf
  apt-get -qq update
  (cd "$to/apt/debs" && apt-get -qq download $packages)
  for package in "$to"/apt/debs/*.deb; do dpkg-deb -x "$package" "$to/root"; done
  touch "$to/root/.ready"
fi

if [ ! -e "$to/site/.ready" ] || [ "$here/requirements.lock" -nt "$to/site/.ready" ]; then
  rm -rf "$to/site"
  $pip install --quiet --no-deps --target "$to/site" --python-version 3.11 --only-binary :all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    -r "$here/requirements.lock"
  touch "$to/site/.ready"
fi

cat > "$to/python" <<RUN
#!/bin/sh
exec qemu-aarch64 -L "$to/root" -cpu "\${ARM_CPU:-max}" -E PYTHONPATH="$to/site" -E PYTHONHOME="$to/root/usr" \\
  "$to/root/usr/bin/python3.11" "\$@"
RUN
chmod +x "$to/python"
