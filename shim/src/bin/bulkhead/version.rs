//! `bulkhead --version`, in the lines that engines read.

use shim::features::SPECIFICATION;

/// The text.
pub(crate) fn text() -> String {
    format!(
        "bulkhead version {}\ncommit: {}\nspec: {SPECIFICATION}\n",
        env!("CARGO_PKG_VERSION"),
        option_env!("BULKHEAD_COMMIT").unwrap_or("unknown"),
    )
}
