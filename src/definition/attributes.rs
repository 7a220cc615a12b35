//! `[disk]` and `[image]`: what is registered beside the root disk's content. What is wrong whatever the base is, is told
//! here, with its line; the rest when the base is known.

use crate::cloud::VolumeKind;
use crate::config::toml_reader::{At, Table, listed, nearest};
use std::ops::RangeInclusive;

/// EBS's largest volume.
const MAX_GIB: u64 = 65536;

struct Type {
    name: &'static str,
    iops: Option<RangeInclusive<u32>>,
    /// MiB/s
    throughput: Option<RangeInclusive<u32>>,
}

/// Types that an instance can boot from, and what may be provisioned for each (Amazon EBS user guide, volume types). How
/// much of it a size allows is left to EC2, which says so before anything is baked.
const TYPES: [Type; 5] = [
    Type { name: "gp2", iops: None, throughput: None },
    Type { name: DEFAULT_TYPE, iops: Some(3000..=80_000), throughput: Some(125..=2000) },
    Type { name: "io1", iops: Some(100..=64_000), throughput: None },
    Type { name: "io2", iops: Some(100..=256_000), throughput: None },
    Type { name: "standard", iops: None, throughput: None },
];
/// Where neither the definition nor the base names a type. EC2's own default is gp2: slower, and dearer.
pub const DEFAULT_TYPE: &str = "gp3";
/// Without IOPS, EC2 makes none of these.
const NEED_IOPS: [&str; 2] = ["io1", "io2"];
/// Types that exist, but not for root volumes.
const NOT_BOOTABLE: [&str; 2] = ["sc1", "st1"];

/// What a TPM needs (EC2 user guide, NitroTPM), and the only one of arm64.
pub const UEFI: &str = "uefi";
const BOOT_MODES: [&str; 3] = ["legacy-bios", UEFI, "uefi-preferred"];

/// `[image]`, where it is not to be the base's. `Some(None)`: without it, even if the base has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registered {
    /// `legacy-bios`, `uefi` or `uefi-preferred`.
    pub boot_mode: Option<String>,
    pub ena: Option<bool>,
    /// `simple`.
    pub sriov: Option<Option<String>>,
    /// `v2.0`.
    pub tpm: Option<Option<String>>,
    /// `v2.0`.
    pub imds: Option<Option<String>>,
}

/// Size in GiB, and the kind of volume.
pub fn disk(top: &Table) -> (Option<u64>, VolumeKind) {
    let known = &["encrypted", "iops", "kms_key", "size_gib", "throughput", "type"];
    let Some(disk) = top.table("disk", "[disk]", known) else { return Default::default() };
    let volume_type = disk.string("type", "a type of volume, such as \"gp3\"");
    let volume_type = volume_type.and_then(|at| disk.check("type", at.line, known_type(at.value)));
    let number = |key, unit| disk.integer(key, 1..=u32::MAX.into(), unit).and_then(|n| u32::try_from(n).ok());
    let encrypted = disk.boolean("encrypted");
    let kms_key = disk.string("kms_key", "a KMS key's id, ARN or alias, such as \"alias/images\"");
    let kms_key = kms_key.and_then(|at| match encrypted {
        Some(true) => disk.check("kms_key", at.line, key(at.value)),
        None if disk.has("encrypted") => None, // it is wrong itself
        _ => disk.wrong("kms_key", at.line, "needs `encrypted = true` beside it"),
    });
    let (iops, throughput) = (number("iops", "IOPS"), number("throughput", "MiB/s"));
    let kind = VolumeKind { volume_type, iops, throughput, encrypted, kms_key };
    for (key, what) in misfits(&kind) {
        match disk.value(key) {
            Some(at) => disk.wrong(key, at.line, what),
            // Given, and wrong itself; or missing.
            None => disk.required::<()>(key, None, &what),
        };
    }
    (disk.integer("size_gib", 1..=MAX_GIB, "GiB"), kind)
}

/// Keys of `[disk]` that do not fit the type, and why. Without a type nothing is said.
pub fn misfits(kind: &VolumeKind) -> Vec<(&'static str, String)> {
    let Some(of) = TYPES.iter().find(|of| Some(of.name) == kind.volume_type.as_deref()) else {
        return Vec::new();
    };
    let mut misfits = Vec::new();
    let mut judge = |key, unit, value: Option<u32>, limits: fn(&Type) -> &Option<RangeInclusive<u32>>| {
        let Some(value) = value else { return };
        match limits(of) {
            Some(limits) if limits.contains(&value) => {}
            Some(limits) => {
                let (low, high) = (limits.start(), limits.end());
                misfits.push((key, format!("is {value}: the type {} takes {low} to {high} {unit}", of.name)));
            }
            None => {
                let others: Vec<_> =
                    TYPES.iter().filter(|of| limits(of).is_some()).map(|of| of.name).collect();
                let what = format!("does not go with the type {}: only with {}", of.name, listed(&others));
                misfits.push((key, what));
            }
        }
    };
    judge("iops", "IOPS", kind.iops, |of| &of.iops);
    judge("throughput", "MiB/s", kind.throughput, |of| &of.throughput);
    if kind.iops.is_none() && NEED_IOPS.contains(&of.name) {
        misfits.push(("iops", format!("the type {} needs it", of.name)));
    }
    misfits
}

fn known_type(name: &str) -> Result<String, String> {
    if TYPES.iter().any(|of| of.name == name) {
        Ok(name.to_owned())
    } else if NOT_BOOTABLE.contains(&name) {
        Err(format!("is {name:?}, which no instance boots from: it should be \"gp3\", say"))
    } else {
        Err(format!("is {name:?}, which is no type of volume: {}", nearest(name, &TYPES.map(|of| of.name))))
    }
}

/// A key's id, its ARN, or an alias.
fn key(name: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_/:".contains(c);
    let spelt = name.starts_with("alias/")
        || name.starts_with("arn:")
        || name.starts_with("mrk-")
        || name.len() == 36 && name.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if spelt && name.len() <= 2048 && name.chars().all(good) {
        Ok(name.to_owned())
    } else {
        Err(format!("is {name:?}: it should be a KMS key's id, ARN or alias, such as \"alias/images\""))
    }
}

pub fn image(top: &Table) -> Registered {
    let known = &["boot_mode", "ena", "imds", "sriov", "tpm"];
    let Some(image) = top.table("image", "[image]", known) else { return Registered::default() };
    let words = |key: &str, words: &[&str]| -> Option<At<String>> {
        let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
        let expected = quoted.join(" or ");
        let at = image.string(key, &expected)?;
        if words.contains(&at.value) {
            return Some(At { value: at.value.to_owned(), line: at.line });
        }
        image.wrong(key, at.line, format!("is {:?}: it should be {expected}", at.value))
    };
    let boot_mode = words("boot_mode", &BOOT_MODES);
    let without = |at: At<String>| Some(at.value).filter(|word| !["none", "optional"].contains(&&**word));
    let tpm = words("tpm", &["v2.0", "none"]);
    if let (Some(tpm), Some(mode)) = (&tpm, &boot_mode)
        && tpm.value != "none"
        && mode.value != UEFI
    {
        let what = format!(
            "is \"v2.0\", which needs the boot mode \"uefi\", not {:?} (line {})",
            mode.value, mode.line
        );
        image.wrong::<()>("tpm", tpm.line, what);
    }
    Registered {
        boot_mode: boot_mode.map(|at| at.value),
        ena: image.boolean("ena"),
        sriov: words("sriov", &["simple", "none"]).map(without),
        tpm: tpm.map(without),
        imds: words("imds", &["v2.0", "optional"]).map(without),
    }
}
