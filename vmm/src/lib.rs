//! One process, one microVM.
