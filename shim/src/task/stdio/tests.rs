use std::{
    fs::File,
    io::{Read, Write},
};

use nix::{sys::stat::Mode, unistd::mkfifo};

use super::*;
use crate::testing::{executable, soon};

fn owner() -> Namespace {
    Namespace::parse("default").expect("a name")
}

async fn open(names: &Names) -> Result<Streams, Error> {
    Streams::open(names, (&owner(), "web")).await
}

fn fifo(directory: &tempfile::TempDir, name: &str) -> String {
    let path = directory.path().join(name);
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a pipe");
    path.display().to_string()
}

fn outputs(stdout: &str, stderr: &str) -> Names {
    Names {
        stdout: stdout.to_owned(),
        stderr: stderr.to_owned(),
        ..Names::default()
    }
}

fn written(fd: Option<OwnedFd>, text: &str) {
    let mut file = File::from(fd.expect("a stream"));
    file.write_all(text.as_bytes()).expect("written");
}

#[tokio::test]
async fn a_pipe_is_opened_without_its_reader_and_keeps_what_is_written_before_it_comes() {
    let directory = tempfile::tempdir().expect("a directory");
    let name = fifo(&directory, "stdout");
    let streams = open(&outputs(&name, "")).await.expect("opened");
    let mut file = File::from(streams.stdout.expect("stdout"));
    file.write_all(b"early").expect("written");
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&name)
        .expect("opened");
    drop(file);
    let mut bytes = Vec::new();
    soon(|| reader.read_to_end(&mut bytes).ok());
    assert_eq!(bytes, b"early");
}

#[tokio::test]
async fn input_ends_when_the_client_and_the_shim_have_closed_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = Names {
        stdin: fifo(&directory, "stdin"),
        ..Names::default()
    };
    let mut streams = open(&names).await.expect("opened");
    let stdin = &mut streams.kept.stdin;
    let mut reader = File::from(stdin.open().expect("opened").expect("stdin"));
    assert!(stdin.open().expect("open already").is_none());
    let mut client = OpenOptions::new()
        .write(true)
        .open(&names.stdin)
        .expect("opened");
    client.write_all(b"typed").expect("written");
    drop(client);
    let mut buffer = [0; 16];
    assert_eq!(reader.read(&mut buffer).expect("read"), 5);
    let waits = reader.read(&mut buffer).expect_err("no end yet").kind();
    assert_eq!(waits, io::ErrorKind::WouldBlock);
    streams.kept.stdin.close();
    assert_eq!(soon(|| reader.read(&mut buffer).ok()), 0);
}

#[tokio::test]
async fn a_client_finds_no_reader_of_its_input_before_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = Names {
        stdin: fifo(&directory, "stdin"),
        ..Names::default()
    };
    let mut streams = open(&names).await.expect("opened");
    let client = || {
        let mut options = OpenOptions::new();
        let options = options.write(true).custom_flags(libc::O_NONBLOCK);
        options.open(&names.stdin)
    };
    let nobody = client().expect_err("no reader").raw_os_error();
    assert_eq!(nobody, Some(libc::ENXIO));
    let reader = streams.kept.stdin.open().expect("opened");
    client().expect("a reader");
    drop(reader);
}

#[tokio::test]
async fn an_input_that_is_closed_before_the_start_is_empty() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = Names {
        stdin: fifo(&directory, "stdin"),
        ..Names::default()
    };
    let mut streams = open(&names).await.expect("opened");
    streams.kept.stdin.close();
    assert!(
        streams
            .kept
            .stdin
            .open()
            .expect("nothing to open")
            .is_none()
    );
}

#[tokio::test]
async fn an_input_that_is_no_pipe_is_refused_with_its_name() {
    let names = Names {
        stdin: "/dev/null".to_owned(),
        ..Names::default()
    };
    let error = open(&names).await.expect_err("refused");
    assert!(error.to_string().contains("/dev/null"), "{error}");
}

#[tokio::test]
async fn a_file_is_made_and_appended_to_by_both_streams() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("logs/web.log");
    let uri = format!("file://{}", path.display());
    for _ in 0..2 {
        let streams = open(&outputs(&uri, &uri)).await.expect("opened");
        written(streams.stdout, "out\n");
        written(streams.stderr, "err\n");
    }
    let text = fs::read_to_string(path).expect("read");
    assert_eq!(text, "out\nerr\nout\nerr\n");
}

/// A logger that copies its streams to a file.
fn logger(directory: &tempfile::TempDir) -> (String, PathBuf) {
    let program = directory.path().join("logger");
    let log = directory.path().join("log");
    let script = format!(
        "#!/bin/sh\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $1 $2\" > {log}\nexec 5>&-\ncat <&3 >> {log}\ncat <&4 >> {log}\n",
        log = log.display()
    );
    executable(&program, &script);
    (format!("binary://{}?key=value", program.display()), log)
}

#[tokio::test]
async fn a_logger_gets_both_streams_and_its_arguments() {
    let directory = tempfile::tempdir().expect("a directory");
    let (uri, log) = logger(&directory);
    let streams = open(&outputs(&uri, &uri)).await.expect("opened");
    written(streams.stdout, "out\n");
    written(streams.stderr, "err\n");
    streams.kept.logger.expect("a logger").finish().await;
    let text = fs::read_to_string(log).expect("read");
    assert_eq!(text, "default web key value\nout\nerr\n");
}

#[tokio::test]
async fn a_logger_that_is_not_there_is_named() {
    let uri = "binary:///nowhere/logger";
    let error = open(&outputs(uri, uri))
        .await
        .expect_err("refused")
        .to_string();
    assert!(error.contains("/nowhere/logger"), "{error}");
}

#[tokio::test]
async fn two_loggers_are_refused() {
    let error = open(&outputs("", "binary:///bin/true")).await;
    assert!(matches!(error, Err(Error::TwoLoggers)), "{error:?}");
}
