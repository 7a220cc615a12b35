//! `[disk]` and `[image]`: the attributes that an image is registered with. Mistakes that do not depend on the base are
//! found here, with their lines. The other mistakes are found later, when the base is known.

use super::keys::UEFI;
use super::keys::{DISK, VOLUME_TYPES};
use crate::cloud::VolumeKind;
use crate::config::key_table::{Condition, KeyRule, Literal, ValueType};
use crate::config::toml_reader::{At, Table, did_you_mean, listed};

/// Volume types that EC2 has, but does not allow for root volumes.
const NOT_BOOTABLE: [&str; 2] = ["sc1", "st1"];

/// `[image]`: attributes that replace the base's. `Some(None)` removes an attribute that the base has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistrationSettings {
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

/// Reads `[disk]`: the size in GiB, the other attributes of the volume, and whether steps can write to the disk's nodes.
pub fn disk(top: &Table) -> (Option<u64>, VolumeKind, bool) {
    let Some(disk) = top.table("disk") else { return Default::default() };
    let volume_type = disk.string("type");
    let volume_type = volume_type.and_then(|at| disk.check("type", at.line, known_type(at.value)));
    let number = |key| disk.integer(key).and_then(|n| u32::try_from(n).ok());
    let encrypted = disk.boolean("encrypted");
    let kms_key = disk.string("kms_key").and_then(|at| match encrypted {
        Some(true) => disk.check("kms_key", at.line, check_kms_key(at.value)),
        // A mistake in `encrypted` was reported already.
        None if disk.has("encrypted") || disk.misspells("encrypted") => None,
        _ => disk.wrong("kms_key", at.line, "requires `encrypted = true`"),
    });
    let (iops, throughput) = (number("iops"), number("throughput"));
    let kind = VolumeKind { volume_type, iops, throughput, encrypted, kms_key };
    for (key, what) in misfits(&kind) {
        let is_read = if key == "iops" { iops.is_some() } else { throughput.is_some() };
        match disk.value(key) {
            Some(at) if is_read => _ = disk.wrong::<()>(key, at.line, what),
            // A value that could not be read was reported already.
            Some(_) => {}
            None => disk.missing(key, what),
        }
    }
    (disk.integer("size_gib"), kind, disk.flag("writable"))
}

/// The keys of `[disk]` that do not fit the volume's type, and the reason for each. If no type is set, every key fits.
pub fn misfits(kind: &VolumeKind) -> Vec<(&'static str, String)> {
    let Some(volume_type) = kind.volume_type.as_deref() else { return Vec::new() };
    let given = |key: &str| match key {
        "iops" => kind.iops.map(u64::from),
        "throughput" => kind.throughput.map(u64::from),
        _ => None,
    };
    let rules =
        volume_rules().filter(|(name, _)| *name == volume_type).flat_map(|(_, conditions)| conditions);
    let misfits = rules.filter_map(|condition| match (condition, condition.key(), given(condition.key())) {
        (Condition::Within(_, low, high), key, Some(value)) if !(low..=high).contains(&&value) => {
            let unit = unit(key);
            Some((key, format!("is {value}: it must be {low} to {high} {unit} for type {volume_type}")))
        }
        (Condition::Absent(_), key, Some(_)) => {
            let takes = |conditions: &[Condition]| {
                conditions.iter().any(|c| matches!(c, Condition::Within(..)) && c.key() == key)
            };
            let others: Vec<_> = volume_rules().filter(|(_, c)| takes(c)).map(|(name, _)| name).collect();
            Some((key, format!("cannot be set for type {volume_type}, only for {}", listed(&others))))
        }
        (Condition::Present(_), key, None) => Some((key, format!("type {volume_type} requires it"))),
        _ => None,
    });
    misfits.collect()
}

/// For each type of volume, the conditions for the other keys.
fn volume_rules() -> impl Iterator<Item = (&'static str, &'static [Condition])> {
    DISK.rules.iter().filter_map(|rule| match rule {
        KeyRule::When("type", Literal::Text(name), conditions) => Some((*name, *conditions)),
        _ => None,
    })
}

fn unit(key: &str) -> &'static str {
    match DISK.key(key).map(|key| &key.value) {
        Some(ValueType::Integer { unit, .. }) => unit,
        _ => "",
    }
}

fn known_type(name: &str) -> Result<String, String> {
    if VOLUME_TYPES.contains(&name) {
        Ok(name.to_owned())
    } else if NOT_BOOTABLE.contains(&name) {
        Err(format!("is {name:?}: instances cannot boot from this volume type. Use for example \"gp3\""))
    } else {
        Err(format!("is {name:?}, which is not a volume type: {}", did_you_mean(name, VOLUME_TYPES, "types")))
    }
}

/// Checks a KMS key: its id, its ARN, or an alias.
fn check_kms_key(name: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_/:".contains(c);
    let known_form = name.starts_with("alias/")
        || name.starts_with("arn:")
        || name.starts_with("mrk-")
        || name.len() == 36 && name.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if known_form && name.len() <= 2048 && name.chars().all(good) {
        Ok(name.to_owned())
    } else {
        Err(format!("is {name:?}: it should be a KMS key's id, ARN or alias, such as \"alias/images\""))
    }
}

pub fn image(top: &Table) -> RegistrationSettings {
    let Some(image) = top.table("image") else { return RegistrationSettings::default() };
    let boot_mode = image.word("boot_mode");
    let without =
        |at: At<&str>| Some(at.value).filter(|word| !["none", "optional"].contains(word)).map(str::to_owned);
    let tpm = image.word("tpm");
    if let (Some(tpm), Some(mode)) = (&tpm, &boot_mode)
        && tpm.value != "none"
        && mode.value != UEFI
    {
        let what = format!(
            "is \"v2.0\", which requires `boot_mode = \"uefi\"`, but `boot_mode` is {:?} (line {})",
            mode.value, mode.line
        );
        image.wrong::<()>("tpm", tpm.line, what);
    }
    RegistrationSettings {
        boot_mode: boot_mode.map(|at| at.value.to_owned()),
        ena: image.boolean("ena"),
        sriov: image.word("sriov").map(without),
        tpm: tpm.map(without),
        imds: image.word("imds").map(without),
    }
}
