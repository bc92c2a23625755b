//! The launcher's side opens as the device needs it; the VMM's side trusts no number.

use std::os::fd::AsRawFd;

use super::*;
use crate::config::BootConfig;

fn config(kernel: &Path) -> VmConfig {
    VmConfig {
        boot: BootConfig {
            kernel: Resource::Path(kernel.into()),
            initrd: None,
            image: None,
            cmdline: String::new(),
        },
        cpus: 1,
        memory_mib: 64,
        // Anything that opens will do.
        kvm: Some(Resource::Path("/dev/null".into())),
        console_log: None,
        control: None,
        serial: None,
        devices: Vec::new(),
    }
}

fn open_all(config: &mut VmConfig) -> Result<Vec<OwnedFd>, Error> {
    let mut opened = Vec::new();
    open(config, |fd| {
        opened.push(fd);
        Resource::Fd(2 + opened.len() as RawFd)
    })?;
    Ok(opened)
}

fn access_mode(fd: &OwnedFd) -> i32 {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).unwrap() & libc::O_ACCMODE
}

#[test]
fn a_path_becomes_the_descriptor_that_was_passed_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, "kernel").unwrap();
    let mut config = config(&kernel);

    let opened = open_all(&mut config).unwrap();

    assert_eq!(config.boot.kernel, Resource::Fd(3));
    assert_eq!(config.kvm, Some(Resource::Fd(4)));
    assert_eq!(access_mode(&opened[0]), libc::O_RDONLY);
    assert_eq!(access_mode(&opened[1]), libc::O_RDWR);
}

#[test]
fn a_read_only_disk_is_opened_for_reading_only() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    fs::write(&file, "disk").unwrap();
    let mut config = config(&file);
    config.devices = [true, false]
        .map(|read_only| DeviceConfig::Blk {
            disk: Resource::Path(file.clone()),
            read_only,
            serial: String::new(),
        })
        .into();

    let opened = open_all(&mut config).unwrap();

    assert_eq!(access_mode(&opened[2]), libc::O_RDONLY);
    assert_eq!(access_mode(&opened[3]), libc::O_RDWR);
}

#[test]
fn sockets_listen_and_the_log_has_a_size() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, "kernel").unwrap();
    let socket = directory.path().join("control.sock");
    let log = directory.path().join("log");
    let mut config = config(&kernel);
    config.control = Some(Resource::Path(socket.clone()));
    config.console_log = Some(Resource::Path(log.clone()));

    let _opened = open_all(&mut config).unwrap();

    UnixStream::connect(&socket).unwrap();
    assert_eq!(fs::metadata(&log).unwrap().len(), CONSOLE_LOG_BYTES);
}

#[test]
fn an_error_names_field_path_and_way_out() {
    let mut config = config(Path::new("/nonexistent/vmlinux"));
    let error = open_all(&mut config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot open boot.kernel /nonexistent/vmlinux: check that it exists"
    );
}

#[test]
fn a_socket_that_exists_is_not_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let _other = UnixListener::bind(&socket).unwrap();
    let mut config = config(Path::new("/dev/null"));
    config.control = Some(Resource::Path(socket));
    let error = open_all(&mut config).unwrap_err().to_string();
    assert!(
        error.ends_with("control.sock: remove it if no other VM uses it"),
        "{error}"
    );
}

#[test]
fn an_inherited_descriptor_is_taken_once() {
    // What came through execve has no close-on-exec flag.
    let (inherited, _other) = nix::unistd::pipe().unwrap();
    let resource = Resource::Fd(std::os::fd::IntoRawFd::into_raw_fd(inherited));
    let mut descriptors = Descriptors::default();

    let taken = descriptors.take("kernel", &resource).unwrap();
    let again = descriptors.take("initrd", &resource).unwrap_err();
    let by_another = Descriptors::default()
        .take("initrd", &resource)
        .unwrap_err();

    assert_eq!(resource, Resource::Fd(taken.as_raw_fd()));
    assert!(again.to_string().contains("named twice"), "{again}");
    assert!(
        by_another.to_string().contains("not started with it"),
        "{by_another}"
    );
}

#[test]
fn what_the_process_opened_itself_is_not_for_taking() {
    let own = fs::File::open("/dev/null").unwrap();
    let error = Descriptors::default()
        .take("kernel", &Resource::Fd(own.as_raw_fd()))
        .unwrap_err();
    assert!(error.to_string().contains("not started with it"), "{error}");
}

#[test]
fn numbers_that_are_not_open_or_standard_streams_are_refused() {
    for (number, what) in [(-1, "0, 1 and 2"), (2, "0, 1 and 2"), (99_999, "not open")] {
        let error = Descriptors::default()
            .take("kernel", &Resource::Fd(number))
            .unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn a_path_is_not_opened_by_the_vmm() {
    let error = Descriptors::default()
        .take("boot.kernel", &Resource::Path("/boot/vmlinux".into()))
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("boot.kernel is the path /boot/vmlinux"),
        "{error}"
    );
}

#[test]
fn what_came_with_a_request_is_numbered_from_0_and_taken_once() {
    let null = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let mut descriptors = Descriptors::received(vec![null(), null()]);
    descriptors.take("disk", &Resource::Fd(1)).unwrap();
    descriptors.take("disk", &Resource::Fd(0)).unwrap();
    for (number, what) in [(1, "named twice"), (2, "not so many"), (-1, "not so many")] {
        let error = descriptors.take("disk", &Resource::Fd(number)).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}
