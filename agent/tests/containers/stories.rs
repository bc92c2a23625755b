//! What containers do, one sentence each.
#![expect(clippy::unwrap_used, reason = "a failure is what a test tells")]

use std::{future::Future, pin::Pin};

use protocol::agent as message;
use ttrpc::Code;

use crate::guest::{Guest, failure, spec};

/// One of them.
type Story = for<'a> fn(&'a Guest) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

macro_rules! stories {
    ($($name:ident,)*) => {
        /// All of them by name.
        pub(crate) const ALL: &[(&str, Story)] = &[$((stringify!($name), |guest| Box::pin($name(guest)))),*];
    };
}

stories! {
    a_program_runs_and_its_output_and_status_come_back,
    a_signal_that_ends_it_is_128_and_its_number,
    standard_input_reaches_it_byte_by_byte,
    a_missing_program_is_not_found,
    a_file_that_is_no_program_is_refused,
    what_fails_on_the_way_is_told_with_its_cause,
}

async fn a_program_runs_and_its_output_and_status_come_back(guest: &Guest) {
    let output = guest
        .sh("echo out; echo err >&2; hostname; echo $$; exit 7")
        .await;
    assert_eq!(output.stdout, "out\nweb-0\n1\n");
    assert_eq!(output.stderr, "err\n");
    assert_eq!(output.status, 7);
}

async fn a_signal_that_ends_it_is_128_and_its_number(guest: &Guest) {
    guest
        .create_with("c", &spec(&["sleep", "100"]), message::Streams::new())
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    guest.signal("c", 9, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 137);
    assert_eq!(
        failure(guest.signal("c", 9, false).await).0,
        Code::FAILED_PRECONDITION
    );
}

async fn standard_input_reaches_it_byte_by_byte(guest: &Guest) {
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let output = guest
        .run_with(&spec(&["sh", "-c", "wc -c; md5sum /dev/null"]), &input)
        .await
        .unwrap();
    assert_eq!(output.stdout.lines().next(), Some("3000000"));
}

async fn a_missing_program_is_not_found(guest: &Guest) {
    let (code, text) = failure(guest.run_with(&spec(&["nope"]), b"").await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(
        text.contains("exec: \"nope\": executable file not found in $PATH"),
        "{text}"
    );
}

async fn a_file_that_is_no_program_is_refused(guest: &Guest) {
    let (code, text) = failure(guest.run_with(&spec(&["/bin/script"]), b"").await);
    assert_eq!(code, Code::PERMISSION_DENIED);
    assert!(text.contains("permission denied"), "{text}");
}

async fn what_fails_on_the_way_is_told_with_its_cause(guest: &Guest) {
    let mut spec = spec(&["sh"]);
    spec["process"]["cwd"] = "/etc/passwd/x".into();
    let (code, text) = failure(guest.run_with(&spec, b"").await);
    assert_eq!(code, Code::INTERNAL);
    assert_eq!(
        text,
        "cannot make the working directory /etc/passwd/x: Not a directory (os error 20)"
    );
}
