//! The verbs a developer needs: build, test, bench and demo, as `cargo xtask VERB`.

fn main() {
    println!("cargo xtask: no verbs yet");
}
