//! Generates the messages and the service from `proto/agent.proto`.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("proto/agent.proto is valid");
    // `include!` inside a module refuses inner attributes and inner docs.
    for file in ["agent.rs", "agent_ttrpc.rs"] {
        let text = fs::read_to_string(out.join(file)).expect("generated above");
        let kept: String = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .map(|line| format!("{line}\n"))
            .collect();
        fs::write(out.join(file), kept).expect("OUT_DIR can be written");
    }
}
