//! Process 1 of the guest: `/init`.
//!
//! Without std's own `main`, which opens /dev/null for missing standard streams
//! and aborts where there is none, as in a guest without a console.
#![no_main]

mod sys {
    #![expect(unsafe_code, reason = "the C library looks the entry up by its name")]

    /// What the C library calls.
    #[unsafe(no_mangle)]
    extern "C" fn main() -> i32 {
        super::start()
    }
}

fn start() -> i32 {
    eprintln!("bulkhead-agent: {}", agent::boot::run());
    2
}
