//! `linux`: namespaces, resources, devices, seccomp.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Error, List, refuse};

/// `linux`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    /// Ids of a user namespace.
    pub uid_mappings: List<IdMapping>,
    /// Ids of a user namespace.
    pub gid_mappings: List<IdMapping>,
    /// Kernel parameters, `net.ipv4.ip_forward` and so on.
    pub sysctl: BTreeMap<String, String>,
    /// Limits.
    pub resources: Resources,
    /// The container's cgroup.
    pub cgroups_path: Option<String>,
    /// Namespaces to make or to join; others are the guest's.
    pub namespaces: List<Namespace>,
    /// Device files besides the default ones.
    pub devices: List<Device>,
    /// System calls allowed.
    pub seccomp: Option<Seccomp>,
    /// The root's mount propagation.
    pub rootfs_propagation: Option<String>,
    /// Paths that appear empty.
    pub masked_paths: List<String>,
    /// Paths that cannot be written to.
    pub readonly_paths: List<String>,
    /// Ignored: the guest's kernel has no SELinux; the virtual machine is the boundary.
    pub mount_label: Option<String>,
    /// Cache allocation; refused.
    pub intel_rdt: Option<serde_json::Value>,
    /// An execution domain other than the machine's.
    pub personality: Option<Personality>,
    /// The memory nodes that memory comes from.
    pub memory_policy: Option<MemoryPolicy>,
    /// Network devices to move into the container; refused.
    pub net_devices: BTreeMap<String, serde_json::Value>,
    /// Clocks of a time namespace, `monotonic` and `boottime`.
    pub time_offsets: BTreeMap<String, TimeOffset>,
}

/// One of `linux.timeOffsets`.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct TimeOffset {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds, less than a second.
    pub nanosecs: u32,
}

/// `linux.personality`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    /// Refused: the specification names none.
    pub flags: List<String>,
}

/// `linux.memoryPolicy`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct MemoryPolicy {
    /// `MPOL_...`.
    pub mode: String,
    /// A list such as `0-3,7`.
    pub nodes: String,
    /// `MPOL_F_...`.
    pub flags: List<String>,
}

/// One of `linux.uidMappings` or `linux.gidMappings`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct IdMapping {
    /// The first id in the container.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// The first id in the guest.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// One of `linux.namespaces`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Which kind.
    #[serde(rename = "type")]
    pub kind: String,
    /// The namespace to join, a path of the guest; absent makes a new one.
    pub path: Option<String>,
}

/// One of `linux.devices`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Device {
    /// `c`, `u`, `b` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where in the container.
    pub path: String,
    /// The major number.
    pub major: i64,
    /// The minor number.
    pub minor: i64,
    /// The mode; 0666 where absent.
    pub file_mode: Option<u32>,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The guest's own file of it, if it was plugged in for the container.
    #[serde(skip)]
    pub guest: Option<String>,
}

/// `linux.resources`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Resources {
    /// Memory.
    pub memory: Memory,
    /// CPU time.
    pub cpu: Cpu,
    /// Processes.
    pub pids: Pids,
    /// Block devices.
    #[serde(rename = "blockIO")]
    pub block_io: BlockIo,
    /// Huge pages.
    pub hugepage_limits: List<HugepageLimit>,
    /// Any file of the cgroup.
    pub unified: BTreeMap<String, String>,
    /// Device files that may be used.
    pub devices: List<DeviceRule>,
    /// Refused: cgroup v1 only.
    pub network: Option<NetworkPriorities>,
    /// Refused.
    pub rdma: BTreeMap<String, serde_json::Value>,
}

impl Resources {
    /// Reads and checks `linux.resources` as an update has it.
    ///
    /// # Errors
    /// As [`Spec::parse`](super::Spec::parse).
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        if json.len() > super::MAX_BYTES {
            return Err(Error::TooLong(json.len()));
        }
        let resources: Self = serde_json::from_slice(json)?;
        refuse::resources(&resources)?;
        Ok(resources)
    }
}

/// `linux.resources.memory`, in bytes; -1 is no limit.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Memory {
    /// The limit.
    pub limit: Option<i64>,
    /// What is kept from reclaim.
    pub reservation: Option<i64>,
    /// The limit of memory and swap together.
    pub swap: Option<i64>,
    /// Refused: cgroup v1 only.
    pub swappiness: Option<u64>,
    /// Refused: cgroup v1 only.
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: Option<bool>,
    /// Whether a new limit below what is in use fails.
    pub check_before_update: Option<bool>,
}

/// `linux.resources.cpu`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Cpu {
    /// Weight by cgroup v1's measure, 2 to 262144.
    pub shares: Option<u64>,
    /// Microseconds in each period; -1 is no limit.
    pub quota: Option<i64>,
    /// Microseconds that may be saved up.
    pub burst: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Refused: cgroup v1 only.
    pub realtime_runtime: Option<i64>,
    /// Refused: cgroup v1 only.
    pub realtime_period: Option<u64>,
    /// CPUs, such as `0-3,7`.
    pub cpus: Option<String>,
    /// Memory nodes.
    pub mems: Option<String>,
    /// 1 runs only when nothing else does.
    pub idle: Option<i64>,
}

/// `linux.resources.pids`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// How many processes and threads; 0 or less is no limit.
    pub limit: Option<i64>,
}

/// `linux.resources.blockIO`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct BlockIo {
    /// Weight, 10 to 1000.
    pub weight: Option<u16>,
    /// Refused: cgroup v1 only.
    pub leaf_weight: Option<u16>,
    /// Weights of single devices.
    pub weight_device: List<WeightDevice>,
    /// Bytes read in a second.
    pub throttle_read_bps_device: List<Throttle>,
    /// Bytes written in a second.
    pub throttle_write_bps_device: List<Throttle>,
    /// Reads in a second.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: List<Throttle>,
    /// Writes in a second.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: List<Throttle>,
}

/// A weight of one block device.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct WeightDevice {
    /// The device's major number.
    pub major: i64,
    /// The device's minor number.
    pub minor: i64,
    /// Weight, 10 to 1000.
    pub weight: Option<u16>,
    /// Refused: cgroup v1 only.
    pub leaf_weight: Option<u16>,
}

/// A limit of one block device.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Throttle {
    /// The device's major number.
    pub major: i64,
    /// The device's minor number.
    pub minor: i64,
    /// The limit.
    pub rate: u64,
}

/// One of `linux.resources.hugepageLimits`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct HugepageLimit {
    /// Such as `2MB`.
    pub page_size: String,
    /// In bytes.
    pub limit: u64,
}

/// One of `linux.resources.devices`.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Whether it allows.
    pub allow: bool,
    /// `a`, `c` or `b`; all where absent.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// All where absent or -1.
    pub major: Option<i64>,
    /// All where absent or -1.
    pub minor: Option<i64>,
    /// Of `r`, `w`, `m`.
    pub access: Option<String>,
}

/// `linux.resources.network`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NetworkPriorities {
    /// A class for the net_cls controller.
    #[serde(rename = "classID")]
    pub class_id: Option<u32>,
    /// Priorities for the net_prio controller.
    pub priorities: List<serde_json::Value>,
}

/// `linux.seccomp`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Seccomp {
    /// What happens to calls that no rule names.
    pub default_action: String,
    /// The error of a default action that gives one.
    pub default_errno_ret: Option<u32>,
    /// The ways of calling the kernel that the rules are for.
    pub architectures: List<String>,
    /// Flags of seccomp(2).
    pub flags: List<String>,
    /// Refused.
    pub listener_path: Option<String>,
    /// The rules.
    pub syscalls: List<SeccompRule>,
}

/// One of `linux.seccomp.syscalls`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SeccompRule {
    /// The calls.
    pub names: List<String>,
    /// What happens to them.
    pub action: String,
    /// The error, where the action gives one.
    pub errno_ret: Option<u32>,
    /// Tests of arguments that must all hold.
    pub args: List<SeccompArg>,
}

/// One test of an argument of a system call.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SeccompArg {
    /// Which argument, 0 to 5.
    pub index: u32,
    /// What it is compared with.
    pub value: u64,
    /// The second value, of a masked comparison.
    pub value_two: u64,
    /// The comparison.
    pub op: String,
}
