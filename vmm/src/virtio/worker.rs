//! The thread of a running device: waits for kicks and for the device's own
//! descriptors, and calls the device. Dropping or stopping the [`Worker`]
//! ends the thread and gives the device back.
//!
//! A kick takes this way: the guest's write to the notify page matches an
//! ioeventfd, KVM signals the eventfd without leaving the kernel for long,
//! [`run`] wakes, [`serve_queue`] calls [`VirtioDevice::handle_queue`].

use std::{
    io,
    sync::{Arc, mpsc},
    thread,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{Active, Error, Sources, VirtioDevice, sources::FIRST_WORKER_TOKEN};

const QUEUE_TOKEN: u64 = FIRST_WORKER_TOKEN;
const CONTROL_TOKEN: u64 = u64::MAX;

/// A device at work on its own thread.
pub struct Worker {
    control: EventFd,
    messages: mpsc::Sender<Message>,
    thread: Option<thread::JoinHandle<Box<dyn VirtioDevice>>>,
}

enum Message {
    Stop,
    WriteConfig { offset: usize, data: Vec<u8> },
}

/// What a worker is started with.
pub struct Start {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// What it works with, made by `active` on the worker's own epoll.
    pub active: Box<dyn FnOnce(Sources) -> Active + Send>,
    /// The kick of each queue, in the order of the queues.
    pub kicks: Vec<Arc<EventFd>>,
    /// Shuts the thread's jail; runs first on the new thread.
    pub confine: Box<dyn FnOnce() -> io::Result<()> + Send>,
    /// Told once when the device broke down, from the worker's thread.
    pub on_failure: Box<dyn FnOnce(&Error) + Send>,
}

impl Worker {
    /// Starts the thread, named after the device.
    ///
    /// # Errors
    /// When the kernel refuses a descriptor or a thread.
    pub fn start(start: Start) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let control = EventFd::new(EFD_NONBLOCK)?;
        let watch = |fd: &EventFd, token| {
            let event = EpollEvent::new(EventSet::IN, token);
            epoll.ctl(
                ControlOperation::Add,
                std::os::fd::AsRawFd::as_raw_fd(fd),
                event,
            )
        };
        watch(&control, CONTROL_TOKEN)?;
        for (index, kick) in start.kicks.iter().enumerate() {
            watch(kick, QUEUE_TOKEN + index as u64)?;
        }
        let (messages, inbox) = mpsc::channel();
        let wakeup = control.try_clone()?;
        let thread = thread::Builder::new()
            .name(format!("virtio-{}", start.device.kind().name()))
            .stack_size(256 * 1024)
            .spawn(move || run(start, &epoll, &wakeup, &inbox))?;
        Ok(Self {
            control,
            messages,
            thread: Some(thread),
        })
    }

    /// Passes a write of the driver to the configuration space on.
    pub fn write_config(&self, offset: usize, data: Vec<u8>) {
        self.send(Message::WriteConfig { offset, data });
    }

    /// Ends the thread and takes the device back, not yet reset.
    ///
    /// `None` when the device panicked, which is a bug of ours.
    pub fn stop(mut self) -> Option<Box<dyn VirtioDevice>> {
        self.end()
    }

    fn end(&mut self) -> Option<Box<dyn VirtioDevice>> {
        self.send(Message::Stop);
        self.thread.take()?.join().ok()
    }

    fn send(&self, message: Message) {
        // The thread outlives every sender but a stopped one, which needs no message.
        let _ = self.messages.send(message);
        let _ = self.control.write(1);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

fn run(
    start: Start,
    epoll: &Arc<Epoll>,
    wakeup: &EventFd,
    inbox: &mpsc::Receiver<Message>,
) -> Box<dyn VirtioDevice> {
    let Start {
        mut device,
        active,
        kicks,
        confine,
        on_failure,
    } = start;
    let mut active = active(Sources::new(Arc::clone(epoll)));
    let outcome = confine()
        .map_err(|source| Error::Host {
            what: "confine the device's thread",
            source,
        })
        .and_then(|()| device.activate(&mut active))
        .and_then(|()| serve(device.as_mut(), &mut active, &kicks, epoll, wakeup, inbox));
    if let Err(error) = outcome {
        on_failure(&error);
        wait_for_stop(inbox);
    }
    device
}

/// A broken device sleeps until it is stopped.
fn wait_for_stop(inbox: &mpsc::Receiver<Message>) {
    while let Ok(message) = inbox.recv() {
        if matches!(message, Message::Stop) {
            return;
        }
    }
}

fn serve(
    device: &mut dyn VirtioDevice,
    active: &mut Active,
    kicks: &[Arc<EventFd>],
    epoll: &Epoll,
    wakeup: &EventFd,
    inbox: &mpsc::Receiver<Message>,
) -> Result<(), Error> {
    // What the driver put into its queues before the thread ran.
    for index in 0..kicks.len() {
        serve_queue(device, active, index)?;
    }
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
                    let _ = wakeup.read();
                    for message in inbox.try_iter() {
                        match message {
                            Message::Stop => return Ok(()),
                            Message::WriteConfig { offset, data } => {
                                device.write_config(offset, &data, active);
                            }
                        }
                    }
                }
                token if token >= QUEUE_TOKEN => {
                    let index = (token - QUEUE_TOKEN) as usize;
                    let _ = kicks[index].read();
                    active.counters.kicks.add(1);
                    serve_queue(device, active, index)?;
                }
                token => device.handle_source(token, event.event_set(), active)?,
            }
        }
    }
}

/// Lets the device empty a queue, until the driver has nothing new or the
/// device takes no more.
pub(crate) fn serve_queue(
    device: &mut dyn VirtioDevice,
    active: &mut Active,
    index: usize,
) -> Result<(), Error> {
    if !active.queues[index].ready() {
        return Ok(());
    }
    loop {
        let before = active.queues[index].position();
        active.queues[index].pause_kicks(&active.memory)?;
        device.handle_queue(index, active)?;
        let more = active.queues[index].resume_kicks(&active.memory)?;
        if !more || active.queues[index].position() == before {
            return Ok(());
        }
    }
}
