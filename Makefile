# Thin: the work is in deploy/ and cargo.
SHELL := /bin/bash
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
export STEAD_KERNEL_DIR ?= $(CURDIR)/target/stead-kernel

.PHONY: demo test test-kvm bench fuzz setup check

setup:
	deploy/setup "$(STEAD_KERNEL_DIR)"

demo: setup
	cargo build --locked --bin stead
	deploy/demo "$(TARGET)/debug/stead" "$(STEAD_KERNEL_DIR)"

# Cheapest first. Real VMs are few at a time: the tests take a lock of their own. They wait for about half of their time, so
# more of them than processors are run.
test: export RUST_TEST_THREADS ?= $(shell expr 2 \* $$(nproc))
test: setup
	cargo fmt --all --check
	cargo clippy --locked --all-targets -p stead -p stead-schemas -p stead-controllers -p stead-egress -p stead-guest -- -D warnings
	cargo clippy --locked --no-default-features -p stead-bench -- -D warnings
	cargo test --locked -p stead -p stead-schemas -p stead-controllers -p stead-egress -p stead-guest
	@echo "make test: everything passed"

# All tests with real VMs on KVM, in a host that QEMU emulates. `make test` runs a fixed part of them there.
test-kvm: setup
	STEAD_TEST_KVM=all cargo test --locked -p stead --test e2e kvmbox -- --nocapture

bench:
	deploy/setup "$(STEAD_KERNEL_DIR)" bench
	# Apart: in one call the bench's features would be built into what it measures.
	cargo build --locked --release --bin stead
	cargo run --locked --release -p stead-bench

# Seconds for each fuzzer; what one finds stays in FUZZ_DIR, beside what it learned.
SECONDS_EACH ?= 60
FUZZ_DIR := $(abspath $(TARGET))/fuzz

# Coverage needs a flag of the compiler that is not stable; no sanitizer, which needs another compiler.
fuzz:
	command -v cargo-fuzz > /dev/null || cargo install --locked cargo-fuzz
	STEAD_FUZZ_DIR="$(FUZZ_DIR)" SECONDS_EACH="$(SECONDS_EACH)" RUSTC_BOOTSTRAP=1 tests/fuzz/run
