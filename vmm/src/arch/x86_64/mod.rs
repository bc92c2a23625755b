//! x86_64: how a guest is laid out and how its processors start.

pub mod acpi;
pub mod boot;
pub mod cpu;
mod kernel_file;
pub mod layout;
