//! The guest's boot, from the VMM's start to the agent's first words.

use std::{
    io,
    os::unix::net::UnixStream as StdUnixStream,
    time::{Duration, Instant},
};

use protocol::Hello;
use tokio::{io::AsyncReadExt, net::UnixStream, time::timeout};

use super::{
    Console, ConsoleTail, Error, Trace,
    calls::{CONSOLE_LINES, DEATH},
    make,
    vmm::Vmm,
};

/// Waits for the agent's first words, the VMM's death or the deadline, whatever comes first.
pub(super) async fn hello(
    ready: StdUnixStream,
    vmm: &Vmm,
    console: &Console,
    deadline: Duration,
) -> Result<Hello, Error> {
    ready.set_nonblocking(true).map_err(make("a socket pair"))?;
    let mut ready = UnixStream::from_std(ready).map_err(make("a socket pair"))?;
    let begin = Instant::now();
    let mut bytes = [0; Hello::LEN];
    let heard = tokio::select! {
        biased;
        heard = timeout(deadline, ready.read_exact(&mut bytes)) => heard,
        () = vmm.ended() => Ok(Err(io::ErrorKind::UnexpectedEof.into())),
    };
    let tail = || ConsoleTail(Some(console.last_lines(CONSOLE_LINES)));
    match heard {
        Ok(Ok(_)) => return Ok(Hello::from_bytes(&bytes)?),
        Ok(Err(error)) => tracing::debug!(%error, "the guest says nothing any more"),
        Err(_) => {
            return Err(Error::BootDeadline {
                seconds: deadline.as_secs(),
                console: tail(),
            });
        }
    }
    // A process closes what it has open before it has ended, and a machine takes its time for what
    // is between: as long as a boot may take, its death is waited for, which is the reason.
    let patience = deadline.saturating_sub(begin.elapsed()).max(DEATH);
    match timeout(patience, vmm.ended()).await {
        Ok(()) => Err(Error::BootDeath {
            death: vmm.death(),
            console: tail(),
        }),
        Err(_) => Err(Error::BootHangUp {
            seconds: begin.elapsed().as_secs(),
            console: tail(),
        }),
    }
}

/// Adds the guest's own times to the trace and returns where its clock begins there. What the
/// guest says is taken for no more than lies between the VMM's start and now.
pub(super) fn draw_boot(trace: &Trace, spawned_ns: u64, hello: Hello) -> u64 {
    let now_ns = trace.now_ns();
    let lasted_ns = now_ns - spawned_ns;
    let ready_ns = hello.ready_ns.min(lasted_ns);
    let main_ns = hello.main_ns.min(ready_ns);
    let epoch_ns = now_ns - ready_ns;
    trace.add("vm made, kernel entered", spawned_ns, epoch_ns);
    trace.add("kernel booted", epoch_ns, epoch_ns + main_ns);
    trace.add("agent ready", epoch_ns + main_ns, now_ns);
    epoch_ns
}
