//! The sandbox: one pod, one virtual machine.
