#!/usr/bin/env bash
# Sets up the emulated arm64 machine that edgepass runs arm64 artifacts on (docs/arm64.md).
#
#   scripts/setup_arm64.sh            set up; nothing to do takes no time
#   scripts/setup_arm64.sh --check    say whether it is usable, by running it, and why not
#
# On the host it installs Debian's qemu-user, gcc-aarch64-linux-gnu and its C library where they are missing (the only
# step that needs root or sudo). All else goes into ${EDGEPASS_ARM64_HOME:-~/.cache/edgepass/arm64}:
#   sysroot/               Debian arm64 packages, unpacked: libc, libstdc++, Python and what they need
#   sysroot/site/          PyPI's aarch64 wheels, at the versions that constraints.txt pins
#   sysroot/proc/cpuinfo   an arm64 core, for onnxruntime to read
# The host's package manager does not learn of arm64: apt runs on a configuration and state of its own.
# PYTHON (default: python3) is the Python whose pip downloads the wheels; its version does not matter.
set -euo pipefail
ulimit -c 0 # a guest that crashes leaves no core file

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${EDGEPASS_ARM64_HOME:-$HOME/.cache/edgepass/arm64}
mkdir -p "$home"
home=$(cd "$home" && pwd)
sysroot=$home/sysroot
python=${PYTHON:-python3}

say() { echo "arm64: $*"; }
fail() {
  echo "arm64: FAILED: $1" >&2
  [ $# -lt 2 ] || echo "arm64:   fix: $2" >&2
  exit 1
}

find_qemu() { command -v qemu-aarch64 || command -v qemu-aarch64-static; }

pins=$(grep -E '^(onnxruntime|apache-tvm|apache-tvm-ffi|numpy|ml_dtypes|protobuf|flatbuffers)==' "$here/../constraints.txt") ||
  fail "constraints.txt pins no onnxruntime" "run the script from a checkout of edgepass"
grep -q '^onnxruntime==' <<<"$pins" && grep -q '^apache-tvm==' <<<"$pins" && grep -q '^apache-tvm-ffi==' <<<"$pins" ||
  fail "constraints.txt must pin onnxruntime, apache-tvm and apache-tvm-ffi"
# What the sysroot was made by: this script and the pins. A change of either makes it anew.
wanted=$({ cat "${BASH_SOURCE[0]}"; echo "$pins"; } | sha256sum | cut -d' ' -f1)

sysroot_is_current() {
  [ -f "$sysroot/.edgepass-stamp" ] && [ "$(head -n 1 "$sysroot/.edgepass-stamp")" = "$wanted" ]
}

# Runs Python in the guest: guest SYSROOT ARGUMENT...
guest() {
  local root=$1
  shift
  env -i PATH=/usr/bin:/bin HOME="$root" PYTHONPATH="$root/site" PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1 \
    "$(find_qemu)" -cpu cortex-a76 -L "$root" "$(readlink -f "$root/usr/bin/python3")" -s -P "$@"
}

try_guest() {
  guest "$1" -c 'import platform, numpy, onnxruntime, tvm_ffi
assert platform.machine() == "aarch64", platform.machine()
versions = f"numpy {numpy.__version__}, onnxruntime {onnxruntime.__version__}, tvm_ffi {tvm_ffi.__version__}"
print(f"Python {platform.python_version()} on {platform.machine()}: {versions}")'
}

check() {
  local bad=0 output
  if ! find_qemu >/dev/null; then
    say "not usable: no qemu-aarch64 on the PATH"
    bad=1
  fi
  if [ ! -f "$sysroot/.edgepass-stamp" ]; then
    say "not usable: $sysroot is not there, or its set-up was cut off"
    bad=1
  elif ! sysroot_is_current; then
    say "not usable: $sysroot was made by another version of this script or of the pins in constraints.txt"
    bad=1
  fi
  command -v aarch64-linux-gnu-gcc >/dev/null ||
    say "note: no aarch64-linux-gnu-gcc, so no TVM library can be cross-compiled with it"
  if [ $bad = 0 ]; then
    if output=$(try_guest "$sysroot" 2>&1); then
      say "usable: $output"
      return 0
    fi
    say "not usable: the guest does not run: $(tail -n 3 <<<"$output")"
  fi
  say "fix: run scripts/setup_arm64.sh"
  return 1
}

# gcc-aarch64-linux-gnu only recommends the C library's development files, without which nothing links.
can_link() {
  local found
  found=$(aarch64-linux-gnu-gcc -print-file-name=crti.o 2>/dev/null) && [ -e "$found" ]
}

install_host_tools() {
  local missing=() sudo=()
  find_qemu >/dev/null || missing+=(qemu-user)
  can_link || missing+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
      fail "${missing[*]} must be installed, and this is neither root nor is there sudo" "as root: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  say "installing ${missing[*]} (apt-get)"
  "${sudo[@]}" apt-get update >"$work/update.log" 2>&1 || true # a stale list may still do
  # No recommended packages: binfmt registration is not needed, edgepass names the emulator itself.
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y \
    --no-install-recommends "${missing[@]}" >"$work/install.log" 2>&1 ||
    fail "apt-get install ${missing[*]}: $(tail -n 3 "$work/install.log")" "see that apt-get works, then run this again"
}

# The host's own Debian sources, and no others (a third party's may have no arm64).
private_apt_sources() {
  local source found=0
  mkdir -p "$work/apt/sources"
  for source in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ -f "$source" ] && grep -qE '^[^#]*/debian(-security)?/?( |$)' "$source" || continue
    sed -E '/^Architectures:/d; s/arch=[^] ]*//; s/\[ *\]//' "$source" >"$work/apt/sources/$(basename "$source")"
    found=1
  done
  [ $found = 1 ] || fail "no Debian source in /etc/apt" "add one (deb http://deb.debian.org/debian CODENAME main)"
}

unpack_debian_packages() {
  local root=$1 package
  say "downloading Debian's arm64 packages"
  private_apt_sources
  mkdir -p "$work/apt/state/lists/partial" "$work/apt/cache/archives/partial"
  : >"$work/apt/state/status" # nothing is installed there yet, so apt fetches all that is needed
  cat >"$work/apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$work/apt/state";
Dir::State::status "$work/apt/state/status";
Dir::Cache "$work/apt/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$work/apt/sources";
CONF
  APT_CONFIG=$work/apt/apt.conf apt-get update >"$work/lists.log" 2>&1 ||
    fail "apt-get update for arm64: $(tail -n 3 "$work/lists.log")" "see that Debian's mirror can be reached"
  APT_CONFIG=$work/apt/apt.conf apt-get install -y --no-install-recommends --download-only \
    python3 libc6 libstdc++6 libgcc-s1 libgomp1 >"$work/download.log" 2>&1 ||
    fail "downloading arm64 packages: $(tail -n 3 "$work/download.log")" "see that Debian's mirror can be reached"
  for package in "$work"/apt/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$root" || fail "unpacking $(basename "$package")" "is there room on the disk of $home?"
  done
  say "unpacked $(find "$work/apt/cache/archives" -name '*.deb' | wc -l) Debian packages"
}

unpack_wheels() {
  local root=$1 version minor wheel platforms=(--platform manylinux2014_aarch64)
  version=$(basename "$(readlink -f "$root/usr/bin/python3")") # python3.11
  version=${version#python}
  "$python" -m pip --version >/dev/null 2>&1 ||
    fail "$python has no pip to download wheels with" "PYTHON=/path/to/a/python/with/pip scripts/setup_arm64.sh"
  say "downloading aarch64 wheels for Python $version:" $pins
  for minor in $(seq 17 "$(guest "$root" -c 'import os; print(os.confstr("CS_GNU_LIBC_VERSION").split(".")[1])')"); do
    platforms+=(--platform "manylinux_2_${minor}_aarch64")
  done
  mkdir -p "$work/wheels" "$root/site"
  # -qq: warnings of pip's own set-up would hide the one line that matters.
  # The list is what onnxruntime and tvm_ffi import. apache-tvm is here for its runtime library.
  "$python" -m pip download -qq --no-deps --only-binary=:all: --dest "$work/wheels" \
    --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none "${platforms[@]}" \
    --constraint <(echo "$pins") onnxruntime apache-tvm apache-tvm-ffi \
    numpy ml_dtypes protobuf flatbuffers packaging typing_extensions >"$work/pip.log" 2>&1 ||
    fail "downloading aarch64 wheels: $(tail -n 3 "$work/pip.log")" "see that PyPI has these versions for Python $version on aarch64"
  for wheel in "$work"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$root/site" || fail "unpacking $(basename "$wheel")" "is there room on the disk of $home?"
  done
  # The guest runs libraries and never compiles: 240 of the wheel's 270 MB.
  rm -rf "$root"/site/tvm/lib/libtvm_compiler.so "$root"/site/tvm/lib/libtvm_runtime_cuda.so \
    "$root"/site/tvm/{include,3rdparty,src,web}
}

# Without bytecode every start compiles its imports again, in emulation: onnxruntime then takes 4 s, with it 2 s.
compile_bytecode() {
  local root=$1 runner=("$python")
  local folders=("$root/usr/lib" "$root"/site/{numpy,onnxruntime,tvm_ffi,ml_dtypes,google,flatbuffers} "$root/site/typing_extensions.py")
  # The host's Python does it faster, if it writes the same bytecode.
  local magic='import importlib.util; print(importlib.util.MAGIC_NUMBER.hex())'
  if [ "$("$python" -c "$magic")" = "$(guest "$root" -c "$magic")" ]; then
    say "compiling bytecode"
  else
    say "compiling bytecode in emulation ($python is of another version; this takes a few minutes)"
    runner=(guest "$root")
  fi
  # A file of some package's tests may not compile on purpose: that is no failure.
  "${runner[@]}" -m compileall -q --invalidation-mode unchecked-hash \
    -x '/(tests?|transformers|quantization|tools|lib2to3)/' "${folders[@]}" >"$work/bytecode.log" 2>&1 || true
}

# pytorch/cpuinfo, inside onnxruntime, reads this and crashes on the host's x86 one.
write_cpuinfo() {
  mkdir -p "$1/proc"
  cat >"$1/proc/cpuinfo" <<'CPU'
processor	: 0
BogoMIPS	: 100.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

CPU
}

set_up() {
  # shellcheck source=/dev/null
  [ "$(. /etc/os-release && echo "$ID")" = debian ] || fail "this is not Debian" "use a Debian host or container"
  exec 9>"$home/.lock"
  flock -n 9 || {
    say "waiting for another set-up to finish"
    flock 9
  }
  rm -rf "$home"/work.* # what a killed set-up left
  work=$(mktemp -d "$home/work.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  install_host_tools
  if sysroot_is_current; then
    say "ready in $sysroot"
    return 0
  fi
  local root=$work/sysroot output
  mkdir "$root"
  unpack_debian_packages "$root"
  write_cpuinfo "$root"
  unpack_wheels "$root"
  compile_bytecode "$root"
  say "trying it"
  output=$(try_guest "$root" 2>&1) || fail "the guest does not run: $(tail -n 3 <<<"$output")" "report this with the lines above"
  {
    echo "$wanted"
    (cd "$work/apt/cache/archives" && ls ./*.deb)
    (cd "$work/wheels" && ls ./*.whl)
  } >"$root/.edgepass-stamp"
  # Renamed into place: a set-up that is cut off leaves the earlier one whole.
  [ ! -e "$sysroot" ] || mv "$sysroot" "$work/old"
  mv "$root" "$sysroot"
  say "ready in $sysroot ($(du -sh "$sysroot" | cut -f1)): $output"
}

case ${1-} in
--check) check ;;
'') set_up ;;
*) fail "unknown argument $1" "scripts/setup_arm64.sh [--check]" ;;
esac
