//! containerd's CRI socket, used as a kubelet does.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use system_tests::client::{
    Runtime,
    containerd::{Containerd, Programs},
    cri::{Container, Cri, Executed, Message, State},
    images::{BUSYBOX, PAUSE},
    leftovers::Leftovers,
    podman::machines,
    until,
};

#[test]
fn a_pod_of_two_containers_is_run_entered_measured_and_removed() -> Result<()> {
    pods(Programs::Debian, &Runtime::all()?)
}

#[test]
fn containerd_2_has_the_same_pods() -> Result<()> {
    pods(Programs::Testing, &[Runtime::Bulkhead])
}

fn pods(programs: Programs, runtimes: &[Runtime]) -> Result<()> {
    let containerd = Containerd::start_from(programs)?;
    containerd.import("k8s.io", &[BUSYBOX, PAUSE])?;
    let cri = Cri::new(containerd.socket());
    // The first pod makes the bridge and the pods' cgroup, which stay.
    let first = cri.run_sandbox("first", "runc", "")?;
    cri.tell("StopPodSandbox", &first.id)?;
    cri.tell("RemovePodSandbox", &first.id)?;
    for runtime in runtimes {
        let before = Leftovers::now()?;
        pod(&cri, *runtime, containerd.path())
            .and_then(|()| before.are_all())
            .with_context(|| {
                format!("CRI with {}; logs:{}\n", runtime.name(), containerd.logs())
            })?;
    }
    Ok(())
}

fn pod(cri: &Cri, runtime: Runtime, directory: &Path) -> Result<()> {
    let logs = directory.join(format!("pod-{}", runtime.name()));
    let shared = directory.join(format!("shared-{}", runtime.name()));
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("file"), "from the host\n")?;
    let shared = shared.to_string_lossy();
    let sandbox = cri.run_sandbox("pod", runtime.name(), &logs.to_string_lossy())?;
    let status = cri.tell("PodSandboxStatus", &sandbox.id)?.message(1)?;
    ensure!(status.number(3)? == 0, "not ready: {status:?}");
    let address = status.message(5)?.text(1)?;
    ensure!(address.starts_with("10.231."), "address {address:?}");

    let server = "echo ready; echo trouble >&2; while :; do echo hello | nc -l -p 80; done";
    let web = Container {
        name: "web",
        command: &["sh", "-c", server],
        env: &[("A", "b")],
        mounts: &[(&shared, "/shared")],
        memory_bytes: 64 << 20,
    };
    let web = cri.create(&sandbox, &web)?;
    ensure!(cri.state(&web)? == State::Created);
    cri.tell("StartContainer", &web)?;
    let job = Container {
        name: "job",
        command: &["sh", "-c", "while ! [ -e /go ]; do sleep 0.1; done; exit 6"],
        ..Container::default()
    };
    let job = cri.create(&sandbox, &job)?;
    cri.tell("StartContainer", &job)?;
    ensure!(cri.state(&job)? == State::Running);
    let filter = Message::default().text(3, &sandbox.id);
    let listed = cri.call("ListContainers", &Message::default().message(1, &filter))?;
    ensure!(listed.count(1) == 2, "{listed:?}");
    let wanted = usize::from(runtime.is_ours());
    until("one machine for one pod", || Ok(machines()? == wanted))
        .with_context(|| format!("{:?} machines run", machines()))?;

    let script = "echo $A $(hostname) $(cat /sys/fs/cgroup/memory.max); cat /shared/file; \
                  echo err >&2; exit 9";
    let executed = cri.exec(&web, &["sh", "-c", script])?;
    let expected = Executed {
        stdout: "b pod 67108864\nfrom the host\n".to_owned(),
        stderr: "err\n".to_owned(),
        status: 9,
    };
    ensure!(executed == expected, "{executed:?}");
    // Loopback is the pod's, files are the container's.
    let mut last = None;
    until("an answer over the pod's loopback interface", || {
        let answer = cri.exec(&job, &["sh", "-c", "nc -w 20 127.0.0.1 80 </dev/null"])?;
        let served = answer.stdout == "hello\n";
        last = Some(answer);
        Ok(served)
    })
    .with_context(|| {
        let look = "ip addr; netstat -ltn; ps";
        let there = [&web, &job].map(|container| cri.exec(container, &["sh", "-c", look]));
        format!("the last answer: {last:?}; the containers: {there:#?}")
    })?;
    ensure!(cri.exec(&job, &["ls", "/shared"])?.status == 1);
    let unknown = cri.exec(&job, &["/missing"]);
    ensure!(unknown.is_err(), "{unknown:?}");

    until("figures of what is used", || {
        let stats = cri.tell("ContainerStats", &web)?.message(1)?;
        let cpu = stats.message(2)?.message(2)?.number(1)?;
        let memory = stats.message(3)?.message(2)?.number(1)?;
        Ok(cpu > 0 && memory > 0)
    })?;
    let resources = Message::default().number(4, 80 << 20);
    let update = Message::default().text(1, &web).message(2, &resources);
    cri.call("UpdateContainerResources", &update)?;
    let limit = cri.exec(&web, &["cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(limit.stdout == "83886080\n", "{limit:?}");

    // One ends by itself, the other is stopped; the sandbox stays until it is told to go.
    cri.exec(&job, &["touch", "/go"])?;
    until("the job's end", || Ok(cri.state(&job)? == State::Exited(6)))?;
    cri.tell("RemoveContainer", &job)?;
    cri.stop(&web)?;
    ensure!(
        cri.state(&web)? == State::Exited(137),
        "{:?}",
        cri.state(&web)?
    );
    let log = fs::read_to_string(logs.join("web.log"))?;
    ensure!(
        log.contains(" stdout F ready\n") && log.contains(" stderr F trouble\n"),
        "{log}"
    );
    cri.tell("RemoveContainer", &web)?;
    cri.tell("StopPodSandbox", &sandbox.id)?;
    let status = cri.tell("PodSandboxStatus", &sandbox.id)?.message(1)?;
    ensure!(status.number(3)? == 1, "still ready: {status:?}");
    cri.tell("RemovePodSandbox", &sandbox.id)?;
    until("the machine's end", || Ok(machines()? == 0))
}
