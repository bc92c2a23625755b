//! What the lists lack. That the kernel enforces them is tested from outside, in `tests/jail.rs`.

use super::*;

fn kinds() -> Vec<ThreadKind> {
    let devices = Kind::ALL.into_iter().map(ThreadKind::Device);
    [ThreadKind::Main, ThreadKind::Vcpu]
        .into_iter()
        .chain(devices)
        .collect()
}

/// Whether a thread of `kind` may make the call with some arguments.
fn may(kind: ThreadKind, call: libc::c_long) -> bool {
    let fails = kind == ThreadKind::Main && UNKNOWN.contains(&call);
    !fails && list(kind).calls().any(|listed| listed == call)
}

#[test]
fn every_list_makes_a_short_program() {
    for kind in kinds() {
        let program = compile(&list(kind));
        assert!(program.len() < 1024, "{kind:?}: {}", program.len());
    }
}

#[test]
fn no_thread_runs_programs_makes_sockets_or_looks_at_others() {
    let never = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_open,
        libc::SYS_creat,
        libc::SYS_open_by_handle_at,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_setuid,
        libc::SYS_setresuid,
        libc::SYS_setgroups,
        libc::SYS_prlimit64,
        libc::SYS_pkey_mprotect,
    ];
    for kind in kinds() {
        for call in never {
            assert!(!may(kind, call), "{kind:?} may make call {call}");
        }
    }
}

#[test]
fn only_the_thread_of_a_shared_directory_takes_paths() {
    let by_path = [
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_truncate,
        libc::SYS_readlinkat,
        libc::SYS_newfstatat,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_getxattr,
        libc::SYS_lgetxattr,
        libc::SYS_setxattr,
        libc::SYS_unshare,
        libc::SYS_fchdir,
    ];
    let shared = ThreadKind::Device(Kind::Fs);
    for call in by_path {
        assert!(may(shared, call));
        for kind in kinds().into_iter().filter(|kind| *kind != shared) {
            assert!(!may(kind, call), "{kind:?} may make call {call}");
        }
    }
}

#[test]
fn only_the_main_thread_makes_threads_and_filters() {
    for call in [libc::SYS_clone, libc::SYS_seccomp, libc::SYS_prctl] {
        for kind in kinds() {
            assert_eq!(
                may(kind, call),
                kind == ThreadKind::Main,
                "{kind:?}, call {call}"
            );
        }
    }
}

#[test]
fn the_main_thread_can_start_the_thread_of_any_device_that_is_added() {
    let added = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Fs);
    for kind in added {
        assert!(
            list(ThreadKind::Device(kind))
                .calls()
                .all(|call| may(ThreadKind::Main, call))
        );
    }
}
