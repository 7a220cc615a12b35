//! The capabilities that root has in a step.

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, remove_capability_from_bounding_set};

/// The capabilities that package managers and their scripts need: to set owners and modes, become another user, chroot,
/// and use low ports. All others are excluded. With `SYS_ADMIN`, a step could unmount the covers that hide parts of
/// `/proc`. With `MKNOD`, a step could access the host's disks.
pub const ALLOWED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::NET_BIND_SERVICE);

/// The capabilities that a process needs to become another user and to give up its other capabilities.
pub const BECOMING: CapabilitySet = CapabilitySet::SETGID.union(CapabilitySet::SETUID);
pub const NONE: CapabilitySet = CapabilitySet::empty();

/// Reduces the capabilities of this process and its children to [`ALLOWED`], permanently. A step with the network has
/// the network of this machine, so it also cannot use the low ports.
pub fn reduce(network: bool) -> Result<()> {
    let allowed = if network { ALLOWED.difference(CapabilitySet::NET_BIND_SERVICE) } else { ALLOWED };
    reduce_to(allowed)
}

/// Reduces the capabilities of this process and its children to `allowed`, permanently.
pub fn reduce_to(allowed: CapabilitySet) -> Result<()> {
    for capability in 0..64 {
        if allowed.bits() & (1 << capability) == 0 && !drop_from_bounding_set(capability)? {
            break;
        }
    }
    rustix::thread::clear_ambient_capability_set().context("clearing the ambient capabilities")?;
    let has = rustix::thread::capabilities(None).context("reading the capabilities")?.permitted;
    let keep = allowed & has;
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).context("dropping capabilities")?;
    rustix::thread::set_no_new_privs(true).context("setting no_new_privs")
}

/// Returns false if this kernel does not have the capability.
fn drop_from_bounding_set(number: u32) -> Result<bool> {
    match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false), // beyond this kernel's last capability
        Err(error) => {
            Err(error).with_context(|| format!("dropping capability {number} from the bounding set"))
        }
    }
}
