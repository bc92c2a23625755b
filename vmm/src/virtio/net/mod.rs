//! The network card (virtio 1.2, section 5.1): packets between the guest's
//! rings and a tap.
//!
//! ```text
//!   guest --TX queue--> tx: header checked --writev--> tap
//!   guest <--RX queue-- rx: buffers laid out <--readv-- tap
//!                 \___________ or, both: vhost-net ____/
//! ```
//!
//! Packets go straight between the guest's memory and the tap, one system call
//! each. A packet of the guest that is not as it should be is dropped and
//! counted; it can make nobody allocate, wait or read past its buffers. A ring
//! that is broken stops the card.
//!
//! System calls of its thread: `readv`, `read`, `writev`, `ioctl` with the
//! requests in [`sys`], `timerfd_settime`, `epoll_ctl`, and `write` on eventfds.

pub mod config;
pub mod control;
pub mod header;
pub mod limiter;
mod rx;
mod sys;
pub mod tap;
#[cfg(test)]
mod tests;
mod tx;
pub mod vhost;

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::timerfd::TimerFd;

use self::{
    config::{Mac, Rate},
    control::{COMMAND_BYTES, Command},
    limiter::Limiter,
    rx::{Received, Rx, Way},
    tap::{Attached, Tap},
    tx::{Sent, Tx},
    vhost::Vhost,
};
use super::{Active, Error, Events, Kind, Link, VirtioDevice, slices::Slices};

/// The requests of `ioctl` that a card's thread makes, for the jail.
pub(crate) fn requests() -> impl Iterator<Item = u32> {
    sys::REQUESTS.into_iter().chain(sys::vhost::REQUESTS)
}

/// Feature bits (virtio 1.2, section 5.1.3).
pub mod features {
    /// `VIRTIO_NET_F_CSUM`
    pub const CSUM: u64 = 1 << 0;
    /// `VIRTIO_NET_F_GUEST_CSUM`
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_MTU`
    pub const MTU: u64 = 1 << 3;
    /// `VIRTIO_NET_F_MAC`
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_GUEST_TSO6`
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// `VIRTIO_NET_F_GUEST_ECN`
    pub const GUEST_ECN: u64 = 1 << 9;
    /// `VIRTIO_NET_F_HOST_TSO4`
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_HOST_TSO6`
    pub const HOST_TSO6: u64 = 1 << 12;
    /// `VIRTIO_NET_F_HOST_ECN`
    pub const HOST_ECN: u64 = 1 << 13;
    /// `VIRTIO_NET_F_MRG_RXBUF`
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_STATUS`
    pub const STATUS: u64 = 1 << 16;
    /// `VIRTIO_NET_F_CTRL_VQ`
    pub const CTRL_VQ: u64 = 1 << 17;
    /// `VIRTIO_NET_F_MQ`
    pub const MQ: u64 = 1 << 22;
    /// `VIRTIO_NET_F_GUEST_USO4`
    pub const GUEST_USO4: u64 = 1 << 54;
    /// `VIRTIO_NET_F_GUEST_USO6`
    pub const GUEST_USO6: u64 = 1 << 55;
    /// `VIRTIO_NET_F_HOST_USO`
    pub const HOST_USO: u64 = 1 << 56;
}

/// The most pairs of queues.
pub const MAX_PAIRS: usize = 8;
/// The shortest longest packet.
pub const MIN_MTU: u16 = 68;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;

/// Tokens: each tap's is its pair's number, each vhost's comes behind these.
const TO_GUEST_TIMER: u64 = 100;
const FROM_GUEST_TIMER: u64 = 101;
const FAILED: u64 = 200;

/// `VIRTIO_NET_S_LINK_UP`
const LINK_UP: u16 = 1;

/// Why a card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The tap.
    #[error("taps")]
    Tap(#[from] tap::Error),
    /// The host's kernel.
    #[error("vhost")]
    Vhost(#[from] vhost::Error),
    /// No queue or too many.
    #[error("taps are {0}: a card has 1 to {MAX_PAIRS} queues")]
    Pairs(usize),
    /// The address.
    #[error("mac {0} belongs to a group or nobody: use one whose first byte is even, not all zero")]
    Mac(Mac),
    /// The longest packet.
    #[error("mtu is {0}: it is at least {MIN_MTU}")]
    Mtu(u16),
    /// A bucket that never fills.
    #[error("{0} has a bucket with 0: each per_second and burst is at least 1")]
    Bucket(&'static str),
    /// The kernel refuses a timer.
    #[error("cannot make a timer for the limits")]
    Timer(#[source] io::Error),
}

/// What a card is beside its queues.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Its address.
    pub mac: Mac,
    /// The longest packet, if the guest is to be told.
    pub mtu: Option<u16>,
    /// How much may reach the guest.
    pub to_guest: Rate,
    /// How much the guest may send.
    pub from_guest: Rate,
}

/// The network card.
pub struct Net {
    settings: Settings,
    offered: u64,
    queue_sizes: Vec<u16>,
    pairs: Vec<Pair>,
    /// What the driver agreed to.
    agreed: u64,
    /// The pairs that the driver uses.
    using: usize,
    link: Link,
    /// What the driver can read.
    published: Vec<u8>,
    to_guest: Limit,
    from_guest: Limit,
}

/// A queue of the tap, and the pair of the guest's queues that belongs to it.
struct Pair {
    tap: Tap,
    vhost: Option<Vhost>,
    state: State,
}

/// Who moves the packets of a pair.
enum State {
    /// Nobody: the driver is not ready, or never used this pair.
    Idle,
    /// This process.
    Here(Box<Here>),
    /// The host's kernel.
    Kernel,
}

/// A pair whose packets this process moves.
struct Here {
    rx: Rx,
    tx: Tx,
    /// What the tap is listened to for, if at all.
    listening: Option<Events>,
    /// Whether the tap is to be read.
    reading: bool,
    /// Whether packets wait until the tap takes them.
    full: bool,
    gone: bool,
}

/// A direction's limit and what wakes it up.
struct Limit {
    rate: Rate,
    limiter: Option<Limiter>,
    timer: Option<TimerFd>,
    /// Whether something waits for the timer.
    armed: bool,
}

impl Net {
    /// A card on the queues of a tap, moved by `vhost`, one for each queue, or by this process.
    ///
    /// # Errors
    /// When the settings make no sense or the kernel refuses.
    pub fn new(
        (taps, abilities): (Vec<Tap>, tap::Abilities),
        vhost: Vec<Vhost>,
        settings: Settings,
    ) -> Result<Self, NewError> {
        let count = taps.len();
        if !(1..=MAX_PAIRS).contains(&count) {
            return Err(NewError::Pairs(count));
        }
        if !settings.mac.is_unicast() {
            return Err(NewError::Mac(settings.mac));
        }
        if let Some(mtu) = settings.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NewError::Mtu(mtu));
        }
        if !vhost.is_empty() {
            if vhost.len() != count {
                let (vhost, taps) = (vhost.len(), count);
                return Err(vhost::Error::Count { vhost, taps }.into());
            }
            if !settings.to_guest.is_unlimited() || !settings.from_guest.is_unlimited() {
                return Err(vhost::Error::Limits.into());
            }
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * count];
        if count > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let mut vhost = vhost.into_iter();
        let pair = |tap| Pair {
            tap,
            vhost: vhost.next(),
            state: State::Idle,
        };
        let mut card = Self {
            offered: offer(count, settings.mtu, abilities),
            queue_sizes,
            pairs: taps.into_iter().map(pair).collect(),
            agreed: 0,
            using: 1,
            link: Link::Up,
            published: Vec::new(),
            to_guest: Limit::new("to_guest", settings.to_guest)?,
            from_guest: Limit::new("from_guest", settings.from_guest)?,
            settings,
        };
        card.published = card.config_space();
        Ok(card)
    }

    /// Lets a pair work.
    fn start_pair(&mut self, index: usize, active: &mut Active) -> io::Result<()> {
        let (agreed, several) = (self.agreed, self.pairs.len() > 1);
        let pair = &mut self.pairs[index];
        if several {
            pair.tap.attach(Attached::Yes)?;
        }
        match (&mut pair.state, &pair.vhost) {
            (State::Idle, Some(vhost)) => {
                let [rx, tx] = [2 * index, 2 * index + 1];
                if !active.queues[rx].ready() || !active.queues[tx].ready() {
                    return Ok(());
                }
                let queues = [rx, tx].map(|index| {
                    let kick = Arc::clone(&active.kicks[index]);
                    let ring = active.queues[index].hand_over();
                    vhost::Queue { ring, kick }
                });
                for queue in &queues {
                    // From now on they wake the kernel and nobody here.
                    active.sources.remove(&*queue.kick)?;
                }
                active
                    .sources
                    .add(vhost, Events::IN, FAILED + index as u64)?;
                vhost.start(&active.memory, agreed, &queues, &pair.tap)?;
                pair.state = State::Kernel;
            }
            (State::Kernel, Some(vhost)) => vhost.run(&pair.tap)?,
            (State::Here(here), _) => here.reading = true,
            (State::Idle | State::Kernel, None) => {
                let mergeable = agreed & features::MRG_RXBUF != 0;
                pair.state = State::Here(Box::new(Here {
                    rx: Rx::new(active.memory.clone(), mergeable),
                    tx: Tx::new(active.memory.clone(), agreed),
                    listening: None,
                    reading: true,
                    full: false,
                    gone: false,
                }));
            }
        }
        self.listen(index, active)
    }

    /// Lets a pair rest.
    fn stop_pair(&mut self, index: usize, active: &mut Active) -> io::Result<()> {
        let several = self.pairs.len() > 1;
        let pair = &mut self.pairs[index];
        match (&mut pair.state, &pair.vhost) {
            (State::Kernel, Some(vhost)) => vhost.stop(),
            (State::Here(here), _) => {
                here.reading = false;
                here.full = false;
            }
            _ => {}
        }
        self.listen(index, active)?;
        match several {
            true => self.pairs[index].tap.attach(Attached::No),
            false => Ok(()),
        }
    }

    /// Listens to a pair's tap for what it waits for.
    fn listen(&mut self, index: usize, active: &Active) -> io::Result<()> {
        let Pair { tap, state, .. } = &mut self.pairs[index];
        let State::Here(here) = state else {
            return Ok(());
        };
        let mut wanted = Events::empty();
        wanted.set(Events::IN, here.reading);
        wanted.set(Events::OUT, here.full);
        // A tap that is gone, or that is no longer attached, says so for ever.
        let idle = here.gone || (wanted.is_empty() && index >= self.using);
        let wanted = (!idle).then_some(wanted);
        let (tap, token) = (&*tap, index as u64);
        match (here.listening, wanted) {
            (before, wanted) if before == wanted => {}
            (None, Some(events)) => active.sources.add(tap, events, token)?,
            (Some(_), Some(events)) => active.sources.modify(tap, events, token)?,
            (Some(_), None) => active.sources.remove(tap)?,
            (None, None) => {}
        }
        here.listening = wanted;
        Ok(())
    }

    /// Gives the guest what a pair's tap has, and tells how many packets that was.
    fn receive(&mut self, index: usize, active: &mut Active) -> Result<usize, Error> {
        let idle = index >= self.using || self.link == Link::Down;
        let Pair { tap, state, .. } = &mut self.pairs[index];
        let State::Here(here) = state else {
            return Ok(0);
        };
        let mut given = 0;
        if idle || here.gone {
            here.reading = false;
        } else {
            let received;
            (given, received) = here.rx.receive(Way {
                tap,
                queue: &mut active.queues[2 * index],
                memory: &active.memory,
                counters: &active.counters,
                limiter: &mut self.to_guest.limiter,
            })?;
            here.reading = received == Received::All;
            match received {
                Received::All | Received::NoBuffer => {}
                Received::Limited(wait) => self.to_guest.wake_in(wait).map_err(timer)?,
                Received::Gone => self.gone(index, active),
            }
        }
        self.listen(index, active)
            .map_err(host("listen to a tap"))?;
        Ok(given)
    }

    /// Sends what the guest has put into a pair's queue.
    fn transmit(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        let down = index >= self.using || self.link == Link::Down;
        let Pair { tap, state, .. } = &mut self.pairs[index];
        let State::Here(here) = state else {
            return Ok(());
        };
        let way = Way {
            tap,
            queue: &mut active.queues[2 * index + 1],
            memory: &active.memory,
            counters: &active.counters,
            limiter: &mut self.from_guest.limiter,
        };
        let sent = match down || here.gone {
            true => Tx::discard(way)?,
            false => here.tx.transmit(way)?,
        };
        here.full = sent == Sent::Full;
        match sent {
            Sent::All | Sent::Full => {}
            Sent::Limited(wait) => self.from_guest.wake_in(wait).map_err(timer)?,
            Sent::Gone => self.gone(index, active),
        }
        self.listen(index, active).map_err(host("listen to a tap"))
    }

    /// Sends what had to wait, until the driver is asked to kick again.
    fn transmit_waiting(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        loop {
            self.transmit(index, active)?;
            let waits = self.from_guest.armed
                || matches!(&self.pairs[index].state, State::Here(here) if here.full);
            let queue = &mut active.queues[2 * index + 1];
            if waits || !queue.ready() || queue.is_cut_short() {
                return Ok(());
            }
            if !queue.resume_kicks(&active.memory)? {
                return Ok(());
            }
        }
    }

    /// The interface is gone: the guest's link goes down for good.
    fn gone(&mut self, index: usize, active: &Active) {
        if let State::Here(here) = &mut self.pairs[index].state {
            here.gone = true;
            here.reading = false;
            here.full = false;
        }
        self.publish(active);
    }

    /// Tells the driver of the link, if it changed.
    fn publish(&mut self, active: &Active) {
        let config = self.config_space();
        if config != self.published {
            active.config.publish(&config);
            self.published = config;
        }
    }

    /// Carries the driver's commands out.
    fn control(&mut self, queue: usize, active: &mut Active) -> Result<(), Error> {
        let memory = active.memory.clone();
        while let Some(chain) = active.queues[queue].pop(&memory)? {
            let head = chain.head_index();
            let mut bytes = [0; COMMAND_BYTES];
            let given = Slices::readable(queue, &memory, chain.clone())?.read(&mut bytes);
            let answer = match Command::parse(&bytes[..given], self.pairs.len()) {
                Some(Command::SetPairs(count)) => self.set_pairs(count, active).is_ok(),
                None => false,
            };
            let answer = if answer { control::OK } else { control::ERR };
            let room = Slices::writable(queue, &memory, chain)?;
            let written = room.write(&[answer]);
            active.queues[queue].push(&memory, head, written as u32)?;
        }
        active.queues[queue].signal(&memory)
    }

    /// Uses the first `count` pairs.
    fn set_pairs(&mut self, count: usize, active: &mut Active) -> io::Result<()> {
        let before = std::mem::replace(&mut self.using, count);
        for index in before..count {
            self.start_pair(index, active)?;
        }
        for index in count..before {
            self.stop_pair(index, active)?;
        }
        Ok(())
    }

    /// What a queue is for.
    fn role(&self, index: usize) -> Role {
        let control = match self.agreed & features::MQ {
            0 => 2,
            _ => 2 * self.pairs.len(),
        };
        if index == control && self.agreed & features::CTRL_VQ != 0 {
            return Role::Control;
        }
        match index % 2 {
            0 => Role::Receive(index / 2),
            _ => Role::Transmit(index / 2),
        }
    }
}

/// What a queue is for.
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.offered
    }

    /// `struct virtio_net_config` (virtio 1.2, section 5.1.4).
    fn config_space(&self) -> Vec<u8> {
        let gone = |pair: &Pair| matches!(&pair.state, State::Here(here) if here.gone);
        let up = self.link == Link::Up && !self.pairs.iter().any(gone);
        let status = if up { LINK_UP } else { 0 };
        let mut config = Vec::with_capacity(12);
        config.extend(self.settings.mac.0);
        config.extend(status.to_le_bytes());
        config.extend((self.pairs.len() as u16).to_le_bytes());
        config.extend(self.settings.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    /// Those of the two directions have different work behind them.
    fn vector_per_queue(&self) -> bool {
        true
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), Error> {
        self.agreed = active.features;
        self.using = 1;
        let now = Instant::now();
        for (limit, token) in [
            (&mut self.to_guest, TO_GUEST_TIMER),
            (&mut self.from_guest, FROM_GUEST_TIMER),
        ] {
            limit.limiter = Limiter::new(limit.rate, now);
            if let Some(timer) = &limit.timer {
                let listened = active.sources.add(timer, Events::IN, token);
                listened.map_err(host("listen to the timer of a limit"))?;
            }
        }
        self.pairs[0]
            .tap
            .agree(self.agreed)
            .map_err(host("set what the tap leaves to the guest"))?;
        for pair in &self.pairs[1..] {
            pair.tap
                .attach(Attached::No)
                .map_err(host("detach a queue of the tap"))?;
        }
        if self.link == Link::Up {
            self.start_pair(0, active)
                .map_err(host("start a pair of queues"))?;
        }
        self.publish(active);
        Ok(())
    }

    fn handle_queue(&mut self, index: usize, active: &mut Active) -> Result<(), Error> {
        match self.role(index) {
            Role::Receive(pair) => self.receive(pair, active).map(|_| ()),
            Role::Transmit(pair) => self.transmit(pair, active),
            Role::Control => self.control(index, active),
        }
    }

    /// Packets come in trains, and answers come soon.
    fn awaits_more(&self, index: usize, _together: u16) -> bool {
        let Role::Transmit(pair) = self.role(index) else {
            return false;
        };
        let limited = self.from_guest.armed || self.to_guest.armed;
        let at_work = |here: &Here| !here.full && !here.gone && !limited;
        matches!(&self.pairs[pair].state, State::Here(here) if at_work(here))
    }

    fn look_around(&mut self, index: usize, active: &mut Active) -> Result<bool, Error> {
        match self.role(index) {
            Role::Transmit(pair) => Ok(self.receive(pair, active)? > 0),
            Role::Receive(_) | Role::Control => Ok(false),
        }
    }

    fn answered_on(&self, token: u64) -> Option<usize> {
        let pair = usize::try_from(token).ok()?;
        (pair < self.using).then_some(2 * pair + 1)
    }

    fn handle_source(
        &mut self,
        token: u64,
        events: Events,
        active: &mut Active,
    ) -> Result<(), Error> {
        match token {
            TO_GUEST_TIMER => {
                self.to_guest.wake();
                (0..self.using).try_for_each(|pair| self.receive(pair, active).map(|_| ()))
            }
            FROM_GUEST_TIMER => {
                self.from_guest.wake();
                (0..self.using).try_for_each(|pair| self.transmit_waiting(pair, active))
            }
            FAILED.. => Err(Error::Host {
                what: "go on: vhost-net gave up on the guest's rings",
                source: io::ErrorKind::InvalidData.into(),
            }),
            pair => {
                let pair = pair as usize;
                if events.intersects(Events::ERROR | Events::HANG_UP) {
                    self.gone(pair, active);
                    return self.listen(pair, active).map_err(host("listen to a tap"));
                }
                if events.contains(Events::OUT) {
                    self.transmit_waiting(pair, active)?;
                }
                self.receive(pair, active).map(|_| ())
            }
        }
    }

    fn set_link(&mut self, link: Link, active: Option<&mut Active>) -> Result<(), Error> {
        if std::mem::replace(&mut self.link, link) == link {
            return Ok(());
        }
        let Some(active) = active else {
            return Ok(());
        };
        for pair in 0..self.using {
            let done = match link {
                Link::Up => self.start_pair(pair, active),
                Link::Down => self.stop_pair(pair, active),
            };
            done.map_err(host("change the link"))?;
        }
        self.publish(active);
        Ok(())
    }

    fn reset(&mut self) {
        for pair in &mut self.pairs {
            if let Some(vhost) = &pair.vhost {
                vhost.stop();
            }
            pair.state = State::Idle;
        }
        self.using = 1;
        self.to_guest.armed = false;
        self.from_guest.armed = false;
    }
}

impl Limit {
    fn new(name: &'static str, rate: Rate) -> Result<Self, NewError> {
        let buckets = [rate.bytes, rate.packets];
        let empty = |bucket: &config::Bucket| bucket.per_second == 0 || bucket.burst == 0;
        if buckets.iter().flatten().any(empty) {
            return Err(NewError::Bucket(name));
        }
        let timer = match rate.is_unlimited() {
            true => None,
            false => Some(TimerFd::new().map_err(|error| NewError::Timer(error.into()))?),
        };
        Ok(Self {
            rate,
            limiter: None,
            timer,
            armed: false,
        })
    }

    fn wake_in(&mut self, wait: Duration) -> io::Result<()> {
        if let Some(timer) = self.timer.as_mut().filter(|_| !self.armed) {
            // zero would mean never
            timer.reset(wait.max(Duration::from_micros(1)), None)?;
            self.armed = true;
        }
        Ok(())
    }

    fn wake(&mut self) {
        if let Some(timer) = self.timer.as_mut().filter(|_| self.armed) {
            let _ = timer.wait();
        }
        self.armed = false;
    }
}

fn timer(source: io::Error) -> Error {
    host("set the timer of a limit")(source)
}

fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// The features of a card with so many pairs.
fn offer(pairs: usize, mtu: Option<u16>, abilities: tap::Abilities) -> u64 {
    use features::*;
    let tcp = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
    let mut offered = CSUM | GUEST_CSUM | MAC | MRG_RXBUF | STATUS | tcp;
    if mtu.is_some() {
        offered |= MTU;
    }
    if abilities.udp_segments {
        offered |= GUEST_USO4 | GUEST_USO6 | HOST_USO;
    }
    if pairs > 1 {
        offered |= CTRL_VQ | MQ;
    }
    offered
}
