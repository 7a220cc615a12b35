//! Reads the kernel's list of NVMe disks.

use super::identify::unpadded;
use super::{device_number_text, is_removed, text};
use anyhow::{Context, Result};
use std::fmt;
use std::path::Path;

/// An NVMe disk that has a device node. NVMe's term for such a disk is namespace.
#[derive(Debug)]
pub struct Namespace {
    /// The name, such as `nvme1n1`.
    pub name: String,
    /// The number of the block device.
    pub number: u64,
    /// The serial without padding.
    pub serial: Vec<u8>,
    model: Vec<u8>,
    /// The controllers of the disk. A disk has several controllers only if several paths lead to it, which is called
    /// multipath.
    pub controllers: Vec<Controller>,
}

#[derive(Debug)]
pub struct Controller {
    /// `live`, or another state such as `new` or `deleting`.
    state: Vec<u8>,
    /// The PCI vendor id; `None` if the controller is not a PCI device, or if the kernel does not show the id.
    pub vendor: Option<u32>,
}

impl Namespace {
    /// Returns whether a controller of the disk is `live`. A disk that was removed while it was open remains in the
    /// list, with another state.
    pub fn is_live(&self) -> bool {
        self.controllers.iter().any(|controller| controller.state == b"live")
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states: Vec<_> = self.controllers.iter().map(|c| text(&c.state)).collect();
        let states = if states.is_empty() { "without a controller".into() } else { states.join(", ") };
        let (number, serial, model) =
            (device_number_text(self.number), text(&self.serial), text(&self.model));
        write!(f, "{} ({number}): serial {serial:?}, model {model:?}, {states}", self.name)
    }
}

pub fn has_controllers(sys: &Path) -> bool {
    std::fs::read_dir(sys.join("class/nvme")).is_ok_and(|mut entries| entries.next().is_some())
}

/// Returns all disks that have a node, sorted by controller and namespace. A disk that is removed during this call is
/// left out.
pub fn namespaces(sys: &Path) -> Result<Vec<Namespace>> {
    let block = sys.join("block");
    let context = || format!("reading {}", block.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&block).with_context(context)? {
        let entry = entry.with_context(context)?;
        let name = entry.file_name();
        let Some((order, name)) = name.to_str().and_then(|name| Some((parse_name(name)?, name))) else {
            continue;
        };
        if let Some(namespace) = namespace(&entry.path(), name)? {
            found.push((order, namespace));
        }
    }
    found.sort_by_key(|(order, _)| *order);
    Ok(found.into_iter().map(|(_, namespace)| namespace).collect())
}

/// Parses the name of a disk. `nvme1n2` becomes (1, 2). Returns `None` for a path of a multipath disk (`nvme1c1n2`),
/// and for a partition.
fn parse_name(name: &str) -> Option<(u32, u32)> {
    let (controller, namespace) = name.strip_prefix("nvme")?.split_once('n')?;
    let parse_number = |digits: &str| -> Option<u32> {
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    Some((parse_number(controller)?, parse_number(namespace)?))
}

fn namespace(dir: &Path, name: &str) -> Result<Option<Namespace>> {
    // A hidden entry is one of several paths to a disk. The disk itself has another entry, which is not hidden.
    if attribute(&dir.join("hidden"))?.is_some_and(|hidden| hidden != b"0") {
        return Ok(None);
    }
    let device = dir.join("device");
    let (Some(number), Some(serial)) = (attribute(&dir.join("dev"))?, attribute(&device.join("serial"))?)
    else {
        return Ok(None);
    };
    let number = device_number(&number)
        .with_context(|| format!("reading {}: {:?}", dir.join("dev").display(), text(&number)))?;
    Ok(Some(Namespace {
        name: name.to_owned(),
        number,
        serial,
        model: attribute(&device.join("model"))?.unwrap_or_default(),
        controllers: controllers(&device)?,
    }))
}

/// Returns the controllers of a disk. `device` is the directory of the disk's only controller. With multipath, `device`
/// is the directory of a subsystem, which contains one entry for each controller.
fn controllers(device: &Path) -> Result<Vec<Controller>> {
    if let Some(one) = controller(device)? {
        return Ok(vec![one]);
    }
    let context = || format!("reading {}", device.display());
    let entries = match std::fs::read_dir(device) {
        Ok(entries) => entries,
        Err(error) if is_removed(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(context),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(context)?;
        let name = entry.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix("nvme"));
        if digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())) {
            found.extend(controller(&entry.path())?);
        }
    }
    Ok(found)
}

fn controller(dir: &Path) -> Result<Option<Controller>> {
    let Some(state) = attribute(&dir.join("state"))? else { return Ok(None) };
    let vendor = attribute(&dir.join("device/vendor"))?;
    let vendor =
        vendor.and_then(|hex| u32::from_str_radix(str::from_utf8(&hex).ok()?.strip_prefix("0x")?, 16).ok());
    Ok(Some(Controller { state, vendor }))
}

/// Parses a device number such as `259:3`.
fn device_number(text: &[u8]) -> Option<u64> {
    let (major, minor) = str::from_utf8(text).ok()?.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Returns a sysfs attribute without newline and padding; `None` if the file does not exist or the disk was removed.
fn attribute(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(unpadded(text.strip_suffix(b"\n").unwrap_or(&text)).to_vec())),
        Err(error) if is_removed(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}
