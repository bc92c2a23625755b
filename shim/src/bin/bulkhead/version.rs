//! `bulkhead --version`, in the lines that engines read.

/// The newest version of the runtime specification that is known.
pub(crate) const SPECIFICATION: &str = "1.2.1";

/// The text.
pub(crate) fn text() -> String {
    format!(
        "bulkhead version {}\ncommit: {}\nspec: {SPECIFICATION}\n",
        env!("CARGO_PKG_VERSION"),
        option_env!("BULKHEAD_COMMIT").unwrap_or("unknown"),
    )
}
