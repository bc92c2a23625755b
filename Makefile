# Bulkhead from a clean clone, on Debian 12 as root. Everything else is `cargo xtask help`.

export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin
# What make builds it builds whole: the state for incremental builds would only double the disk it takes (5 GiB).
export CARGO_INCREMENTAL ?= 0
# What is built is for all users: virtual machines run as others than who builds.
xtask := umask 022; cargo run --quiet --package xtask --

.PHONY: build setup demo test test-long bench check

build: setup    ## programs, agent, guest kernel and guest image, into target/bulkhead
	$(xtask) build

setup:          ## the Debian packages that are missing
	@umask 022; xtask/setup

demo: setup     ## a container in its own virtual machine, on real input
	$(xtask) demo

test: setup     ## unit and doc tests here, system tests on KVM (here or in the lab)
	$(xtask) test

test-long: setup ## databases, git, apt, trees, kills at every step, hundreds of cycles: an hour or two in the lab
	$(xtask) test --long

bench: setup    ## figures, side by side with the peers: a table and target/bench/results.json
	$(xtask) bench

check: setup    ## formatting, lints, fuzz targets, licences
	$(xtask) check
