//! What userfaultfd can do for this process, found out by trying.
//!
//! Facts about the kernel, and what follows:
//! - A bare EPERM says nothing; three knobs exist (`CAP_SYS_PTRACE`, the sysctl
//!   `vm.unprivileged_userfaultfd`, the permissions of `/dev/userfaultfd`), and a seccomp filter
//!   refuses with the same EPERM, or with ENOSYS. The reason given here names the one to turn.
//! - A descriptor of `/dev/userfaultfd` can be handed to an unprivileged process, which creates a
//!   full userfaultfd from it.
//! - Since 5.11 everybody may have one that delivers faults of user mode only. It fills and publishes as
//!   a full one does; but a system call that meets a missing page fails with EFAULT. That will not do
//!   for programs that know nothing of it, so servers need a full one.
//! - `EVENT_FORK` needs `CAP_SYS_PTRACE` of whoever makes the handshake, so the server makes it on
//!   behalf of its targets. Without it the clients keep served memory out of their children.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use uffd::{Access, Features, Opening, Userfaultfd};

use crate::error::{Error, Result};

/// What userfaultfd can do for this process.
#[derive(Debug)]
pub struct Delivery {
    device: Option<OwnedFd>,
    way: Way,
    features: Features,
    fork_events: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Device,
    SystemCall,
    /// Not for faults in the kernel, and why.
    UserModeOnly(Refusal),
    None(Refusal),
}

/// Why there is no full userfaultfd, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    reason: String,
    hint: String,
}

impl Delivery {
    /// Tries the ways to a userfaultfd: a full one, the device first; else one for user mode only.
    pub fn probe() -> Delivery {
        let device = uffd::open_device();
        let by_device = device
            .as_ref()
            .map_err(clone_error)
            .and_then(|device| Userfaultfd::open(Opening::Device(device.as_fd())));
        let (way, device) = match (by_device, device) {
            (Ok(_), Ok(device)) => (Way::Device, Some(device)),
            (_, device) => match Userfaultfd::open(Opening::SystemCall(Access::Full)) {
                Ok(_) => (Way::SystemCall, None),
                Err(error) => {
                    let refusal = explain(&error, device.as_ref().err());
                    match Userfaultfd::open(Opening::SystemCall(Access::UserModeOnly)) {
                        Ok(_) => (Way::UserModeOnly(refusal), None),
                        Err(_) => (Way::None(refusal), None),
                    }
                }
            },
        };
        let mut delivery = Delivery { device, way, features: Features::NONE, fork_events: false };
        if let Some(opening) = delivery.opening() {
            let features = Userfaultfd::probe(opening).unwrap_or(Features::NONE);
            let fork_events = Userfaultfd::open(opening)
                .and_then(|uffd| uffd.handshake(Features::EVENT_FORK))
                .is_ok();
            delivery.features = features;
            delivery.fork_events = fork_events;
        }
        delivery
    }

    /// A delivery without userfaultfd, for `reason`.
    pub fn without(reason: &str) -> Delivery {
        Delivery {
            device: None,
            way: Way::None(Refusal { reason: reason.to_owned(), hint: String::new() }),
            features: Features::NONE,
            fork_events: false,
        }
    }

    /// # Errors
    /// Why there is no full userfaultfd here, with the knob to turn.
    pub fn check(&self) -> Result<()> {
        match &self.way {
            Way::UserModeOnly(Refusal { reason, hint }) | Way::None(Refusal { reason, hint }) => {
                Err(Error::Permission { message: reason.clone(), hint: hint.clone() })
            }
            Way::Device | Way::SystemCall => Ok(()),
        }
    }

    /// The way to a full one: `device`, `system call`, or nothing.
    pub fn way(&self) -> Option<&'static str> {
        match self.way {
            Way::Device => Some("device"),
            Way::SystemCall => Some("system call"),
            Way::UserModeOnly(_) | Way::None(_) => None,
        }
    }

    /// Which faults the best userfaultfd delivers that can be had here; none if there is none.
    pub fn access(&self) -> Option<Access> {
        match self.way {
            Way::Device | Way::SystemCall => Some(Access::Full),
            Way::UserModeOnly(_) => Some(Access::UserModeOnly),
            Way::None(_) => None,
        }
    }

    /// Features of this kernel.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Whether forks of targets are announced to us.
    pub fn fork_events(&self) -> bool {
        self.fork_events
    }

    /// The device, for handing over to targets.
    pub fn device(&self) -> Option<BorrowedFd<'_>> {
        self.device.as_ref().map(AsFd::as_fd)
    }

    /// A new userfaultfd of this process, the best that can be had: see [`Self::access`].
    pub(crate) fn open(&self) -> Result<Option<Userfaultfd>> {
        let open = |opening| {
            Userfaultfd::open(opening).map_err(|e| Error::kernel("cannot open a userfaultfd", e))
        };
        self.opening().map(open).transpose()
    }

    fn opening(&self) -> Option<Opening<'_>> {
        match self.way {
            Way::Device => self.device().map(Opening::Device),
            Way::SystemCall => Some(Opening::SystemCall(Access::Full)),
            Way::UserModeOnly(_) => Some(Opening::SystemCall(Access::UserModeOnly)),
            Way::None(_) => None,
        }
    }
}

/// Names the knob behind a refusal.
fn explain(by_call: &io::Error, by_device: Option<&io::Error>) -> Refusal {
    let device = match by_device.and_then(io::Error::raw_os_error) {
        Some(libc::ENOENT) => {
            "there is no /dev/userfaultfd (Linux < 6.1, or a container without it)"
        }
        Some(_) => "/dev/userfaultfd may not be opened",
        None => "/dev/userfaultfd refuses to make one",
    };
    let (reason, hint) = match by_call.raw_os_error() {
        Some(libc::ENOSYS) if uffd::filtered() => (
            "a seccomp filter refuses userfaultfd(2) (the call answers ENOSYS)".to_owned(),
            "allow userfaultfd in the filter (docker run --security-opt seccomp=FILE), or hand \
             /dev/userfaultfd in",
        ),
        Some(libc::ENOSYS) => (
            "this kernel was built without userfaultfd".to_owned(),
            "use a kernel with CONFIG_USERFAULTFD=y",
        ),
        Some(libc::EPERM) if userfaultfd_allowed() => (
            "a seccomp filter or security module refuses userfaultfd(2)".to_owned(),
            "allow userfaultfd in the filter (docker run --security-opt seccomp=FILE), or hand \
             /dev/userfaultfd in",
        ),
        Some(libc::EPERM) => (
            match uffd::filtered() {
                false => format!("userfaultfd(2) is not permitted to this user, and {device}"),
                true => format!(
                    "userfaultfd(2) is not permitted to this user (the seccomp filter of this \
                     process may refuse it too), and {device}"
                ),
            },
            "sudo setfacl -m u:$USER:rw /dev/userfaultfd, or sudo sysctl \
             vm.unprivileged_userfaultfd=1, or run with CAP_SYS_PTRACE",
        ),
        _ => (format!("userfaultfd(2) failed: {by_call}"), ""),
    };
    Refusal { reason, hint: hint.to_owned() }
}

/// Whether the kernel's own rules allow the call, so that a refusal comes from somewhere else.
fn userfaultfd_allowed() -> bool {
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if sysctl.is_ok_and(|text| text.trim() == "1") {
        return true;
    }
    const CAP_SYS_PTRACE: u32 = 19;
    status_field("CapEff:")
        .and_then(|hex| u64::from_str_radix(&hex, 16).ok())
        .is_some_and(|set| set >> CAP_SYS_PTRACE & 1 == 1)
}

fn status_field(name: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().to_owned())
}

fn clone_error(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}
