//! Generates containerd's messages and services from `proto/*.proto`.

use std::{env, fs, path::PathBuf};

/// The files, and what they become: messages, and for a service a module of its own.
const FILES: [(&str, bool); 4] = [
    ("task", true),
    ("events", true),
    ("bootstrap", false),
    ("metrics", false),
];

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(FILES.map(|(name, _)| format!("proto/{name}.proto")))
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("the files are valid");
    for (name, service) in FILES {
        includable(&out.join(format!("{name}.rs")));
        if service {
            includable(&out.join(format!("{name}_ttrpc.rs")));
        }
    }
}

/// `include!` inside a module refuses inner attributes and inner docs.
fn includable(file: &std::path::Path) {
    let text = fs::read_to_string(file).expect("generated above");
    let kept: String = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(file, kept).expect("OUT_DIR can be written");
}
