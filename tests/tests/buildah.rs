//! buildah, from Debian's package, and podman's builds.

use std::fs;

use anyhow::Result;
use system_tests::client::{images::BUSYBOX, podman::Podman};

/// Steps that run, as different users, on what those before them have left.
const CONTAINERFILE: &str = "
FROM localhost/busybox:1
ENV WHO=builder
COPY file /file
RUN echo $WHO $(cat /file) >/made && ls / && chown 1000 /made
USER user
RUN id -u >>/made
CMD [\"cat\", \"/made\"]
";

#[test]
fn buildah_runs_in_working_containers_and_images_are_built_and_run() -> Result<()> {
    Podman::tell(|podman| {
        let program = podman.runtime.program()?;
        let program = program.to_string_lossy();
        let isolation = [
            "--isolation",
            "oci",
            "--network",
            "none",
            "--runtime",
            &program,
        ];

        podman
            .buildah(&["from", "--name", "work", BUSYBOX])?
            .prints("work")?;
        let run = |command: &[&str]| {
            podman.buildah(&[&["run"], &isolation[..], &["work", "--"], command].concat())
        };
        let done = run(&[
            "sh",
            "-c",
            "echo out; echo err >&2; echo kept >/kept; exit 5",
        ])?;
        done.ends_with(5)?.tells("out")?.tells("err")?;
        run(&["cat", "/kept"])?.prints("kept")?;
        podman.buildah(&["rm", "work"])?.text()?;

        let files = podman.files()?;
        fs::write(files.join("file"), "copied\n")?;
        fs::write(files.join("Containerfile"), CONTAINERFILE)?;
        let files = files.to_string_lossy();
        let build = [
            &["build"],
            &isolation[..],
            &["--tag", "localhost/built:1", &files],
        ]
        .concat();
        podman.buildah(&build)?.text()?;
        podman
            .run(&["run", "--rm", "localhost/built:1"])?
            .prints("builder copied\n1000")?;

        let failing = format!("FROM {BUSYBOX}\nRUN exit 4\n");
        fs::write(podman.files()?.join("Containerfile"), failing)?;
        let build = ["build", "--isolation", "oci", "--network", "none", &files];
        podman.run(&build)?.ends_with(4)?;
        podman.buildah(&["rm", "--all"])?.text()?;
        Ok(())
    })?;
    Ok(())
}
