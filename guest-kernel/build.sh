#!/bin/sh
# build.sh - the guest kernel, in two steps, from Debian's kernel source package.
#
#   build.sh configure WORK FRAGMENT...   unpack the source into WORK, apply patches/*.patch,
#                                         write WORK/out/.config
#   build.sh compile WORK JOBS            WORK/out/vmlinux, stripped to WORK/vmlinux; the same kernel
#                                         compressed in WORK/bzImage, as distributions have theirs
#
# Between the two, `cargo xtask kernel` checks that every requested option survived.
# The result depends on this script, the patches, the fragments, the source package and the
# compiler, and on nothing else: not on the time, the machine, the user or the place of WORK.
set -eu
export LC_ALL=C

tarball=/usr/src/linux-source-6.12.tar.xz
patches=$(dirname "$0")/patches
export KBUILD_BUILD_TIMESTAMP='2024-01-01 00:00:00 UTC'
export KBUILD_BUILD_USER=bulkhead KBUILD_BUILD_HOST=bulkhead KBUILD_BUILD_VERSION=1

# What an x86 guest never compiles. Kconfig files stay: some are read from other architectures, and
# so does arch/um, whose rules fs/hostfs reads though it is off.
prune() {
    echo 'linux-source-6.12/Documentation/?*/*'
    for arch in alpha arc arm arm64 csky hexagon loongarch m68k microblaze mips nios2 openrisc \
        parisc powerpc riscv s390 sh sparc xtensa; do
        echo "linux-source-6.12/arch/$arch/*.*"
    done
    for tree in drivers/accel drivers/comedi drivers/gpu drivers/iio drivers/infiniband \
        drivers/media drivers/net/ethernet drivers/net/wireless drivers/scsi drivers/staging \
        drivers/usb drivers/clk drivers/pinctrl sound samples; do
        echo "linux-source-6.12/$tree/*.[chS]"
    done
    echo 'linux-source-6.12/tools/perf/*'
    echo 'linux-source-6.12/tools/testing/*'
}

case $1 in
configure)
    work=$2
    shift 2
    mkdir -p "$work/out"
    prune >"$work/prune"
    xz -T0 -dc "$tarball" | tar -x -C "$work" --wildcards --wildcards-match-slash -X "$work/prune"
    for patch in "$patches"/*.patch; do
        patch -s -p1 --fuzz=0 --no-backup-if-mismatch -d "$work/linux-source-6.12" <"$patch" || {
            echo "build.sh: ${patch##*/} does not apply to $tarball" >&2
            exit 1
        }
    done
    cat "$@" >"$work/fragments.config"
    make -s -C "$work/linux-source-6.12" O="$work/out" \
        KCONFIG_ALLCONFIG="$work/fragments.config" allnoconfig
    ;;
compile)
    work=$2
    make -s -C "$work/linux-source-6.12" O="$work/out" -j"$3" vmlinux bzImage
    objcopy --strip-all "$work/out/vmlinux" "$work/vmlinux"
    cp "$work/out/arch/x86/boot/bzImage" "$work/bzImage"
    ;;
*)
    echo "build.sh: unknown step $1" >&2
    exit 2
    ;;
esac
