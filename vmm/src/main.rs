//! `bulkhead-vmm`: one process, one microVM.

fn main() {}
