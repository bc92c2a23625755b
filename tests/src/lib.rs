//! Helpers of the system tests, which drive Bulkhead from outside on real KVM.

pub mod container;
pub mod guest;
