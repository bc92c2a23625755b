//! The thread of a running device: waits for kicks and for the device's own
//! descriptors, and calls the device. Dropping or stopping the [`Worker`]
//! ends the thread.
//!
//! A kick takes this way: the guest's write to the notify page matches an
//! ioeventfd, KVM signals the eventfd without leaving the kernel for long,
//! [`Loop::serve`] wakes, [`serve_queue`] calls [`VirtioDevice::handle_queue`].

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    Active, ActiveQueue, ConfigChange, Error, Link, Memory, Sources, VirtioDevice,
    mailbox::{Mailbox, Message, OnReset},
    sources::FIRST_WORKER_TOKEN,
};
use crate::{
    counters::DeviceCounters,
    jail::{self, ThreadKind},
};

const QUEUE_TOKEN: u64 = FIRST_WORKER_TOKEN;
const CONTROL_TOKEN: u64 = u64::MAX;

/// A device's thread, from its start to the device's removal. The thread
/// sleeps until the driver is ready, so that nothing needs a new thread once
/// the jail is shut.
pub struct Worker {
    control: EventFd,
    kicks: Vec<Arc<EventFd>>,
    mailbox: Arc<Mailbox>,
    /// Until the thread is started.
    idle: Option<Box<dyn VirtioDevice>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What a driver that is ready gives the device to work with.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// The queues as the driver set them up.
    pub queues: Vec<ActiveQueue>,
    /// The features agreed on.
    pub features: u64,
    /// The device's counters.
    pub counters: Arc<DeviceCounters>,
    /// How to tell the driver of a changed configuration space.
    pub config: ConfigChange,
    /// Told once when the device broke down, from the worker's thread.
    pub on_failure: Box<dyn FnOnce(&Error) + Send>,
}

impl Worker {
    /// A worker without a thread yet; `kicks` are the queues' eventfds in their order.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(device: Box<dyn VirtioDevice>, kicks: Vec<Arc<EventFd>>) -> io::Result<Self> {
        Ok(Self {
            control: EventFd::new(EFD_NONBLOCK)?,
            kicks,
            mailbox: Arc::default(),
            idle: Some(device),
            thread: None,
        })
    }

    /// Starts the thread, named after the device and confined as `kind`.
    ///
    /// # Errors
    /// When the kernel refuses a descriptor or a thread.
    pub fn start(&mut self, kind: ThreadKind) -> io::Result<()> {
        let Some(device) = self.idle.take() else {
            return Ok(());
        };
        let control = self.control.try_clone()?;
        let kicks = self.kicks.clone();
        let mailbox = Arc::clone(&self.mailbox);
        let thread = thread::Builder::new()
            .name(format!("virtio-{}", device.kind().name()))
            .stack_size(256 * 1024)
            .spawn(move || {
                let at_end = TellEnd(Arc::clone(&mailbox));
                let confined = jail::confine(kind);
                Loop {
                    device,
                    mailbox,
                    kicks,
                    control,
                }
                .run(confined);
                drop(at_end);
            })?;
        self.thread = Some(thread);
        Ok(())
    }

    /// Lets the device work. Does not wait for it.
    pub fn activate(&self, activation: Activation) {
        self.send(Message::Activate(Box::new(activation)));
    }

    /// Passes on what the driver wrote to its fields of the configuration space.
    pub fn write_config(&self, fields: Vec<u8>) {
        self.send(Message::WriteConfig(fields));
    }

    /// Gives a network card its cable or takes it away.
    pub fn set_link(&self, link: Link) {
        self.send(Message::SetLink(link));
    }

    /// Stops and resets the device. Does not wait for it: `done` is called from the thread once the
    /// device touches the guest's memory no more.
    pub fn reset(&self, done: OnReset) {
        self.send(Message::Reset(done));
    }

    /// Tells the thread to end. Does not wait for it.
    pub fn stop(&self) {
        self.send(Message::Stop);
    }

    /// Waits for the end of a thread that was told to, but not beyond `deadline`; whether it came.
    pub fn ended_by(&self, deadline: Instant) -> bool {
        self.thread.is_none() || self.mailbox.ended_by(deadline)
    }

    /// The queues' eventfds.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    fn send(&self, message: Message) {
        self.mailbox.put(message);
        // An eventfd refuses only when it is at its maximum: then it is signalled already.
        let _ = self.control.write(1);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop();
            let _ = thread.join();
        }
    }
}

/// Tells that the thread ends, by whatever way.
struct TellEnd(Arc<Mailbox>);

impl Drop for TellEnd {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn watch(epoll: &Epoll, fd: &EventFd, events: EventSet, token: u64) -> io::Result<()> {
    let event = EpollEvent::new(events, token);
    epoll.ctl(
        ControlOperation::Add,
        std::os::fd::AsRawFd::as_raw_fd(fd),
        event,
    )
}

/// The thread's state.
struct Loop {
    device: Box<dyn VirtioDevice>,
    mailbox: Arc<Mailbox>,
    kicks: Vec<Arc<EventFd>>,
    control: EventFd,
}

/// Why a device that worked does so no more.
enum Ended {
    Reset(OnReset),
    Stop,
}

impl Loop {
    fn run(mut self, confined: io::Result<()>) {
        let mut confined = confined;
        loop {
            match self.mailbox.wait() {
                Message::Activate(activation) => {
                    let confined = std::mem::replace(&mut confined, Ok(()));
                    match self.work(*activation, confined) {
                        Ended::Reset(done) => self.reset(done),
                        Ended::Stop => return,
                    }
                }
                Message::Reset(done) => self.reset(done),
                Message::Stop => return,
                Message::SetLink(link) => self.set_link_at_rest(link),
                Message::WriteConfig(_) => {}
            }
        }
    }

    /// Nothing of the host's is touched for a device that is not in use.
    fn set_link_at_rest(&mut self, link: Link) {
        let _ = self.device.set_link(link, None);
    }

    fn reset(&mut self, done: OnReset) {
        self.device.reset();
        done();
    }

    /// Works until the driver or the VM ends it; a device that broke down sleeps till then.
    fn work(&mut self, activation: Activation, confined: io::Result<()>) -> Ended {
        let Activation {
            memory,
            queues,
            features,
            counters,
            config,
            on_failure,
        } = activation;
        let host = |what| move |source| Error::Host { what, source };
        let worked = confined
            .map_err(host("confine the device's thread"))
            .and_then(|()| self.epoll().map_err(host("listen to the queues")))
            .and_then(|epoll| {
                let sources = Sources::new(Arc::clone(&epoll));
                let mut active = Active {
                    memory,
                    queues,
                    kicks: self.kicks.clone(),
                    features,
                    sources,
                    counters,
                    config,
                };
                self.device.activate(&mut active)?;
                self.serve(&mut active, &epoll)
            });
        match worked {
            Ok(ended) => ended,
            Err(error) => {
                on_failure(&error);
                self.sleep()
            }
        }
    }

    /// A fresh set of descriptors for each activation: what an earlier one left is gone.
    fn epoll(&self) -> io::Result<Arc<Epoll>> {
        let epoll = Epoll::new()?;
        watch(&epoll, &self.control, EventSet::IN, CONTROL_TOKEN)?;
        // Each signal is an edge, so that a kick need not be read: one system call less.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (index, kick) in self.kicks.iter().enumerate() {
            watch(&epoll, kick, edge, QUEUE_TOKEN + index as u64)?;
        }
        Ok(Arc::new(epoll))
    }

    fn sleep(&mut self) -> Ended {
        loop {
            match self.mailbox.wait() {
                Message::Reset(done) => return Ended::Reset(done),
                Message::Stop => return Ended::Stop,
                Message::SetLink(link) => self.set_link_at_rest(link),
                Message::Activate(_) | Message::WriteConfig(_) => {}
            }
        }
    }

    fn serve(&mut self, active: &mut Active, epoll: &Epoll) -> Result<Ended, Error> {
        // What the driver put into its queues before the thread ran.
        for index in 0..self.kicks.len() {
            serve_queue(self.device.as_mut(), active, index)?;
        }
        self.end_turns(active);
        let mut events = [EpollEvent::default(); 32];
        loop {
            let ready = match epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(Error::Host {
                        what: "wait for events",
                        source,
                    });
                }
            };
            for event in &events[..ready] {
                match event.data() {
                    CONTROL_TOKEN => {
                        if let Some(ended) = self.read_messages(active)? {
                            return Ok(ended);
                        }
                    }
                    token if token >= QUEUE_TOKEN => {
                        let index = (token - QUEUE_TOKEN) as usize;
                        active.counters.kicks.add(1);
                        serve_queue(self.device.as_mut(), active, index)?;
                    }
                    token => {
                        self.device
                            .handle_source(token, event.event_set(), active)?;
                        if let Some(index) = self.device.answered_on(token) {
                            serve_answer(self.device.as_mut(), active, index)?;
                        }
                    }
                }
                self.end_turns(active);
            }
        }
    }

    /// Queues that had more than one turn's worth have another one after the other events.
    fn end_turns(&self, active: &mut Active) {
        for (queue, kick) in active.queues.iter_mut().zip(&self.kicks) {
            if queue.is_cut_short() {
                // An eventfd refuses only when it is at its maximum: then it is signalled already.
                let _ = kick.write(1);
            }
            queue.begin_turn();
        }
    }

    fn read_messages(&mut self, active: &mut Active) -> Result<Option<Ended>, Error> {
        let _ = self.control.read();
        while let Some(message) = self.mailbox.take() {
            match message {
                Message::Stop => return Ok(Some(Ended::Stop)),
                Message::Reset(done) => return Ok(Some(Ended::Reset(done))),
                Message::SetLink(link) => self.device.set_link(link, Some(&mut *active))?,
                Message::WriteConfig(fields) => self.device.write_config(&fields, active),
                Message::Activate(_) => {}
            }
        }
        Ok(None)
    }
}

/// Lets the device empty a queue, until the driver has nothing new, the device
/// takes no more, or the queue's turn is over.
pub(crate) fn serve_queue(
    device: &mut dyn VirtioDevice,
    active: &mut Active,
    index: usize,
) -> Result<(), Error> {
    serve(device, active, index, Expected::IfServed)
}

/// As [`serve_queue`], for a queue that the driver is likely to use in a moment.
fn serve_answer(
    device: &mut dyn VirtioDevice,
    active: &mut Active,
    index: usize,
) -> Result<(), Error> {
    serve(device, active, index, Expected::Anyway)
}

/// Whether there is reason to wait a little for the driver.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// When it had something before.
    IfServed,
    /// It was given something to answer.
    Anyway,
}

fn serve(
    device: &mut dyn VirtioDevice,
    active: &mut Active,
    index: usize,
    expected: Expected,
) -> Result<(), Error> {
    if !active.queues[index].ready() {
        return Ok(());
    }
    let mut in_vain = false;
    let mut hopeful = expected == Expected::Anyway;
    loop {
        let before = active.queues[index].position();
        active.queues[index].pause_kicks(&active.memory)?;
        let offered = active.queues[index].offered(&active.memory)?;
        device.handle_queue(index, active)?;
        let together = active.queues[index].position().wrapping_sub(before);
        if (hopeful || together > 0) && device.awaits_more(index, together) {
            await_more(device, active, index)?;
        }
        hopeful = false;
        let served = active.queues[index].position() != before;
        let more = active.queues[index].resume_kicks(&active.memory)?;
        if !more || active.queues[index].is_cut_short() {
            return Ok(());
        }
        // Nothing taken, and yet there is more: the device has no room; or it came since, and
        // without a kick if the driver was last told of an earlier place. Once is enough, or a
        // driver that goes on for ever would have all of the thread's time.
        if !served && (in_vain || active.queues[index].offered(&active.memory)? == offered) {
            return Ok(());
        }
        in_vain = !served;
    }
}

/// How long a driver that was just answered may take to ask again without a kick.
const PATIENCE: Duration = Duration::from_micros(20);

/// So often may something come before the other events have their turn.
const ROUNDS: usize = 64;

/// Waits a little for more in a queue whose driver need not kick, and for what the device's own
/// descriptors have. Whoever asks for one thing after the other asks again as soon as it is
/// answered: then neither its exit nor our sleep is needed. The processor is offered to others
/// meanwhile, the guest among them.
fn await_more(
    device: &mut dyn VirtioDevice,
    active: &mut Active,
    index: usize,
) -> Result<(), Error> {
    if active.queues[index].is_cut_short() || !active.queues[index].is_worth_awaiting() {
        return Ok(());
    }
    let mut rounds = 0;
    let mut since = Instant::now();
    while rounds < ROUNDS && !active.queues[index].is_cut_short() {
        thread::yield_now();
        let came = match active.queues[index].has_more(&active.memory)? {
            true => {
                let before = active.queues[index].position();
                device.handle_queue(index, active)?;
                let together = active.queues[index].position().wrapping_sub(before);
                if together == 0 || !device.awaits_more(index, together) {
                    return Ok(());
                }
                true
            }
            false => device.look_around(index, active)?,
        };
        if came {
            active.queues[index].remember(true);
            rounds += 1;
            since = Instant::now();
        } else if since.elapsed() >= PATIENCE {
            active.queues[index].remember(false);
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::virtio::Kind;

    /// A device that is at work until it is let go.
    struct Busy {
        begun: mpsc::Sender<()>,
        go: mpsc::Receiver<()>,
    }

    impl VirtioDevice for Busy {
        fn kind(&self) -> Kind {
            Kind::Rng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[]
        }

        fn features(&self) -> u64 {
            0
        }

        fn config_space(&self) -> Vec<u8> {
            Vec::new()
        }

        fn activate(&mut self, _: &mut Active) -> Result<(), Error> {
            self.begun.send(()).unwrap();
            self.go.recv().unwrap();
            Ok(())
        }

        fn handle_queue(&mut self, _: usize, _: &mut Active) -> Result<(), Error> {
            Ok(())
        }
    }

    /// A worker whose device is at work, until something is sent.
    fn at_work() -> (Worker, mpsc::Sender<()>) {
        let (begun, wait) = mpsc::channel();
        let (let_go, go) = mpsc::channel();
        let mut worker = Worker::new(Box::new(Busy { begun, go }), Vec::new()).unwrap();
        worker.start(ThreadKind::Device(Kind::Rng)).unwrap();
        worker.activate(Activation {
            memory: Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap(),
            queues: Vec::new(),
            features: 0,
            counters: Arc::default(),
            config: ConfigChange::new(|_| {}),
            on_failure: Box::new(|_| {}),
        });
        wait.recv().unwrap();
        (worker, let_go)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_reset_does_not_wait_for_a_device_that_is_at_work() {
        let (worker, let_go) = at_work();
        let (done, reset) = mpsc::channel();
        worker.reset(Box::new(move || done.send(()).unwrap()));
        assert!(reset.try_recv().is_err());
        let_go.send(()).unwrap();
        reset.recv_timeout(LONG).unwrap();
    }

    #[test]
    fn who_waits_for_a_device_that_is_at_work_does_so_for_a_while_only() {
        let (worker, let_go) = at_work();
        worker.stop();
        assert!(!worker.ended_by(Instant::now() + Duration::from_millis(10)));
        let_go.send(()).unwrap();
        assert!(worker.ended_by(Instant::now() + LONG));
    }
}
